"""The run folder: all that a restart needs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.files import TEMPORARY, remove_unfinished, whole_file, whole_folder, write_json
from bigtrain.runtime.exit import at_end
from bigtrain.runtime.settings import result_settings

CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"
STOPPED_FILE = "stopped.json"  # for launchers that turn every exit code into 1
LOCK_FILE = ".lock"
NOT_OURS = (LOCK_FILE, "slurm", "events.jsonl")  # which may be there before the run: slurm/run_record.py


class RunFolder:
    """A folder that holds one run: opening it again with the same settings continues, with others is refused."""

    def __init__(self, path: str | Path, config: Any) -> None:
        self.path = Path(path)
        self.config = config

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return (self / RESULTS_FILE).is_file()

    @property
    def has_begun(self) -> bool:
        """Whether an earlier start has created it."""
        return (self.path / CONFIG_FILE).is_file()

    def is_already_finished(self) -> bool:
        """Refuse a folder of another run; say so, once, if this one is finished."""
        self.check()
        if os.environ.get("RANK", "0") == "0":
            (self / STOPPED_FILE).unlink(missing_ok=True)  # it is about an earlier start
            if self.finished:
                print(f"this run is finished, nothing to do: see {self.path}")
        return self.finished

    def check(self) -> None:
        """Refuse a folder that holds another configuration's run, naming the settings that differ."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: name a folder, which may be new.")
        if (self / CONFIG_FILE).is_file():
            self._check_settings(f"--out {self.path}", self.path, "Name another folder, or give that run's settings")
        elif self.path.is_dir() and any(p.suffix != TEMPORARY and p.name not in NOT_OURS for p in self.path.iterdir()):
            raise ValueError(f"--out {self.path} holds other files and no run: name a new folder.")
        elif source := self.config.run.resume_from:
            their_run, _ = run_and_checkpoint(source)
            self._check_settings(f"--resume-from {source}", their_run, "Give that run's settings")

    def _check_settings(self, given: str, their_run: Path, what_to_do: str) -> None:
        try:
            there = json.loads((their_run / CONFIG_FILE).read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{their_run / CONFIG_FILE} cannot be read ({error}): name a new folder.") from error
        here, defaults = result_settings(self.config), result_settings(type(self.config)())
        there = {**defaults, **there}  # a run of an earlier version lacks settings that came later
        differ = [key for key in {**there, **here} if key not in there or key not in here or there[key] != here[key]]
        if differ:
            pairs = ", ".join(
                f"{key} ({there.get(key, 'not a setting')!r} there, {here.get(key, 'not a setting')!r} here)"
                for key in differ
            )
            raise ValueError(f"{given} holds a run with other settings: {pairs}. {what_to_do} to continue it.")

    def take_over(self, leaves: Mapping[str, str]) -> None:
        """Copy the state of --resume-from, a run or a checkpoint, into a new run, once. Called on one rank.

        Args:
            leaves: the stages of this recipe in their order, and the file that each leaves.
        """
        source = self.config.run.resume_from
        if not source or (self / CONFIG_FILE).is_file():
            return
        their_run, checkpoint = run_and_checkpoint(source)
        checkpoints = [checkpoint] if checkpoint else sorted(their_run.glob("checkpoints/*/step-*"))
        finished = list(leaves)[: list(leaves).index(checkpoint.parent.name)] if checkpoint else list(leaves)
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (their_run / leaves[stage] for stage in finished):
            if file.is_file():
                with whole_file(self / file.name) as copy, file.open("rb") as original:
                    shutil.copyfileobj(original, copy)
        for folder in checkpoints:
            if folder.suffix != TEMPORARY:
                with whole_folder(self / "checkpoints" / folder.parent.name / folder.name) as copy_of_checkpoint:
                    shutil.copytree(folder, copy_of_checkpoint, dirs_exist_ok=True)

    def lock(self, wait_s: float = 60.0) -> None:
        """Lock this folder until this process ends; waits for an earlier start that is just ending.

        Raises:
            ValueError: another start is using it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = at_end.enter_context((self / LOCK_FILE).open("w"))
        until, said = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return  # a file system without locks
            if time.monotonic() > until:
                raise ValueError(
                    f"--out {self.path}: another start of this run is using it. Wait until it has ended, or stop "
                    f"it with `touch {self / 'stop'}`."
                )
            if not said:
                print(f"{self.path}: waiting for an earlier start of this run to end", flush=True)
                said = True
            time.sleep(0.2)

    def resolved(self, name: str) -> Any:
        """What an "auto" setting resolved to when the run began, so that a restart keeps it; None before."""
        config = self / CONFIG_FILE
        return json.loads(config.read_text())["resolved"][name] if config.is_file() else None

    def create(self, **resolved: Any) -> None:
        """Write settings, what the "auto" ones resolved to, and versions, once. Called on one rank, after `check`."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        if not (self / CONFIG_FILE).is_file():
            record = {
                "settings": result_settings(self.config),
                "resolved": resolved,
                "git_sha": _git_sha(),
                "packages": packages(),
            }
            write_json(self / CONFIG_FILE, record)

    def finish(self, results: Any) -> None:
        """Write results.json, which marks the run as finished, and delete its checkpoints, except those of
        --keep-every. Called on one rank."""
        write_json(self / RESULTS_FILE, results)
        every = self.config.run.keep_every
        for checkpoint in self.path.glob("checkpoints/*/step-*"):
            if not every or checkpoint.suffix == TEMPORARY or int(checkpoint.name.removeprefix("step-")) % every:
                shutil.rmtree(checkpoint, ignore_errors=True)
        for folder in [*self.path.glob("checkpoints/*"), self / "checkpoints"]:
            with suppress(OSError):  # not empty, or there is none
                folder.rmdir()


def packages() -> dict[str, str]:
    """Name -> version of the installed packages, by their folders NAME-VERSION.dist-info: reading the metadata in each
    would take half a second. Of one that is there twice, the version that is imported."""
    folders = (folder for entry in reversed(sys.path) for folder in Path(entry).glob("*.dist-info"))
    found = dict(folder.stem.split("-", 1) for folder in folders)
    return dict(sorted(found.items()))


def run_and_checkpoint(source: str) -> tuple[Path, Path | None]:
    """What --resume-from names: a run, or a checkpoint and its run."""
    path = Path(source)
    if (path / CONFIG_FILE).is_file():
        return path, None
    if path.is_dir() and path.name.removeprefix("step-").isdigit() and path.parent.parent.name == "checkpoints":
        their_run = path.parent.parent.parent
        if (their_run / CONFIG_FILE).is_file():
            return their_run, path
    raise ValueError(
        f"--resume-from {source} is not a run: name a run's folder (with config.json in it), or one of its "
        "checkpoints, RUN/checkpoints/STAGE/step-000123."
    )


def _git_sha() -> str | None:
    """The commit of the checkout this package lies in, "-dirty" where files differ; None for an installed package."""
    top = Path(__file__).parents[2]
    if not (top / ".git").exists():
        return None
    describe = ["git", "-C", str(top), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None
