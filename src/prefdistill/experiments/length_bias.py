"""The paper's experiment: train on pairs whose labels prefer the longer response more or less often than they should.

Fisch et al., arXiv 2405.19316, section 5. For every rho, D_rho is a resample of the training pairs in which a fraction
rho prefers the longer response, all of one size; the test prompts and the judge stay unbiased. A reward model is
trained on every D_rho. d-DPO and dp-DPO distil the one of their own D_rho; e-DPO and hull-DPO are pessimistic over all.

What is common is done once: reference log-probs and features for all runs, a reward model for every rho that holds it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill import pipeline
from prefdistill.config import RunConfig
from prefdistill.data.bias import common_size, longer_chosen
from prefdistill.data.table import in_split
from prefdistill.errors import ConfigError
from prefdistill.evaluation import inference, statistics
from prefdistill.stages.prepare import encode_pairs, read_pairs
from prefdistill.stages.run import Run

VERSION = 1
METHODS = ("dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo", "hull-dpo")
RHOS = (0.2, 0.4, 0.5, 0.6, 0.8)
OWN_REWARD = ("d-dpo", "dp-dpo")  # distil the reward model of their own D_rho only
BASELINE = "dpo"


@dataclass(frozen=True)
class Sweep:
    """What to train: every method on every D_rho, for every seed.

    Attributes:
        config: of each run; its output_dir is the sweep's, its methods, dataset.rho and reward models are set here.
        member_rhos: the rho whose reward models make the ensemble, those of `rhos` always among them (None: no more).
    """

    config: RunConfig
    rhos: tuple[float, ...] = RHOS
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    member_rhos: tuple[float, ...] | None = None

    @property
    def ensemble(self) -> tuple[float, ...]:
        """Every rho that has a reward model."""
        return tuple(sorted({*self.rhos, *(self.member_rhos or ())}))

    def check(self) -> None:
        """Raises ConfigError, naming the option, for a sweep that cannot be run."""
        if BASELINE not in self.methods:
            raise ConfigError(f"--methods must hold {BASELINE}, against which the others are tested")
        for name, given in (("--rhos", self.rhos), ("--methods", self.methods), ("--seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{name} must be one or more different values, got {', '.join(map(str, given))}")
        if self.config.dataset.rho is not None:
            raise ConfigError("dataset.rho is what the experiment varies; give --rhos")
        replace(self.config, methods=list(self.methods)).check()


def run_sweep(sweep: Sweep) -> dict[str, Any]:
    """Trains and evaluates what is missing, and returns the table of `collect`."""
    sweep.check()
    root = Path(sweep.config.output_dir)
    rate, pairs = _natural(sweep)
    for seed in sweep.seeds:
        # The reward models of all rho first: every run is pessimistic over all of them.
        for rho in sweep.ensemble:
            pipeline.run(_config(sweep, seed, rho, pairs, others=False), until="reward")
        for rho in sweep.rhos:
            pipeline.run(_config(sweep, seed, rho, pairs, others=True))
    return collect(root, sweep, natural_rate=rate, pairs=pairs)


def run_folder(root: Path, seed: int, rho: float) -> Path:
    return root / f"seed-{seed}" / f"rho-{rho:g}"


def _config(sweep: Sweep, seed: int, rho: float, pairs: int, *, others: bool) -> RunConfig:
    root = Path(sweep.config.output_dir)
    config = copy.deepcopy(sweep.config)
    config.output_dir = str(run_folder(root, seed, rho))
    config.methods = list(sweep.methods)
    config.seed = seed
    config.dataset.rho, config.dataset.rho_pairs = rho, pairs
    config.score.columns = config.score.columns or str(root / "columns")
    config.reward.members, config.reward.resample = 1, "all"
    if others:
        config.reward.pretrained = [
            str(run_folder(root, seed, other) / "reward" / "member-0") for other in sweep.ensemble if other != rho
        ]
        own = {m: {"members": [0]} for m in OWN_REWARD if m in sweep.methods}
        config.distill.per_method = {
            m: {**config.distill.per_method.get(m, {}), **own.get(m, {})} for m in [*config.distill.per_method, *own]
        }
    return config


def _natural(sweep: Sweep) -> tuple[float, int]:
    """How often the data's own training labels prefer the longer response, and the size that all D_rho can have."""
    job = Run(sweep.config)
    groups, _ = encode_pairs(job, read_pairs(job)[0])
    signs = longer_chosen(in_split(groups, "train"))
    return float((signs > 0).sum() / max(1, (signs != 0).sum())), common_size(signs, sweep.ensemble)


