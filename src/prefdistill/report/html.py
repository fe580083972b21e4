"""The report of a run as one HTML file: what evaluation wrote, laid out to be read; nothing is computed here.

`write_report` takes the run as plain JSON values. Only ``title``, ``summary`` and the summary's ``verdict`` must be
there; any other key that is missing leaves its section out, with a line that says why. Fractions (win rates, wins,
ties, losses, accuracies, truncated, agreement) are 0 to 1 and are shown in percent; log-probs and divergences are in
nats, lengths in tokens. A number that is None, nan or infinite is shown as "n/a".

The file stands alone: style and pictures are inside it, there is no script, and its content policy forbids loading
anything. Every text of the run (prompts, responses, names, YAML) is escaped by the template engine; nothing is marked
as safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import ChainableUndefined, Environment, FunctionLoader, Undefined
from markupsafe import Markup

from prefdistill.evaluation.inference import p_text

from . import pictures
from .canvas import Palette, Point, is_number

__all__ = ["render", "write_report"]

NOT_KNOWN = "n/a"
_ORDER = ("reference", "dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo", "hull-dpo")
_OPEN_SAMPLES = 6  # the others wait behind "more"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def write_report(run: Mapping[str, Any]) -> str:
    """The HTML of a run's report, from plain JSON values; the caller writes the file, as UTF-8.

    Args:
        run: ``title``, ``generated``, ``version``; ``summary`` (``verdict``, ``prompts``, ``judge``, ``methods``,
            ``tests``); ``training``, a record a method; ``members`` and ``ensemble_mean``; ``disagreement``;
            ``mixtures``, a record a method; ``llm_judge``; ``samples``; ``warnings``; ``checks``;
            ``config`` (YAML); ``environment``; ``stages``.

    Raises:
        ValueError: if title, summary or the verdict in it is missing.
    """
    summary = _mapping(run.get("summary"))
    if not run.get("title") or not summary.get("verdict"):
        raise ValueError("a report needs at least 'title' and 'summary' with a 'verdict'")
    methods = {name: _mapping(record) for name, record in _mapping(summary.get("methods")).items()}
    training = {name: _mapping(record) for name, record in _mapping(run.get("training")).items()}
    samples = [_mapping(sample) for sample in _sequence(run.get("samples"))]
    spoken = [name for sample in samples for name in _mapping(sample.get("responses"))]
    palette = Palette(str(name) for name in [*methods, *training, *spoken])
    members = [_mapping(member) for member in _sequence(run.get("members"))]
    disagreement = _mapping(run.get("disagreement"))
    context = {
        "run": run,
        "summary": summary,
        "judge": _mapping(summary.get("judge")),
        "key_figures": _key_figures(summary, methods),
        "methods": [(name, methods[name]) for name in _in_order(methods)],
        "tests": [_mapping(test) for test in _sequence(summary.get("tests"))],
        "warnings": [_mapping(warning) for warning in _sequence(run.get("warnings"))],
        "checks": [_mapping(check) for check in _sequence(run.get("checks"))],
        "training": [(name, _ends(training[name])) for name in _in_order(training)],
        "members": members,
        "ensemble_mean": _mapping(run.get("ensemble_mean")),
        "disagreement": disagreement,
        "mixtures": [(name, _mapping(m)) for name, m in _mapping(run.get("mixtures")).items()],
        "llm_judge": _mapping(run.get("llm_judge")),
        "samples": [_card(sample) for sample in samples],
        "open_samples": _OPEN_SAMPLES,
        "environment": _mapping(run.get("environment")),
        "stages": [_mapping(stage) for stage in _sequence(run.get("stages"))],
        "pictures": {
            **_method_pictures(methods, palette),
            **_training_pictures(training, palette),
            **_member_pictures(members, _mapping(run.get("ensemble_mean")), disagreement),
        },
        "colour": lambda name: palette.colour(str(name)),
    }
    return render("report.html.jinja", context)


# What is shown, and how ------------------------------------------------------------------------------------------


def number(value: Any, decimals: int = 2, signed: bool = False) -> str:
    """A number with that many decimals, or in powers of ten where they would say nothing; a real minus sign."""
    if not is_number(value):
        return NOT_KNOWN
    value = float(value)
    small = value != 0 and abs(value) < 0.5 * 10**-decimals
    text = f"{value:.1e}" if small or abs(value) >= 1e7 else f"{value:.{decimals}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def percent(value: Any, decimals: int = 1) -> str:
    """A fraction in percent; "< 1%" where rounding would say that there is none."""
    if not is_number(value):
        return NOT_KNOWN
    least = 10**-decimals
    if 0 < abs(100 * value) < 0.5 * least:
        return f"{'−' if value < 0 else ''}< {least:g}%"
    return number(100 * value, decimals) + "%"


def estimate(value: Any, as_percent: bool = False, signed: bool = True) -> str:
    """``+0.36 [0.20, 0.52]``: a mean and its 95% interval, with decimals that suit the interval's width."""
    record = _mapping(value)
    mean, low, high = _point(record)
    if not is_number(mean):
        return NOT_KNOWN
    scale = 100 if as_percent else 1
    decimals = 1 if as_percent else 2
    if low is not None and high is not None:
        half = scale * abs(high - low) / 2
        decimals = next((d for limit, d in ((50, 0), (5, 1), (0.05, 2), (0.005, 3)) if half >= limit), 4 if half else 2)
        decimals = min(decimals, 1) if as_percent else decimals
        interval = f" [{_fixed(scale * low, decimals)}, {_fixed(scale * high, decimals)}]"
    else:
        interval = f" [{NOT_KNOWN}]"
    shown = _fixed(scale * mean, decimals)
    plus = "+" if signed and mean > 0 and any(digit in "123456789" for digit in shown) else ""
    return plus + shown + ("%" if as_percent else "") + interval


