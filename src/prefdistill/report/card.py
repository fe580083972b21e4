"""A policy's model card: data, method, figures and licence, in the form that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from prefdistill.data.sources import looks_like_hub_id

BODY = """---
{{ card_data }}
---

# {{ title }}

A policy trained with [prefdistill](https://arxiv.org/abs/2405.19316) {{ version }} by `{{ method }}`{{ loss_note }},
from `{{ base }}`, on {{ pairs }} preference pairs over {{ prompts }} prompts of {{ data }}.

## How it compares with the policy it started from

{{ verdict }}

| | {{ split }} prompts: {{ n_prompts }}, judge: {{ judge }} |
|---|---|
{% for name, value in figures -%}
| {{ name }} | {{ value }} |
{% endfor %}
Intervals are 95%, by bootstrap over whole prompts. Advantage: the judge's score of a response less the mean score of
the starting policy's responses to the same prompt. What chance alone does, the starting policy against itself:
advantage {{ chance }}.
{% if warnings %}
## What to be careful of

{% for warning in warnings -%}
- {{ warning }}
{% endfor %}{% endif %}
## How it was made

```yaml
{{ options }}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

policy = AutoModelForCausalLM.from_pretrained(FOLDER_OR_ID)
tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_ID)
```
"""


def card_of(
    *,
    name: str,
    method: str,
    base: str,
    data: str,
    licence: str | None,
    version: str,
    summary: Mapping[str, Any],
    counts: Mapping[str, Any],
    options: str,
) -> str:
    """The text of a README.md.

    Args:
        name: of the method or variant in `summary`.
        method: its row in the table of methods.
        base, data: folders or hub ids; only hub ids go into the card's metadata.
        licence: a hub licence name; None leaves it open.
        summary: evaluation/summary.json.
        counts: data/data.json.
        options: YAML of what was asked for.
    """
    figures = summary["methods"][name]
    on_hub = lambda text: looks_like_hub_id(text) and "/" in text and not Path(text).exists()  # noqa: E731
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if on_hub(base) else None,
        datasets=[data] if on_hub(data) else None,
        license=licence,
        tags=["prefdistill", "preference-optimization", method],
    )
    card = ModelCard.from_template(
        metadata,
        template_str=BODY,
        title=name,
        version=version,
        method=method,
        loss_note="" if name == method else f" (called `{name}` in its run)",
        base=_shown(base),
        data=f"`{_shown(data)}`",
        pairs=counts["pairs"],
        prompts=sum(counts["prompts"].values()),
        split=summary["split"],
        n_prompts=summary["prompts"],
        judge=_cell(summary["judge"]["name"]),
        verdict=summary["verdict"],
        figures=[
            ("advantage", _estimate(figures["advantage"], "{:+.2f}")),
            ("win rate", _estimate(figures["win_rate"], "{:.0%}")),
            ("KL to the starting policy, nats a response", _estimate(figures["kl_policy_ref"], "{:.2f}")),
            ("tokens a response", _number(figures["length_mean"], "{:.1f}")),
            ("log-prob of chosen responses, change in nats", _number(figures["chosen_logp_change"], "{:+.2f}")),
        ],
        chance=_estimate(summary["methods"]["reference"]["advantage"], "{:+.2f}"),
        warnings=[f"{w['text']} {w['what_to_do']}" for w in summary["warnings"]],
        options=options.strip(),
    )
    return str(card)


def _shown(place: str) -> str:
    """A hub id whole, of a path its last part: folders of a machine are nobody's business."""
    return Path(place).name if Path(place).is_absolute() or Path(place).exists() else place


def _cell(text: str) -> str:
    return " ".join(_shown(text).replace("|", "\\|").split())


def _number(value: float | None, form: str) -> str:
    return "not known" if value is None else form.format(value)


def _estimate(estimate: Mapping[str, Any] | None, form: str) -> str:
    if estimate is None or estimate["mean"] is None:
        return "not known"
    ends = [_number(end, form) for end in estimate["ci95"]]
    return f"{form.format(estimate['mean'])} [{ends[0]}, {ends[1]}]"