# -- the table ---------------------------------------------------------------------------------------------------------


def collect(root: Path, sweep: Sweep, *, natural_rate: float, pairs: int) -> dict[str, Any]:
    """The sweep's figures, as plain JSON values: a row for every rho and method, over all seeds.

    Scores are averaged over seeds prompt by prompt, then prompts are resampled, so that an interval holds the prompts'
    share of chance; `by_seed` shows the seeds' own. Wald tests compare each method with DPO on the same prompts, with
    Holm's correction over the methods of one rho.
    """
    rows: list[dict[str, Any]] = []
    for rho in sweep.rhos:
        summaries, scores = [], []
        for seed in sweep.seeds:
            folder = run_folder(root, seed, rho) / "evaluation"
            summaries.append(_read(folder / "summary.json")["methods"])
            found = _read(folder / "scores.json")
            scores.append({m: np.array(s) for m, s in found.items()})
        mean = {m: np.mean([s[m].mean(1) for s in scores], axis=0) for m in ("reference", *sweep.methods)}
        prompts = np.arange(len(mean["reference"]))
        of_rho: list[dict[str, Any]] = []
        for method in sweep.methods:
            advantage = statistics.cluster_mean(mean[method] - mean["reference"], prompts)
            won = np.mean([_won(s[method], s["reference"], sweep.config.evaluate.tie_margin) for s in scores], axis=0)
            against = inference.wald_test(mean[method] - mean[BASELINE], prompts) if method != BASELINE else None
            of_rho.append(
                {
                    "rho": rho,
                    "method": method,
                    "advantage": advantage.as_dict(),
                    "win_rate": statistics.cluster_mean(won, prompts).as_dict(),
                    "by_seed": [s[method]["advantage"]["mean"] for s in summaries],
                    "against_dpo": None if against is None else against.as_dict(),
                    **{name: _over(summaries, method, name) for name in _AVERAGED},
                }
            )
        tested = [r for r in of_rho if r["against_dpo"] and r["against_dpo"]["p_value"] is not None]
        for row, p in zip(
            tested, inference.holm([r["against_dpo"]["p_value"] for r in tested]) if tested else [], strict=True
        ):
            row["against_dpo"]["p_holm"] = float(p)
        rows += of_rho
    return {
        "version": VERSION,
        "rhos": list(sweep.rhos),
        "member_rhos": list(sweep.ensemble),
        "methods": list(sweep.methods),
        "seeds": list(sweep.seeds),
        "natural_rate": natural_rate,
        "pairs": pairs,
        "prompts": len(prompts),
        "rows": rows,
        "over_rho": {m: _over_rho([r for r in rows if r["method"] == m]) for m in sweep.methods},
        "members": {str(rho): _members(root, sweep, rho) for rho in sweep.rhos},
    }


_AVERAGED = ("advantage_equal_length", "kl_policy_ref", "length_mean", "chosen_logp_change", "truncated")


def _won(method: np.ndarray, reference: np.ndarray, tie_margin: float) -> np.ndarray:
    """Share of wins a prompt [P], ties half, of scores [P, S] that meet each of [P, R]."""
    gap = method[:, :, None] - reference[:, None, :]
    out: np.ndarray = np.mean(statistics.outcomes(gap, tie_margin), axis=(1, 2))
    return out


def _over_rho(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a method is worth whatever the bias: its least and its mean advantage, and how far its length goes."""
    advantages, lengths = [r["advantage"]["mean"] for r in rows], [r["length_mean"] for r in rows]
    return {
        "least_advantage": min(advantages),
        "mean_advantage": float(np.mean(advantages)),
        "length_range": max(lengths) - min(lengths),
    }


def _over(summaries: Sequence[dict[str, Any]], method: str, name: str) -> float | None:
    """Mean over seeds of a figure; of an estimate its mean."""
    values = [s[method][name] for s in summaries]
    numbers = [v["mean"] if isinstance(v, dict) else v for v in values]
    return None if any(v is None for v in numbers) else float(np.mean(numbers))


def _members(root: Path, sweep: Sweep, rho: float) -> dict[str, float]:
    """Held-out figures of the reward model that was trained on D_rho, on the unbiased test pairs; means over seeds."""
    found = []
    for seed in sweep.seeds:
        path = run_folder(root, seed, rho) / "evaluation" / "ensemble.json"
        members = _read(path).get("members") if path.exists() else None
        if members:
            found.append(members[0])
    names = ("accuracy", "log_loss", "length_correlation")
    return {n: float(np.mean([m[n] for m in found])) for n in names if found and all(m[n] is not None for m in found)}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
