"""Experiment trackers of Accelerate (wandb, mlflow, trackio), beside the log: checked, opened, written to, closed."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import result_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "bigtrain"


def check_installed(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing: Accelerate would leave it out without a word."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ValueError(f"--trackers {tracker} is not installed: `uv sync --extra {tracker}` does it.")
    if "wandb" in trackers and not wandb_has_login():
        raise ValueError(
            "--trackers wandb has no login here, and would wait for one: `wandb login`, WANDB_API_KEY, or "
            "WANDB_MODE=offline, which keeps figures in the run folder."
        )


def wandb_has_login() -> bool:
    """Whether wandb has a key, or needs none; it would ask for one, or give up after minutes."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def begin_trackers(accelerator: Accelerator, run: RunFolder) -> None:
    """Open the trackers of a run; one keeps its name and, where the tracker can, its history over restarts."""
    if run.config.run.trackers:
        accelerator.init_trackers(PROJECT, flat(result_settings(run.config)), options(run))


def log_figures(accelerator: Accelerator, stage: str, figures: Mapping[str, float], step: int) -> None:
    accelerator.log({f"{stage}/{name}": value for name, value in figures.items()}, step=step)


def end_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()


def options(run: RunFolder) -> dict[str, dict[str, Any]]:
    name = run.path.resolve().name
    return {
        "wandb": {"name": name, "dir": str(run.path), "id": run.resolved("id"), "resume": "allow"},
        "mlflow": {"run_name": name},
        "trackio": {"name": name, "resume": "allow"},
    }


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers and strings."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
