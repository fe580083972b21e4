"""DPO's degeneracy (paper, Proposition 1) as a training shows it: chosen log-probs fall while margins grow."""

from __future__ import annotations

from collections.abc import Sequence

FALL_NATS = 1.0  # a chosen response made less than 0.37 times as likely
LOGS_TO_JUDGE = 4  # halves of fewer log lines are noise


def degenerates(history: Sequence[tuple[float, float]]) -> bool:
    """Whether (chosen log-prob change, margin) over the log lines shows DPO's degeneracy (Proposition 1).

    The later half's mean chosen log-prob lies at least FALL_NATS below the start and below the earlier half's, while
    the margin is positive and larger than in the earlier half.
    """
    if len(history) < LOGS_TO_JUDGE:
        return False
    half = len(history) // 2
    mean = lambda part, i: sum(x[i] for x in part) / len(part)  # noqa: E731
    early, late = history[:half], history[half:]
    falls = mean(late, 0) <= -FALL_NATS and mean(late, 0) < mean(early, 0)
    return falls and mean(late, 1) > max(0.0, mean(early, 1))
