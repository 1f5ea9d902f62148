"""Experiment trackers of Accelerate (wandb, mlflow, trackio), beside the log: checked, opened, written to, closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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
