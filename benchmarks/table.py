"""The last results as a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.growth import growth_lines
from prefdistill.report.canvas import FAINT, INK, drawn, label_of, new_figure


def reached(row: Mapping[str, Any]) -> bool:
    return bool(row["ratio"] <= row["target"] if row["at_most"] else row["ratio"] >= row["target"])


def _memory(row: Mapping[str, Any]) -> str:
    """Both sides' gigabytes, those of the setting that a target names if it is another one, and a target missed."""
    memory, asked = row["memory"], row["memory_target"]
    said = f"{memory['ours']:.1f} / {memory['peer']:.1f}"
    if memory.get("against") and f"({memory['against']})" not in row["peer_is"] and asked is not None:
        said += f"; {memory['against_peak']:.1f} of {memory['against']}"
    return said if asked is None or memory["ratio"] >= asked else f"{said}, {asked:g}x missed"


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many steps medians are of."""
    counts = sorted({len(row["seconds"]["ours"]) for row in rows} - {300})
    return " or ".join(map(str, counts)) if counts else "no"


def _precisions(rows: Sequence[Mapping[str, Any]]) -> str:
    """In what the sides took their steps, of what was tried."""
    tried = {tuple(sorted(of)) for row in rows for of in row["trials"].values()}
    if tried == {("bfloat16", "float32")}:
        return "in the faster of float32 and bfloat16"
    if len(tried) == 1:
        return f"in {next(iter(tried))[0]}, the only precision that was tried"
    return "in the faster of what was tried of float32 and bfloat16"


def _equality(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far the sides' losses were apart, by the precisions that they took."""
    most: dict[str, float] = {}
    for row in rows:
        if row.get("losses_differ_by") is not None:
            both = " and ".join(sorted(set(row["precision"].values())))
            most[both] = max(most.get(both, 0.0), row["losses_differ_by"])
    said = ", ".join(f"{value:.0e} in {both}" for both, value in sorted(most.items()))
    return (
        f"Losses of both sides' steps (sums of log-probs or rewards in scoring) differ by at most {said}. "
        if said
        else ""
    )


def markdown(results: Mapping[str, Any], *, picture: str, remarks: str = "") -> str:
    """RESULTS.md: a row a comparison, with what it was measured on; remarks are Markdown for its end."""

    def line(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    head = ["work", "peer", "ours, s", "peer, s", "ratio", "target", "memory, GB", "utilisation"]
    sizes, machine = results["sizes"], results["machine"]
    out = [
        "# Speed against the peer",
        "",
        f"Made by `python -m benchmarks` (`make benchmark`): a Llama of the shape {sizes['model']}, "
        f"prompts of {sizes['prompt_tokens']} tokens, "
        f"responses of {sizes['response_tokens']}, {sizes['batch_prompts']} prompts a step where a row says nothing "
        f"else; {machine['cpu']}, {machine['threads']} threads{', ' + machine['gpu'] if machine['gpu'] else ''}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f". Medians of {_counts(results['rows'])} steps that the sides took in turn (of 300 steps their sum, with "
        f"compiling), each {_precisions(results['rows'])}. {_equality(results['rows'])}Utilisation: model FLOPs of the "
        "tokens that must be computed once, over PyTorch's best matrix product on that machine (ours can be faster).",
        "",
        f"![ratio by row]({picture})",
        "",
        line(*head),
        line(*["---"] * len(head)),
    ]
    for row in results["rows"]:
        out.append(
            line(
                f"{row['name']}<br>{row['work']}",
                f"{row['peer_is']}, {row['precision']['peer']}",
                f"{row['ours']:.2f} ({row['precision']['ours']})",
                f"{row['peer']:.2f}",
                f"{row['ratio']:.2f}x",
                ("at most " if row["at_most"] else "") + f"{row['target']:g}x" + ("" if reached(row) else ", missed"),
                _memory(row),
                f"{row['utilisation']:.0%}",
            )
        )
    if results["growth"]:
        out += ["", *growth_lines(results["growth"])]
    return "\n".join(out) + "\n" + (f"\n{remarks}" if remarks else "")


@drawn
def picture(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How many times faster, a bar a row, with the target as a line across it."""
    kept = [row for row in rows if not row["at_most"]]
    if not kept:
        return None
    figure, axes = new_figure(0.9 + 0.45 * len(kept), width=6.4)
    for place, row in enumerate(kept):
        axes.barh([place], [row["ratio"]], height=0.55, color="#009e73" if reached(row) else "#d55e00", zorder=2)
        axes.plot([row["target"]] * 2, [place - 0.38, place + 0.38], color=INK, linewidth=2, zorder=3)
    axes.axvline(1.0, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(kept)), [label_of(row["name"], 40) for row in kept])
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("times faster than the peer; black: the target")
    return figure
