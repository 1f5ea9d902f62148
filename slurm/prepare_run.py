"""The folder of a run that is to be submitted: its settings and what its job will read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.files import write_text
from slurm.cluster import Cluster
from slurm.run_record import FOLDER, JobSpec, events
from slurm.shipped import shipped
from slurm.sweep import Run, toml

SETTINGS_FILE = "settings.toml"


def check_folder(path: Path) -> Path:
    """A folder that sbatch's file names can hold."""
    if bad := sorted(set(str(path)) & set("%\\\n\r")):
        raise ValueError(
            f"{path} cannot be a run's folder on SLURM, as sbatch expands {bad[0]!r} in names: choose another."
        )
    return path


def prepare(run: Path, recipe: Path, flags: Sequence[str], cluster: Cluster, logs: Path, **further: Any) -> None:
    """Write what the job of a run will read."""
    JobSpec(
        str(shipped(recipe, "recipe").absolute()), tuple(flags), str(Path.cwd()), cluster, str(logs), **further
    ).write(run)


def prepare_run(run: Run, out: Path, cluster: Cluster) -> None:
    """Write the folder of a sweep's run.

    Raises:
        ValueError: it holds a run of the same name with other settings.
    """
    folder = out / run.name
    file, text = folder / FOLDER / SETTINGS_FILE, toml(run.settings)
    if file.is_file() and file.read_text() != text and (events(folder) or (folder / "config.json").is_file()):
        raise ValueError(
            f"{folder} holds a run with other settings than the sweep file now gives it (see {file}): name another "
            "out, or remove that folder."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    prepare(folder, Path(run.recipe), ["--config", str(file)], cluster, out / FOLDER, needs=run.needs)


def forget(run: Path) -> None:
    """Take back what `prepare` wrote into a folder that was new."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    with suppress(OSError):  # it holds something
        run.rmdir()
        run.parent.rmdir()
