"""The paper's experiments: every method on pairs whose labels prefer the longer response too often, or as they are.

Fisch et al., arXiv 2405.19316, section 5. For every rho, D_rho is a resample of the training pairs in which a fraction
rho prefers the longer response, all of one size; a rho of None is the pairs as labelled. The test prompts and the judge
stay unbiased. A reward model is trained on every D_rho. d-DPO and dp-DPO distil the one of their own D_rho; e-DPO and
hull-DPO are pessimistic over all.

What is common is done once: the starting policy, reference log-probs and features for all runs, a reward model for
every rho that holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefdistill import pipeline
from prefdistill.atomic import read_json
from prefdistill.config import RunConfig
from prefdistill.data.bias import common_size, longer_chosen
from prefdistill.errors import ConfigError
from prefdistill.evaluation import inference, statistics
from prefdistill.stages.prepare import encode_pairs, read_pairs
from prefdistill.stages.run import Run

VERSION = 1
METHODS = ("dpo", "ipo", "p-dpo", "d-dpo", "dp-dpo", "e-dpo", "hull-dpo")
Rho = float | None  # None: the pairs as they are labelled
OWN_REWARD = ("d-dpo", "dp-dpo")  # distil the reward model of their own D_rho only
BASELINE = "dpo"


@dataclass(frozen=True)
class Comparison:
    """What to train: every method on every D_rho, for every seed.

    Attributes:
        config: of each run; its output_dir is the experiment's, methods, dataset.rho and reward models are set here.
        member_rhos: the rho whose reward models make the ensemble, those of `rhos` always among them (None: no more).
    """

    config: RunConfig
    rhos: tuple[Rho, ...]
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    member_rhos: tuple[Rho, ...] | None = None

    @property
    def ensemble(self) -> tuple[Rho, ...]:
        """Every rho that has a reward model, the pairs as labelled first."""
        return tuple(sorted({*self.rhos, *(self.member_rhos or ())}, key=lambda rho: -1.0 if rho is None else rho))

    def check(self) -> None:
        """Raises ConfigError, naming the option, for an experiment that cannot be run."""
        if BASELINE not in self.methods:
            raise ConfigError(f"--methods must hold {BASELINE}, against which the others are tested")
        for name, given in (("--rhos", self.rhos), ("--methods", self.methods), ("--seeds", self.seeds)):
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{name} must be one or more different values, got {', '.join(map(str, given))}")
        for rho in self.ensemble:
            if rho is not None and not 0 <= rho <= 1:
                raise ConfigError(f"--rhos and --member-rhos hold {rho:g}; a fraction must lie in [0, 1]")
        if self.config.evaluate.split != "test":
            raise ConfigError(
                f"evaluate.split is {self.config.evaluate.split!r}; an experiment evaluates on the test prompts, since "
                "validation pairs are resampled as the training pairs are"
            )
        if self.config.dataset.rho is not None:
            raise ConfigError("dataset.rho is what the experiment varies; give --rhos")
        self.run_config.check()

    @property
    def run_config(self) -> RunConfig:
        """With the methods put in."""
        return replace(self.config, methods=list(self.methods))


def run_comparison(job: Comparison) -> dict[str, Any]:
    """Trains and evaluates what is missing, and returns the table of `collect`."""
    job.check()
    root = Path(job.config.output_dir)
    rate, pairs = _natural(job)
    job = replace(job, config=_with_start(job.config))
    for seed in job.seeds:
        # The reward models of all rho first: every run is pessimistic over all of them.
        for rho in job.ensemble if job.run_config.needs_rewards else ():
            pipeline.run(_config(job, seed, rho, pairs, others=False), until="reward")
        for rho in job.rhos:
            pipeline.run(_config(job, seed, rho, pairs, others=True))
    return collect(root, job, natural_rate=rate, pairs=pairs)


def run_folder(root: Path, seed: int, rho: Rho) -> Path:
    return root / f"seed-{seed}" / ("as-labelled" if rho is None else f"rho-{rho:g}")


def _with_start(config: RunConfig) -> RunConfig:
    """The same, from one starting policy for all runs: that of a supervised start sees the pairs as labelled."""
    run = Run(config)
    if not run.makes_start:
        return config
    first = replace(config, output_dir=str(run.root / "start"))
    pipeline.run(first, until="start")
    return replace(config, model=str(Run(first).start_path), sft=replace(config.sft, enabled=False))


def _config(job: Comparison, seed: int, rho: Rho, pairs: int | None, *, others: bool) -> RunConfig:
    root = Path(job.config.output_dir)
    config = copy.deepcopy(job.config)
    config.output_dir = str(run_folder(root, seed, rho))
    config.methods = list(job.methods)
    config.seed = seed
    config.dataset.rho, config.dataset.rho_pairs = rho, None if rho is None else pairs
    if config.dataset.split_seed is None:
        # One test split for all seeds, whose scores are averaged prompt by prompt.
        config.dataset.split_seed = job.config.seed
    config.score.columns = config.score.columns or str(root / "columns")
    config.reward.members, config.reward.resample = 1, "all"
    if others:
        config.reward.pretrained = [
            str(run_folder(root, seed, other) / "reward" / "member-0") for other in job.ensemble if other != rho
        ]
        own = {m: {"members": [0]} for m in job.methods if config.distill.method_of(m) in OWN_REWARD}
        config.distill.per_method = {
            m: {**config.distill.per_method.get(m, {}), **own.get(m, {})} for m in [*config.distill.per_method, *own]
        }
    return config


def _natural(job: Comparison) -> tuple[float, int | None]:
    """How often the data's own training labels prefer the longer response, and the size that all D_rho can have."""
    run = Run(job.config)
    groups, _ = encode_pairs(run, read_pairs(run)[0])
    signs = longer_chosen(groups.of("train"))
    resampled = [rho for rho in job.ensemble if rho is not None]
    size = common_size(signs, resampled) if resampled else None
    return float((signs > 0).sum() / max(1, (signs != 0).sum())), size


