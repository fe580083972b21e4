"""The lab's numbers: the paper's four points, each worked out exactly in small worlds."""

from __future__ import annotations

from typing import Any

import torch

from prefdistill.theory import degeneracy, distillation, paths, pessimism
from prefdistill.theory.world import random_world

VERSION = 1
BETAS = (0.01, 0.1, 1.0, 5.0)
PATH_WORLDS = 5


def numbers(seed: int = 0) -> dict[str, Any]:
    """All that the lab shows, as plain JSON values; the same for the same seed.

    The scalars, which the tests hold to account:

    * ``degenerate_max_prob_chosen``: largest probability of a chosen response at DPO's infimum, over beta;
      ``degenerate_max_loss``: DPO's loss there.
    * ``regularised_min_ratio``: least pi(y_w) / pi_ref(y_w) at the minimum of a regularised loss, by method.
    * ``distillation_gap``: largest distance of a probability of d-DPO's minimiser from RLHF's optimum, full support.
    * ``pessimism_gap``: largest difference of Theorem 2's two sides over a convex set of rewards.
    * ``hull_gap``: largest difference of the mixture's worst-case advantage from the exact optimum, finite ensembles;
      ``least_kl_shortfall``, ``mean_reward_shortfall``: mean distance from that optimum of the member of least forward
      KL (a plain min over members) and of the mean reward.
    """
    threads = torch.get_num_threads()
    # Tensors this small lose by being shared out, tenfold where other work has the cores.
    torch.set_num_threads(1)
    try:
        return _numbers(seed)
    finally:
        torch.set_num_threads(threads)


def _numbers(seed: int) -> dict[str, Any]:
    world = random_world(seed, prompts=6, responses=20, noise=0.3)
    degenerate = degeneracy.degenerate_optima(world, BETAS)
    full = distillation.full_support(seed, BETAS[1:])
    convex = pessimism.convex_set(seed)
    finite = pessimism.finite_ensemble(seed)
    per_world = [paths.paths(seed + w) for w in range(PATH_WORLDS)]
    return {
        "version": VERSION,
        "seed": seed,
        "path_worlds": PATH_WORLDS,
        "degenerate_max_prob_chosen": max(r["max_prob_chosen"] for r in degenerate),
        "degenerate_max_loss": max(r["dpo_loss"] for r in degenerate),
        "regularised_min_ratio": degeneracy.finite_optima(world, beta=0.5, alpha=0.1),
        "distillation_gap": max(r["gap"] for r in full),
        "pessimism_gap": max(r["gap"] for r in convex),
        "hull_gap": max(abs(r["hull"] - r["exact"]) for r in finite),
        "least_kl_shortfall": sum(r["exact"] - r["least_kl_member"] for r in finite) / len(finite),
        "mean_reward_shortfall": sum(r["exact"] - r["mean_reward"] for r in finite) / len(finite),
        "degenerate": degenerate,
        "full_support": full,
        "shrinking_support": distillation.shrinking_support(seed, beta=0.5),
        "convex": convex,
        "finite": finite,
        "few_samples": pessimism.few_samples(seed),
        "paths": {
            method: {
                name: [sum(p[method][name][i] for p in per_world) / PATH_WORLDS for i in range(len(path["step"]))]
                for name in path
            }
            for method, path in per_world[0].items()
        },
    }
