"""`prefdistill push RUN METHOD [--repo ID]`: writes a policy's model card and puts the policy on the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prefdistill.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="prefdistill push",
        description="Writes README.md, a model card with data, method and figures, into a policy's folder. With --repo "
        "the folder is uploaded, by the token of `hf auth login` or HF_TOKEN.",
    )
    made.add_argument("run", type=Path, help="a run directory that was evaluated")
    made.add_argument("method", help="which of its policies")
    made.add_argument("--repo", help="a hub id, org/name; made if it is not there")
    made.add_argument("--private", action="store_true", help="make the repository private")
    made.add_argument("--license", help="a licence name of the hub, e.g. apache-2.0; it must suit model and data")
    return made


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)

    from prefdistill.atomic import write_text
    from prefdistill.cli import opened_alone
    from prefdistill.models.adapter_folders import adapter_base, is_adapter

    # Held while it is uploaded too: a run beside it would put other weights under the card.
    with opened_alone(options.run) as run:
        if options.method not in run.config.methods:
            raise ConfigError(f"{options.run} has no method {options.method!r}; it has {', '.join(run.config.methods)}")
        folder = run.policy_path(options.method)
        if options.repo and is_adapter(str(folder)) and Path(adapter_base(str(folder))).is_dir():
            raise ConfigError(
                f"{folder} is an adapter on {adapter_base(str(folder))}, a folder of this machine that nobody "
                "who loads it from the hub has; train with distill.adapters: false, or put the base on the hub and its "
                "id into adapter_config.json"
            )
        card = folder / "README.md"
        write_text(card, card_text(run, options.method, options.license))
        print(f"model card: {card}", file=sys.stderr)
        if options.repo:
            print(f"uploaded: {upload(folder, options.repo, private=options.private)}")
    return 0


def card_text(run: Any, method: str, licence: str | None) -> str:
    import dataclasses
    from importlib.metadata import version

    import yaml

    from prefdistill.atomic import read_json
    from prefdistill.report.card import card_of

    run.check_evaluated()
    asked = dataclasses.asdict(run.config.distill.of(method))
    own = {k: v for k, v in asked.items() if k not in ("per_method", "training_arguments") and v is not None}
    return card_of(
        name=method,
        method=run.config.distill.method_of(method),
        base=run.config.model,
        data=run.config.data,
        licence=licence,
        version=version("prefdistill"),
        summary=read_json(run.evaluation_path / "summary.json"),
        counts=read_json(run.root / "data" / "data.json"),
        options=yaml.safe_dump({"seed": run.config.seed, "distill": own}, sort_keys=False),
    )


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a policy's folder; returns its address.

    Raises:
        ConfigError: the hub refuses; the message says what it said.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=["history.json", "*.part-*"])
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the hub did not take {repo!r} ({reason}); check its name and your token (hf auth login), and the "
            "network; the card and the policy lie in {folder}".replace("{folder}", str(folder))
        ) from error
    return str(made)
