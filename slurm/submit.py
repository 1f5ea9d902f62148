"""From runs to jobs: checked with the recipe, written into their folders, given to sbatch or to this machine."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm.cluster import Cluster, explained, submission
from slurm.history import FOLDER, RESULTS_FILE, Job, events, tell, write_text
from slurm.life import Life
from slurm.sweep import Run, toml

SETTINGS_FILE = "settings.toml"
NO_LIMIT_MIN = 60 * 24 * 365


class Executor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # whether there is a SLURM is asked elsewhere; to show a script there need not be one


@dataclass(frozen=True)
class Checked:
    """What a recipe says of settings: all that it resolves them to."""

    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return [name for name in self.settings if name != "run"] + list(self.settings["run"])


def ask_recipe(recipe: Path, flags: Sequence[str] = ()) -> Checked:
    """What a recipe resolves flags to.

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
        return Checked(json.loads(done.stdout))
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


def run_here(runs: Sequence[Path], cluster: Cluster, logs: Path, *, at_once: int = 1, show: bool = False) -> int:
    """The same jobs on this machine, without SLURM, until they end; how many have not finished.

    Args:
        show: the log of a single run, as it grows.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, at_work, stopping = list(runs), dict[Path, Any](), [False]

    def stop(number: int, frame: FrameType | None) -> None:
        stopping[0] = True
        for job in at_work.values():
            if job._process:
                job._process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = 0
    try:
        while at_work or (waiting and not stopping[0]):
            while waiting and len(at_work) < at_once and not stopping[0]:
                run = waiting.pop(0)
                made = submitit.LocalExecutor(logs)
                made.update_parameters(
                    tasks_per_node=cluster.processes, gpus_per_node=min(cluster.gpus_per_node, cluster.processes),
                    timeout_min=NO_LIMIT_MIN, stderr_to_stdout=True, setup=list(cluster.setup),
                )  # fmt: skip
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that submitit's own process outlives a Ctrl-C
                at_work[run] = made.submit(Life(str(run)))
                tell(run, "submitted", job=f"local-{at_work[run].job_id}")
                signal.signal(signal.SIGINT, stop)
                signal.signal(signal.SIGTERM, stop)
            time.sleep(0.2)
            for run, job in list(at_work.items()):
                ended = job._process is None or job._process.poll() is not None
                if show:
                    shown = print_from(job.paths.stdout, shown)
                if ended:
                    del at_work[run]
                    if not show:
                        print(f"{run.name}: {outcome(run)}  ({len(waiting)} waiting)", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return sum(not (run / RESULTS_FILE).is_file() for run in runs)


def outcome(run: Path) -> str:
    if (run / RESULTS_FILE).is_file():
        return "finished"
    last: dict[str, Any] = next(iter(reversed(events(run))), {})
    return f"{last.get('event', 'nothing')}: {last.get('error') or last.get('why') or ''}".rstrip(": ")


def print_from(log: Path, place: int) -> int:
    """What has been added to a log."""
    try:
        with log.open("rb") as file:
            file.seek(place)
            added = file.read()
    except FileNotFoundError:
        return place
    sys.stdout.buffer.write(added)
    sys.stdout.flush()
    return place + len(added)


def run_in_this_process(recipe: Path, flags: Sequence[str]) -> None:
    """The recipe, for a debugger: no job around it."""
    sys.argv = [str(recipe), *flags]
    runpy.run_path(str(recipe), run_name="__main__")
