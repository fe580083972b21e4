"""Stage `report`: puts together what the other stages wrote and has it laid out as one HTML file."""

from __future__ import annotations

import datetime
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefdistill.atomic import read_json, write_text
from prefdistill.manifest import Manifest
from prefdistill.report.html import write_report
from prefdistill.seals import checksum
from prefdistill.stages.draw import samples_path
from prefdistill.stages.run import Run

logger = logging.getLogger(__name__)


def make_report(run: Run, manifest: Manifest) -> tuple[list[Path], str]:
    folder = run.evaluation_path
    summary = read_json(folder / "summary.json")
    ensemble = read_json(folder / "ensemble.json")
    html = write_report(
        {
            "title": f"prefdistill: {run.root.name}" + ("" if summary["split"] == "test" else f" ({summary['split']})"),
            "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "version": version("prefdistill"),
            "summary": summary,
            "mixtures": _mixtures(run),
            "training": {m: _history(run, m) for m in run.config.methods},
            **ensemble,
            "samples": read_json(folder / "side_by_side.json"),
            "warnings": summary["warnings"],
            "llm_judge": _llm_judge(run),
            "checks": read_json(folder / "diagnosis.json")["checks"],
            "config": run.config.as_yaml(),
            "environment": _environment(run),
            "stages": [{"name": n, "seconds": r.seconds, "said": r.said} for n, r in manifest.stages.items()],
        }
    )
    path = run.report_path
    write_text(path, html)
    return [path], f"open {path}"


def llm_judge_path(run: Run) -> Path:
    """What `prefdistill judge` found."""
    return run.evaluation_path / "llm-judge.json"


def _llm_judge(run: Run) -> dict[str, Any] | None:
    """What a language model made of these samples; None where none was asked, or of others."""
    path = llm_judge_path(run)
    if not path.exists():
        return None
    try:
        found = read_json(path)
        samples = dict(found["samples"])  # checksums of the samples that were judged
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("%s is broken (%s); what the judge said is left out: run prefdistill judge again", path, error)
        return None
    files = {name: samples_path(run, name) for name in samples}
    same = files and all(f.exists() and checksum(f) == samples[name] for name, f in files.items())
    return found if same else None


def _mixtures(run: Run) -> dict[str, Any]:
    """What the mixture of a method that has one promises, by method."""
    paths = {m: run.policy_path(m) / "mixture.json" for m in run.config.methods}
    return {m: read_json(path) for m, path in paths.items() if path.exists()}


def _history(run: Run, method: str) -> dict[str, Any]:
    history = read_json(run.policy_path(method) / "history.json")
    names = {
        "steps": "step",
        "logps/chosen_change": "logps/chosen_change",
        "rewards/margins": "rewards/margins",
        "loss_values": "loss",
        "level_change": "logps/level_change",
    }
    kept = run.policy_path(method) / "checkpoints.json"
    found = {"loss": run.config.distill.method_of(method), "kept": read_json(kept) if kept.exists() else None}
    return found | {key: [h.get(name) for h in history] for key, name in names.items()}


def _environment(run: Run) -> dict[str, str]:
    packages = ("prefdistill", "torch", "transformers", "peft", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
        "machine": platform.machine(),
        "precision": run.precision,
        "device": str(run.device),
    }