def with_error(value: Any) -> str:
    """``3.21 ± 0.12``: a mean and its standard error."""
    record = _mapping(value)
    error = record.get("standard_error")
    return number(record.get("mean")) + (f" ± {number(error)}" if is_number(error) else "")


def p_value(value: Any) -> str:
    return p_text(value) if is_number(value) else NOT_KNOWN


def duration(value: Any) -> str:
    """Seconds as seconds, minutes or hours."""
    if not is_number(value) or value < 0:
        return NOT_KNOWN
    if value < 99.5:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def _shown(value: Any) -> Any:
    """What `{{ value }}` writes: text without characters that HTML or UTF-8 forbid, and n/a for what is not known."""
    if isinstance(value, Markup):
        return value  # a macro of our template, whose parts went through here
    if value is None or isinstance(value, Undefined):
        return NOT_KNOWN
    if isinstance(value, float):
        return f"{value:g}" if is_number(value) else NOT_KNOWN
    return _UNPRINTABLE.sub("\ufffd", value if isinstance(value, str) else str(value))


def render(template: str, context: Mapping[str, Any]) -> str:
    """A template of this folder as a page: numbers by our filters, every text escaped."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, function in (("num", number), ("pct", percent), ("est", estimate), ("pm", with_error)):
        environment.filters[name] = function
    environment.filters.update(p=p_value, time=duration)
    environment.tests["number"] = is_number
    return environment.get_template(template).render(context)


# What is picked out of the run -----------------------------------------------------------------------------------


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()


def _in_order(names: Iterable[Any]) -> list[Any]:
    """Methods in the order of the paper, then the others as they came."""
    given = list(names)
    return [name for name in _ORDER if name in given] + [name for name in given if name not in _ORDER]


def _point(record: Any) -> Point:
    """Mean, low and high of an estimate; an interval that is not two numbers is not known."""
    fields = _mapping(record)
    found = fields.get("mean")
    mean = float(found) if is_number(found) else float("nan")
    ends = [end for end in _sequence(fields.get("ci95")) if is_number(end)]
    return (mean, ends[0], ends[1]) if len(ends) == 2 else (mean, None, None)


def _point_by_error(record: Any) -> Point:
    """Mean, and one standard error either way."""
    mean, _, _ = _point(record)
    error = _mapping(record).get("standard_error")
    return (mean, mean - error, mean + error) if is_number(error) else (mean, None, None)


def _key_figures(summary: Mapping[Any, Any], methods: Mapping[Any, Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """The few numbers to see first: what was asked, who judged, and the methods that stand out."""
    figures: list[dict[str, Any]] = []
    trained = {name: record for name, record in methods.items() if name != "reference"}

    def highest(key: str, label: str, show: Callable[[Any], str]) -> None:
        means = {name: _point(record.get(key))[0] for name, record in trained.items()}
        known = {name: mean for name, mean in means.items() if is_number(mean)}
        if known:
            name = max(known, key=lambda each: known[each])
            value, _, rest = show(trained[name].get(key)).partition(" ")
            figures.append({"label": label, "value": value, "rest": rest, "method": name})

    highest("advantage", "Highest advantage", estimate)
    highest("win_rate", "Highest win rate", lambda value: estimate(value, as_percent=True, signed=False))
    highest("kl_policy_ref", "Farthest from the reference, KL", with_error)
    prompts = summary.get("prompts")
    if is_number(prompts):
        split = {"test": "Test prompts", "validation": "Validation prompts"}.get(str(summary.get("split")), "Prompts")
        figures.append({"label": split, "value": f"{prompts:,}"})
    accuracy = _mapping(summary.get("judge")).get("heldout_accuracy")
    if is_number(accuracy):
        figures.append({"label": "Judge right on held-out pairs", "value": percent(accuracy)})
    return figures


def _ends(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A training record for the table: the first loss, and the last of everything."""

    def last(key: str) -> Any:
        return next((value for value in reversed(_sequence(record.get(key))) if is_number(value)), None)

    losses = [value for value in _sequence(record.get("loss_values")) if is_number(value)]
    return {
        "loss": record.get("loss"),
        "steps": last("steps"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "chosen_change": last("logps/chosen_change"),
        "margins": last("rewards/margins"),
        "level_change": last("level_change"),
        "kept": _mapping(record.get("kept")),
    }


def _card(sample: Mapping[Any, Any]) -> dict[str, Any]:
    """A sample for its card: the prompt, and who answered what with which score, the reference first."""
    responses = dict(_mapping(sample.get("responses")))
    if sample.get("reference") is not None:
        responses["reference"] = sample["reference"]
    scores = _mapping(sample.get("scores"))
    prompt = str(sample.get("prompt", ""))
    line = " ".join(prompt.split())
    return {
        "prompt": prompt,
        "opening": line if len(line) <= 160 else line[:159] + "…",
        "answers": [
            {"name": name, "text": responses[name], "score": scores.get(name)} for name in _in_order(responses)
        ],
    }


def _method_pictures(methods: Mapping[Any, Mapping[Any, Any]], palette: Palette) -> dict[str, str | None]:
    names = _in_order(methods)

    def rows(key: str) -> list[tuple[str, Point]]:
        return [(str(name), _point(methods[name].get(key))) for name in names]

    kls = [_point_by_error(methods[name].get("kl_policy_ref")) for name in names]
    both = [(name, kl, advantage) for kl, (name, advantage) in zip(kls, rows("advantage"), strict=True)]
    return {
        "win_rates": pictures.intervals(
            rows("win_rate"), palette, xlabel="win rate against the reference, ties half", zero=0.5, percent=True
        ),
        "advantages": pictures.intervals(
            rows("advantage"),
            palette,
            xlabel="advantage over the reference, units of reward",
            zero=0.0,
            second=dict(rows("advantage_equal_length")),
            legend=("as sampled", "at equal length"),
        ),
        "reward_and_kl": pictures.reward_and_kl(both, palette),
    }


def _training_pictures(training: Mapping[Any, Mapping[Any, Any]], palette: Palette) -> dict[str, str | None]:
    def curves(key: str) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
        order = _in_order(training)
        return [(str(n), _sequence(training[n].get("steps")), _sequence(training[n].get(key))) for n in order]

    return {
        "chosen": pictures.lines(curves("logps/chosen_change"), palette, ylabel="change of log π(chosen), nats"),
        "margins": pictures.lines(curves("rewards/margins"), palette, ylabel="margin of implicit rewards"),
        "level": pictures.lines(curves("level_change"), palette, ylabel="change of the level, nats"),
    }


def _member_pictures(
    members: Sequence[Mapping[Any, Any]], mean: Mapping[Any, Any], disagreement: Mapping[Any, Any]
) -> dict[str, str | None]:
    def curve(record: Mapping[Any, Any], name: str) -> tuple[str, Sequence[Any], Sequence[Any]]:
        bins = _mapping(record.get("calibration"))
        return (name, _sequence(bins.get("predicted")), _sequence(bins.get("observed")))

    names = [str(member.get("name", f"member {i}")) for i, member in enumerate(members)]
    by_length = [(n, record.get("length_correlation")) for n, record in zip(names, members, strict=True)]
    if mean:
        by_length.append(("mean of members", mean.get("length_correlation")))
    return {
        "calibration": pictures.calibration(
            [curve(member, name) for name, member in zip(names, members, strict=True)],
            mean=curve(mean, "mean of members") if mean else None,
        ),
        "length": pictures.intervals(
            [(name, (value, None, None)) for name, value in by_length if is_number(value)],
            Palette(()),
            xlabel="correlation of reward with length",
            zero=0.0,
        ),
        "spread": pictures.histogram(
            _sequence(disagreement.get("margin_std")), xlabel="spread of the members' margins on a pair"
        ),
        "correlation": pictures.correlations(
            [_sequence(row) for row in _sequence(disagreement.get("member_correlation"))], names
        ),
    }
