"""What a run samples with: a policy in memory, or vLLM on its folder, as sample.engine says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from prefdistill.evaluation.engine import VLLMEngine
from prefdistill.evaluation.sampling import Sample, sample
from prefdistill.models.loading import load_policy, plain_folder
from prefdistill.stages.run import Run

Sampler = nn.Module | VLLMEngine


@contextlib.contextmanager
def sampler(run: Run, policy: str | nn.Module) -> Iterator[Sampler]:
    """What draws from a policy, a folder or hub id or in memory, while the block lasts; no memory is held after it.

    Raises:
        ConfigError: the policy cannot be loaded.
    """
    options, trust = run.config.sample, run.config.trust_remote_code
    if options.engine == "own":
        yield policy if isinstance(policy, nn.Module) else load_policy(policy, trust_remote_code=trust).to(run.device)
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(plain_folder(policy, trust_remote_code=trust))
        del policy  # two copies of a policy need not lie on one GPU
        engine = VLLMEngine(
            folder, precision=run.precision, arguments=options.engine_arguments, trust_remote_code=trust
        )
        yield stack.enter_context(engine)


def draw_from(
    policy: Sampler,
    prompts: Sequence[tuple[int, ...]],
    *,
    precision: str,
    token_budget: int,
    share: tuple[int, int],
    **arguments: Any,
) -> list[list[Sample]]:
    """`sampling.sample` by whichever of the two; the precision, batches and processes of an engine are its own."""
    if isinstance(policy, VLLMEngine):
        return policy.sample(prompts, **arguments)
    return sample(policy, prompts, precision=precision, token_budget=token_budget, share=share, **arguments)
