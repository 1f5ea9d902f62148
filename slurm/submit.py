"""From runs to jobs: checked with the recipe, written into their folders, given to sbatch or to this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from bigtrain.files import write_text
from slurm import scheduler as jobs
from slurm.attempt import Life
from slurm.cluster import Cluster, explained, submission, what_there_is
from slurm.run_record import FOLDER, Job, events, tell
from slurm.sweep import Run, Sweep, toml

SETTINGS_FILE = "settings.toml"


class Executor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # whether there is a SLURM is asked elsewhere; to show a script there need not be one


def ask_recipe(recipe: Path, flags: Sequence[str]) -> dict[str, Any]:
    """What a recipe resolves flags to: all its settings.

    Raises:
        ValueError: there is no such recipe, or it refuses the flags, in its own words.
    """
    if not recipe.is_file():
        raise ValueError(f"there is no recipe {recipe}: name a script, such as recipes/defend.py.")
    command = [sys.executable, str(recipe), *flags, "--print-config"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise ValueError(f"the recipe refuses these settings.\n{done.stderr.strip()}")
    try:
        settings: dict[str, Any] = json.loads(done.stdout)
        return settings
    except ValueError as error:
        raise ValueError(f"{recipe} is no recipe: with --print-config it prints no settings.") from error


def check_folder(path: Path) -> Path:
    """A folder that sbatch's file names can hold."""
    if bad := sorted(set(str(path)) & set("%\\\n\r")):
        raise ValueError(
            f"{path} cannot be a run's folder on SLURM, for sbatch reads {bad[0]!r} in names: choose another."
        )
    return path


def prepare(run: Path, recipe: Path, flags: Sequence[str], cluster: Cluster, logs: Path, **further: Any) -> None:
    """Write what the job of a run will read."""
    Job(
        recipe=str(recipe.absolute()),
        flags=tuple(flags),
        cwd=str(Path.cwd()),
        cluster=cluster,
        logs=str(logs),
        **further,
    ).write(run)


def prepare_run(run: Run, out: Path, cluster: Cluster) -> Path:
    """The folder of a sweep's run, with its settings.

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
    return folder


def check_slurm(cluster: Cluster) -> None:
    """Raises:
    ValueError: no SLURM answers, or no node has so many GPUs: some SLURMs take such a job, and it waits for ever.
    """
    jobs.check_slurm()
    most = jobs.most_gpus(cluster.partition)
    if most is not None and cluster.gpus_per_node > most:
        where = f"partition {cluster.partition}" if cluster.partition else "the default partition"
        raise ValueError(
            f"gpus_per_node is {cluster.gpus_per_node}, and a node of {where} has at most {most}:{what_there_is()} "
            "Change the cluster file or give another flag."
        )


def executor(cluster: Cluster, logs: Path, name: str, **further: Any) -> Executor:
    made = Executor(folder=logs, max_num_timeout=cluster.max_lives)
    made.update_parameters(**submission(cluster, name=job_name(name), folder=logs, **further))
    return made


def job_name(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name, flags=re.ASCII) or "bigtrain"


def script(cluster: Cluster, logs: Path, name: str, *, runs: int = 1, **further: Any) -> str:
    """The text that sbatch gets."""
    made = executor(cluster, logs, name, **further)
    if runs > 1:
        made.parameters["map_count"] = runs
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(runs: Sequence[Path], cluster: Cluster, logs: Path, name: str, **further: Any) -> list[str]:
    """Give prepared runs to sbatch: one as a job, more as an array. Their job ids.

    Raises:
        ValueError: sbatch refuses.
    """
    logs.mkdir(parents=True, exist_ok=True)
    made = executor(cluster, logs, name, **further)
    try:
        with without_slurm_variables():
            if len(runs) == 1:
                submitted = [made.submit(Life(str(runs[0])))]
            else:
                with made.batch():
                    submitted = [made.submit(Life(str(run))) for run in runs]
    except (FailedJobError, FailedSubmissionError) as error:
        for run in runs:
            if not events(run):
                forget(run)
        raise ValueError(explained(str(error), script(cluster, logs, name, runs=len(runs), **further))) from error
    for run, job in zip(runs, submitted, strict=True):
        tell(run, "submitted", job=job.job_id)
    return [job.job_id for job in submitted]


def forget(run: Path) -> None:
    """Take back what `prepare` wrote into a folder that was new."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    for folder in (run, run.parent):
        try:
            folder.rmdir()
        except OSError:  # it holds something
            return


class without_slurm_variables:  # noqa: N801
    """A job submitted from inside of another must not inherit what that one asked for."""

    def __enter__(self) -> None:
        self.before = {
            name: os.environ.pop(name) for name in list(os.environ) if re.match("SLURM_(?!CONF$)|SBATCH_", name)
        }

    def __exit__(self, *_: object) -> None:
        os.environ.update(self.before)


def submit_arrays(
    runs: Sequence[Path], cluster: Cluster, logs: Path, name: str, parallel: int, wait_for: Sequence[str]
) -> list[str]:
    """Runs as one array, or as several one after another where SLURM takes no larger ones; the ids of the arrays."""
    largest = jobs.largest_array() if len(runs) > 1 else 1
    ids: list[str] = []
    for first in range(0, len(runs), largest):
        others = ids[-1:] or sorted({job.split("_")[0] for job in wait_for})
        after = f"afterany:{':'.join(others)}" if others else ""
        some = submit(runs[first : first + largest], cluster, logs, name, parallel=parallel, after=after)
        ids.append(some[0].split("_")[0])
        print(
            f"job {ids[-1]}: {len(some)} run{'s' if len(some) > 1 else ''}{f', {after}' if after else ''}", flush=True
        )
    return ids


def check_settings(sweep: Sweep) -> None:
    """Ask each recipe of a sweep whether it takes the settings of the first run with such names.

    Raises:
        ValueError: an axis or a setting that is none, or a value that it refuses.
    """
    for run in {(run.recipe, *run.settings): run for run in reversed(sweep.runs)}.values():
        print(f"asking {run.recipe} for its settings", file=sys.stderr, flush=True)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "settings.toml"
            file.write_text(toml(run.settings))
            try:
                ask_recipe(Path(run.recipe), ["--config", str(file)])
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), str(sweep.path))) from error
