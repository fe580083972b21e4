"""Which tokens a reward model reads: the policy's where their tokenizers agree, else its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefdistill.data.on_disk import View
from prefdistill.data.table import PromptGroup
from prefdistill.data.text_pairs import PairEncoder
from prefdistill.data.tokenise import Encoder
from prefdistill.data.tree import Tree
from prefdistill.errors import ConfigError, DataError
from prefdistill.evaluation.judges import is_oracle
from prefdistill.models.loading import generation_ends, load_config, load_tokenizer, positions, reads_text_pairs
from prefdistill.stages.run import Run


def training_facts(folder: str) -> dict[str, Any]:
    """What was written down when a reward model was trained here; empty for any other one."""
    path = Path(folder) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def encoder_of(run: Run, name: str) -> Encoder | PairEncoder:
    """The encoder of a reward model or of the base of one, the same in training and in scoring; made once a run.

    The run's own where the tokenizer reads all texts alike; else the model's tokens, with the run's bound on prompts;
    text pairs where the model is an encoder.
    """
    if name not in run.encoders:
        run.encoders[name] = _make_encoder(run, name)
    return run.encoders[name]


def _make_encoder(run: Run, name: str) -> Encoder | PairEncoder:
    facts = training_facts(name)
    if name == run.reference or facts.get("tokenizer") == run.tokenizer_fingerprint:
        return run.encoder
    trust, bounds = run.config.trust_remote_code, run.config.dataset
    if reads_text_pairs(name, trust_remote_code=trust):
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        return PairEncoder(
            tokenizer,
            max_tokens=min(int(tokenizer.model_max_length), positions(load_config(name, trust_remote_code=trust))),
            max_prompt_tokens=bounds.max_prompt_tokens,
            max_response_tokens=bounds.max_response_tokens,
        )
    ends = tuple(facts["end_ids"]) if "end_ids" in facts else generation_ends(name)
    own = Encoder(
        load_tokenizer(name, trust_remote_code=trust),
        max_prompt_tokens=bounds.max_prompt_tokens,
        end_ids=ends,
    )
    return run.encoder if _read_alike(own, run.encoder) else own


def _read_alike(a: Encoder, b: Encoder) -> bool:
    return a.prefix_ids == b.prefix_ids and a.end_ids == b.end_ids and _made_of(a.tokenizer) == _made_of(b.tokenizer)


def _made_of(tokenizer: Any) -> tuple[Any, ...]:
    """All that decides how it encodes; what only pads or cuts a batch is left out."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        made: Any = {k: v for k, v in parts.items() if k not in ("padding", "truncation")}
    else:
        made = tokenizer.get_vocab()
    return made, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id


def check_readers(run: Run, groups: Iterable[PromptGroup]) -> None:
    """Asks the tokenizers of the judge and of reward models for one prompt of every order of roles.

    A chat template that knows no system turn, or none at all, would otherwise be found out after all policies.

    Raises:
        DataError, ConfigError: one of them cannot read a prompt; the message names the model and the row.
    """
    config = run.config
    names = [*config.reward.pretrained, *config.reward.models] if config.needs_rewards else []
    if config.evaluate.judge != "heldout" and not is_oracle(config.evaluate.judge):
        names.append(config.evaluate.judge)
    others = {name: encoder for name in names if (encoder := encoder_of(run, name)) is not run.encoder}
    seen: set[tuple[str, ...] | None] = set()
    for group in groups if others else ():
        prompt = group.prompt
        roles = None if isinstance(prompt, str) else tuple(message["role"] for message in prompt)
        if roles in seen:
            continue
        seen.add(roles)
        for name, encoder in others.items():
            try:
                encoder.prompt_ids(prompt)
                encoder.response_ids(prompt, group.responses[0].text)
            except (DataError, ConfigError) as error:
                raise type(error)(f"{group.name}: the reward model {name!r} cannot read it: {error}") from error


def member_trees(run: Run, groups: Sequence[PromptGroup], encoder: Encoder | PairEncoder) -> Sequence[Tree]:
    """The prompts' trees in a member's own tokens, which are the policy's unless its tokenizer is another one."""
    if encoder is run.encoder:
        return View(groups, lambda g: g.tree)
    own = encoder.without_response_bound()
    return View(groups, lambda g: _tree(own, g, [r.text for r in g.responses], [r.finished for r in g.responses]))


def response_trees(
    encoder: Encoder | PairEncoder,
    groups: Sequence[PromptGroup],
    texts: Sequence[Sequence[Any]],
    finished: Sequence[Sequence[bool]],
) -> list[Tree]:
    """Responses given as text, in the tokens of a reward model; one tree a prompt, in the texts' order, none left out.

    Longer ones than dataset.max_response_tokens too: a sample is judged as it is.
    """
    own = encoder.without_response_bound()
    return [_tree(own, *of_prompt) for of_prompt in zip(groups, texts, finished, strict=True)]


def _tree(encoder: Encoder | PairEncoder, group: PromptGroup, texts: Sequence[Any], finished: Sequence[bool]) -> Tree:
    # A sample cut off before its first letter has no token to stand on; it is judged as one that ended at once.
    known = [
        encoder.response_ids(group.prompt, t, finished=f) or encoder.response_ids(group.prompt, t) or ()
        for t, f in zip(texts, finished, strict=True)
    ]
    return Tree(encoder.prompt_ids(group.prompt).ids, tuple(known))
