"""Where trackers of trainings write: beside the run, one training apart from the next."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from prefdistill.errors import ConfigError

# Trackers that need a package of their own, by transformers' names.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml"}
_SET_HERE: set[str] = set()


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that transformers does not know, or whose package is not there.

    transformers would say so in the middle of a run.
    """
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            raise ConfigError(f"report_to: {name!r} is no tracker; give some of {', '.join(INTEGRATION_TO_CALLBACK)}")
        package = PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"report_to: {name} needs the package {package}; pip install {package}")


def track_in(folder: Path, name: str, trackers: Sequence[str]) -> None:
    """Has TensorBoard and wandb write below `folder`, under the training's name; a user's own variables win."""
    wanted = {}
    if "tensorboard" in trackers:
        wanted["TENSORBOARD_LOGGING_DIR"] = folder / "tensorboard" / name
    if "wandb" in trackers:
        wanted["WANDB_DIR"] = folder
    for variable, place in wanted.items():
        if variable not in os.environ or variable in _SET_HERE:
            place.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(place)
            _SET_HERE.add(variable)


def end_tracking(trackers: Sequence[str]) -> None:
    """Ends wandb's run: the next training of this process is one of its own."""
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            wandb.finish()
