"""Exact pessimism over an ensemble of reward columns: members mixed before training, see `prefdistill.ensemble`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prefdistill.ensemble import Floats, Mixture, advantages, hull_mixture, tilted
from prefdistill.errors import ConfigError

if TYPE_CHECKING:
    from prefdistill.training.distill import DistillExample

HULLS = ("hull", "hull-per-prompt")


def mixture_of(examples: Sequence[DistillExample], *, beta: float, per_prompt: bool) -> Mixture:
    """The mixture of the members that is the worst case over their hull, from their scores of the reference's samples.

    Raises:
        ConfigError: no example has responses that are known to be drawn from the reference.
    """
    scores, reference = _scores(examples)
    return hull_mixture(scores, reference, beta=beta, per_prompt=per_prompt)


def mixed(examples: Sequence[DistillExample], mixture: Mixture) -> list[DistillExample]:
    """The examples with one reward in place of K: the mixture's.

    Weights of every prompt's own belong to the examples that have samples of the reference, in order; the others take
    their mean.
    """
    per_prompt = mixture.weights.ndim == 2
    own = iter(mixture.weights) if per_prompt else None
    mean = mixture.weights.mean(0) if per_prompt else mixture.weights
    out = []
    for e in examples:
        weights = next(own) if own is not None and e.from_reference else mean
        out.append(replace(e, rewards=(tuple((weights @ np.array(e.rewards)).tolist()),)))
    return out


def promises(examples: Sequence[DistillExample], mixture: Mixture, *, beta: float) -> dict[str, Any]:
    """What members think of RLHF's optimum for the mixture, for their mean, and for the best single member.

    Each is the reference's own samples reweighted by exp(r / beta), so that no policy is needed; a policy that was
    trained may fall short of it. Advantages in units of reward, the KL term taken off.

    Returns:
        ``weights`` [K] (their mean over prompts where every prompt has its own), ``value``, ``samples`` (mean number a
        prompt), and ``policies``: name -> advantages ``by_member`` [K] and ``worst_case``.
    """
    scores, reference = _scores(examples)
    per_prompt = mixture.weights.ndim == 2
    weights = mixture.weights if per_prompt else np.broadcast_to(mixture.weights, (scores.shape[1], len(scores)))
    rewards = {"mixture": np.einsum("nk,kns->ns", weights, scores), "mean of the members": scores.mean(0)}
    rewards |= {f"member {k} alone": r for k, r in enumerate(scores)}
    policies = {}
    for name, reward in rewards.items():
        by_member = advantages(tilted(reference, reward, beta), scores, reference, beta=beta)
        policies[name] = {"by_member": by_member.tolist(), "worst_case": float(by_member.min())}
    return {
        "per_prompt": per_prompt,
        "weights": weights.mean(0).tolist(),
        "value": mixture.value,
        "beta": beta,
        "samples": float((reference > 0).sum(1).mean()),
        "prompts": scores.shape[1],
        "policies": policies,
    }


def _scores(examples: Sequence[DistillExample]) -> tuple[Floats, Floats]:
    """Members' scores [K, N, S] of the reference's samples, and the samples' probabilities [N, S], padded with 0."""
    known = [e for e in examples if e.from_reference]
    if not known:
        raise ConfigError(
            "pessimism over the hull needs responses drawn from the reference, and no example has any; sample some "
            "(sample.reference_per_prompt: 4) or say that the pairs' own were (dataset.drawn_from_reference: true)"
        )
    widest = max(len(e.from_reference) for e in known)
    scores = np.zeros((len(known[0].rewards), len(known), widest))
    reference = np.zeros((len(known), widest))
    for n, e in enumerate(known):
        count = len(e.from_reference)
        scores[:, n, :count] = np.array(e.rewards)[:, list(e.from_reference)]
        reference[n, :count] = 1 / count
    return scores, reference