# -- the table ---------------------------------------------------------------------------------------------------------


def collect(root: Path, job: Comparison, *, natural_rate: float, pairs: int | None) -> dict[str, Any]:
    """The experiment's figures, as plain JSON values: a row for every rho and method, over all seeds.

    Scores are averaged over seeds prompt by prompt, then prompts are resampled, so that an interval holds the prompts'
    share of chance; `by_seed` shows the seeds' own. Wald tests compare each method with DPO on the same prompts, with
    Holm's correction over the methods of one rho.
    """
    rows: list[dict[str, Any]] = []
    for rho in job.rhos:
        summaries, scores = [], []
        for seed in job.seeds:
            folder = run_folder(root, seed, rho) / "evaluation"
            summary = read_json(folder / "summary.json")
            summaries.append(summary["methods"])
            judge = summary["judge"]["description"]
            found = read_json(folder / "scores.json")
            scores.append({m: np.array(s) for m, s in found.items()})
        mean = {m: np.mean([s[m].mean(1) for s in scores], axis=0) for m in ("reference", *job.methods)}
        prompts = np.arange(len(mean["reference"]))
        of_rho: list[dict[str, Any]] = []
        for method in job.methods:
            advantage = statistics.cluster_mean(mean[method] - mean["reference"], prompts)
            won = np.mean([_won(s[method], s["reference"], job.config.evaluate.tie_margin) for s in scores], axis=0)
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
        "rhos": list(job.rhos),
        "member_rhos": list(job.ensemble),
        "methods": list(job.methods),
        "seeds": list(job.seeds),
        "natural_rate": natural_rate,
        "pairs": pairs,
        "prompts": len(prompts),
        "rows": rows,
        "over_rho": {m: _over_rho([r for r in rows if r["method"] == m]) for m in job.methods},
        "judge": judge,
        "members": _members(root, job),
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


def _members(root: Path, job: Comparison) -> list[dict[str, Any]]:
    """Held-out figures of every reward model, on the unbiased test pairs; means over seeds."""
    names = ("accuracy", "log_loss", "length_correlation")
    found: dict[Rho, list[dict[str, Any]]] = {rho: [] for rho in job.ensemble}
    first = job.rhos[0]
    # A run's own member comes first, then those of the other rho: see `_config`.
    order = [first, *(rho for rho in job.ensemble if rho != first)]
    for seed in job.seeds:
        figures = read_json(run_folder(root, seed, first) / "evaluation" / "ensemble.json").get("members", [])
        for rho, of_member in zip(order, figures, strict=False):
            found[rho].append(of_member)
    rows: list[dict[str, Any]] = []
    for rho, seeds in found.items():
        known = {n: [m[n] for m in seeds] for n in names if seeds and all(m[n] is not None for m in seeds)}
        if seeds:
            rows.append({"rho": rho, **{n: float(np.mean(values)) for n, values in known.items()}})
    return rows
