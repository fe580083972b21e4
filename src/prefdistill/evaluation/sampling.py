"""Sampling from a policy: a prompt is read once for all its samples, and finished rows leave the batch.

Every sample has its own stream of random numbers, made from (seed, prompt, sample): what is drawn for a prompt does
not depend on which other prompts share its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prefdistill.models.decoding import Decoder, decoder
from prefdistill.models.inference import inference


@dataclass(frozen=True)
class Sample:
    """Generated ids, the end token included where one was generated (`finished`)."""

    ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def sample(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    *,
    n: int,
    end_ids: Sequence[int],
    options: SamplingOptions,
    precision: str = "float32",
    token_budget: int = 8192,
    keys: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
    known: Mapping[int, list[Sample]] | None = None,
    keep: Callable[[dict[int, list[Sample]]], None] = lambda drawn: None,
    share: tuple[int, int] = (0, 1),
) -> list[list[Sample]]:
    """`n` samples for each prompt, in the prompts' order.

    Args:
        model: a causal language model of transformers.
        prompts: prompt ids.
        end_ids: tokens that end a response.
        token_budget: bound on prompt and response tokens held at a time, padding included; a prompt counts once where
            the model can keep its keys once.
        keys: a number for each prompt that its random numbers hang on (its place by default).
        progress: told how many prompts were done, a batch at a time.
        known: samples by the prompt's place that an earlier call with the same arguments drew; batches are cut as
            without them, so that what is drawn stays the same to the bit.
        keep: given the samples of every batch that is drawn, by the prompt's place.
        share: (r, n): only batches r, r + n, ... are drawn, the prompts of others get no samples.
    """
    known = known or {}
    keys = range(len(prompts)) if keys is None else keys
    if all(i in known for i in range(len(prompts))):
        progress(len(prompts))
        return [known[i] for i in range(len(prompts))]
    out: list[list[Sample]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    made = decoder(model)
    batches = _batches(prompts, lambda longest: made.held(longest, n, options.max_new_tokens), token_budget)
    with inference(model, precision):
        for number, rows in enumerate(batches):
            if number % share[1] == share[0]:
                if not all(i in known for i in rows):
                    noise = np.stack(
                        [
                            np.random.default_rng([options.seed, keys[i], s]).random(options.max_new_tokens)
                            for i in rows
                            for s in range(n)
                        ]
                    )
                    drawn = _sample_batch(made, [prompts[i] for i in rows], n, set(end_ids), options, noise)
                    batch = {i: drawn[j * n : (j + 1) * n] for j, i in enumerate(rows)}
                    keep(batch)
                else:
                    batch = {i: known[i] for i in rows}
                for i, samples in batch.items():
                    out[i] = samples
            progress(len(rows))
    model.train(training)
    return out


def _batches(prompts: Sequence[tuple[int, ...]], held: Callable[[int], int], token_budget: int) -> list[list[int]]:
    """Places of prompts, longest first, whose tokens, each as the longest, fit into the budget; one where none do."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches, start = [], 0
    while start < len(order):
        fits = max(1, token_budget // held(len(prompts[order[start]])))
        batches.append(order[start : start + fits])
        start += fits
    return batches


def _sample_batch(
    made: Decoder,
    prompts: Sequence[tuple[int, ...]],
    n: int,
    end_ids: set[int],
    options: SamplingOptions,
    noise: np.ndarray,
) -> list[Sample]:
    """`n` responses for each prompt, a prompt's beside each other, from uniform numbers [rows, max_new_tokens]."""
    decoding = made.start(prompts, n, options.max_new_tokens)
    generated: list[list[int]] = [[] for _ in noise]
    ended = [False] * len(generated)
    alive = list(range(len(generated)))
    for step in range(options.max_new_tokens):
        device = decoding.logits.device
        tokens = choose(decoding.logits.float(), torch.from_numpy(noise[alive, step]).to(device), options)
        stay = []
        for place, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            generated[row].append(token)
            if token in end_ids:
                ended[row] = True
            else:
                stay.append(place)
        if not stay or step + 1 == options.max_new_tokens:
            break
        if len(stay) < len(alive):
            kept = torch.tensor(stay, device=device)
            decoding.keep(kept)
            tokens, alive = tokens[kept], [alive[s] for s in stay]
        decoding.next(tokens)
    return [Sample(tuple(g), e) for g, e in zip(generated, ended, strict=True)]


def choose(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """Tokens [B] from logits [B, V] by inverse transform of uniform numbers [B] in [0, 1)."""
    if options.temperature == 0:
        return logits.argmax(-1)
    probs = (logits / options.temperature).softmax(-1).double()
    if options.top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        # The smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= options.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
    cumulative = probs.cumsum(-1)
    return torch.searchsorted(cumulative, (uniform[:, None] * cumulative[:, -1:]).contiguous(), right=True)[
        :, 0
    ].clamp_max(logits.shape[-1] - 1)
