"""The precision and the setting that a side is fastest in: tried alone before sides are compared."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.rows import TRIAL_SHARE
from benchmarks.worker import Fallen, worker

PRECISIONS = ("float32", "bfloat16")
TRIAL_STEPS = 3
PATIENCE = 100.0  # seconds of a trial's steps after which no other is begun
NEAR = 1.2  # times the fastest peer's seconds at all of the work: alone, the order can be another than in turn
CLOSE = 1.3  # times the fastest peer's seconds in a trial of less work: the order can be another at all of it


class Trial(NamedTuple):
    """Seconds of a side's step, infinite where memory falls short, and the most gigabytes that it held."""

    seconds: float
    peak: float | None


def trials(row: Any, side: str, sizes: Any, precision: str | None) -> dict[str, float]:
    """Seconds of a side's step of less work in each precision, or in this one; infinite where memory falls short."""
    if not row.whole:
        sizes = replace(sizes, batch_prompts=max(1, sizes.batch_prompts // TRIAL_SHARE))
    asked = PRECISIONS if precision is None else (precision,)
    return {tried: trial(row, side, tried, sizes, less=True).seconds for tried in asked}


def trial(row: Any, side: str, precision: str, sizes: Any, *, less: bool) -> Trial:
    """The least of some steps after the first, which waits for memory; of one so long that this is nothing, its own."""
    try:
        with worker(row.name, side, precision, sizes, trial=less) as alone:
            # The least: other work on the machine is not to choose between a peer's settings.
            seconds = [alone.step()]
            while len(seconds) <= TRIAL_STEPS and sum(seconds) < PATIENCE:
                seconds.append(alone.step())
            return Trial(min(seconds[1:] or seconds), alone.peak)
    except Fallen:
        return Trial(math.inf, None)


def at_all_work(
    row: Any, tried: Mapping[str, tuple[str, float]], sizes: Any, also: Collection[str] = ()
) -> dict[str, Trial]:
    """Trials at all of a row's work of those peers that less work hardly tells apart, from precisions and trials.

    With gradient checkpointing TRL's step is the faster one of the two for one prompt and the slower one for four; a
    batch of eight rows is the same as one of sixteen where there are eight.

    Args:
        also: peers that are tried at all of the work in any case, for their memory.
    """
    least = min(took for _, took in tried.values())
    close = [s for s, (_, took) in tried.items() if took <= CLOSE * least]
    asked = {*(close if len(close) > 1 else ()), *also}
    return {s: trial(row, s, tried[s][0], sizes, less=False) for s in tried if s in asked}


def by_speed(tried: Mapping[str, tuple[str, float]], again: Mapping[str, float]) -> list[str]:
    """Peers, the fastest first: those tried at all of the work before the others."""
    return sorted(tried, key=lambda s: (s not in again, again.get(s, tried[s][1])))


def groups_of(order: list[str], again: Mapping[str, float]) -> list[list[str]]:
    """Which peers are to take their steps in turn with ours: the first two where they are near, else one at a time.

    Those that come later are for where memory does not hold the ones before.

    Args:
        order: the peers, the fastest first.
        again: their seconds at all of the work, where they were tried at it.
    """
    alone = [[peer] for peer in order]
    near = len(order) > 1 and order[1] in again and again[order[1]] <= NEAR * again[order[0]]
    return [order[:2], *alone] if near else alone
