"""`prefdistill theory`: the paper's claims in a small exact world, as a page and as numbers."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from prefdistill.atomic import write_json, write_text
from prefdistill.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill theory", description="The paper's claims, exactly, in small worlds."
    )
    made.add_argument("--output-dir", type=Path, default=Path("runs/theory"), help="where the page goes")
    made.add_argument("--seed", type=int, default=0, help="of the worlds")
    made.add_argument("--json", action="store_true", help="print the numbers, write nothing")
    return made


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.seed < 0:
        raise ConfigError(f"--seed is {options.seed}; it must not be negative")

    from prefdistill.report.theory import write_theory
    from prefdistill.theory import lab

    numbers = lab.numbers(options.seed)
    if options.json:
        print(json.dumps(numbers, indent=2))
        return 0
    command = f"prefdistill theory --seed {options.seed}"
    write_json(options.output_dir / "theory.json", numbers)
    write_text(
        options.output_dir / "theory.html", write_theory(numbers, version=version("prefdistill"), command=command)
    )
    print(
        f"DPO at its infimum leaves a chosen response {numbers['degenerate_max_prob_chosen']:.0e} of probability\n"
        f"d-DPO under full support is RLHF's optimum to {numbers['distillation_gap']:.0e}\n"
        f"Theorem 2 over a convex set holds to {numbers['pessimism_gap']:.0e}\n"
        f"a plain min over three members lies {numbers['least_kl_shortfall']:.2f} below the worst-case optimum, the "
        f"mean reward {numbers['mean_reward_shortfall']:.2f}, the exact mixture {numbers['hull_gap']:.0e}",
        file=sys.stderr,
    )
    print(f"page: {options.output_dir / 'theory.html'}")
    return 0
