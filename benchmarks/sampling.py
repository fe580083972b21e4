"""Responses for an evaluation: our sampler against transformers.generate; a step is all of them.

Weights are random, so every thirtieth word ends a response: lengths differ as those of a trained policy do.
"""

from __future__ import annotations

import torch

from benchmarks.shapes import DTYPES, SIZES, SPECIALS, Prompt, policy_of
from benchmarks.steps import Step
from prefdistill.evaluation.sampling import SamplingOptions, sample

TOKEN_BUDGET = 24_576  # of keys and values; the stage's default
ENDS_EVERY = 30


def _ends(size: str) -> tuple[int, ...]:
    return tuple(range(len(SPECIALS), SIZES[size]["vocab_size"], ENDS_EVERY))


def ours(prompts: list[Prompt], *, size: str, precision: str, samples: int, max_new_tokens: int) -> Step:
    """As the stages `evaluate:METHOD` draw them: a prompt is read once for its samples, finished rows leave."""
    policy = policy_of(size).eval()

    def step() -> float:
        drawn = sample(
            policy,
            [p.ids for p in prompts],
            n=samples,
            end_ids=_ends(size),
            options=SamplingOptions(max_new_tokens),
            precision=precision,
            token_budget=TOKEN_BUDGET,
        )
        return float(sum(len(s.ids) for d in drawn for s in d))

    return step


def generate(
    prompts: list[Prompt], *, size: str, precision: str, samples: int, max_new_tokens: int, batch_rows: int
) -> Step:
    """transformers.generate over rows of repeated prompts, `batch_rows` at once, on weights in the precision."""
    policy = policy_of(size).to(DTYPES[precision]).eval()
    rows = [p.ids for p in prompts for _ in range(samples)]

    def step() -> float:
        torch.manual_seed(0)
        total = 0
        for start in range(0, len(rows), batch_rows):
            ids = torch.tensor(rows[start : start + batch_rows], device=policy.device)
            out = policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(_ends(size)),
                pad_token_id=0,
            )
            total += int((out[:, ids.shape[1] :] != 0).sum())
        return float(total)

    return step
