"""A run's folder under SLURM: what its jobs run (JobSpec), which job holds it (RunLock), what happened (events)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.files import write_json
from slurm import scheduler
from slurm.cluster import Cluster

FOLDER = "slurm"  # in a run's folder, or a sweep's: submitit's files, the logs of the processes, and
JOB_FILE = "job.json"
OWNER_FILE = "owner.json"
EVENTS_FILE = "events.jsonl"  # in the run's folder itself
RESULTS_FILE = "results.json"  # marks a run as finished
FINAL_EVENTS = ("requeued", "stopped", "failed", "finished", "cancelled")  # of an attempt


@dataclass(frozen=True)
class JobSpec:
    """What each process of a job runs."""

    recipe: str
    flags: tuple[str, ...]
    cwd: str
    cluster: Cluster
    logs: str  # Folder of submitit and of the logs.
    needs: Mapping[str, str] = field(default_factory=dict)  # file -> the other run that writes it

    def write(self, run: Path) -> None:
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        write_json(run / FOLDER / JOB_FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> JobSpec:
        """Raises:
        ValueError: there is none.
        """
        try:
            record = json.loads((run / FOLDER / JOB_FILE).read_text())
            record["cluster"] = Cluster().changed(JOB_FILE, **record["cluster"])
            return cls(**{**record, "flags": tuple(record["flags"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{run} holds no job of bigtrain-slurm: {error}.") from error


def record_event(run: Path, event: str, **further: Any) -> None:
    """Append an event to the run's history."""
    row = {"event": event, "time": round(time.time(), 3), "host": socket.gethostname(), **further}
    with (run / EVENTS_FILE).open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def events(run: Path) -> list[dict[str, Any]]:
    """The history; a half-written row of a killed process is left out."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run / EVENTS_FILE).read_text(errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "event" in row:
                    found.append(row)
    return found


def attempts(history: list[dict[str, Any]], job_id: str) -> list[dict[str, Any]]:
    """The start events of a job's attempts."""
    return [row for row in history if row["event"] == "started" and row.get("job") == job_id]


def idle_attempts(history: list[dict[str, Any]], job_id: str, at: str) -> int:
    """How many of a job's latest attempts began where the run stands now, so made no progress."""
    begun = [row.get("at") for row in attempts(history, job_id)]
    return next((count for count, where in enumerate(reversed(begun)) if where != at), len(begun))


def position(run: Path) -> str:
    """How far a run is: the newest checkpoint of each stage, and the files that stages wrote."""
    steps = sorted(p for p in run.glob("checkpoints/*/step-*") if p.suffix != ".tmp")
    newest = {p.parent.name: p.name for p in steps}
    return " ".join(
        [*(f"{stage}/{step}" for stage, step in newest.items()), *sorted(p.name for p in run.glob("*.safetensors"))]
    )


class RunLock:
    """Keeps a run to one job: a second job is refused while the first is alive, and takes over when it is dead."""

    def __init__(self, run: Path, job_id: str) -> None:
        self.file = run / FOLDER / OWNER_FILE
        self.me = {"job": job_id, "host": socket.gethostname(), "pid": os.getpid()}

    def acquire(self) -> None:
        """Raises:
        ValueError: a job that is alive holds the run.
        """
        mine = self.file.with_name(f"{OWNER_FILE}.{self.me['job']}")
        mine.write_text(json.dumps(self.me))
        try:
            for _ in range(10):
                with suppress(FileExistsError):
                    os.link(mine, self.file)  # if several try, one succeeds
                    return
                self._remove_the_dead()
            raise ValueError(f"{self.file} keeps changing: check which jobs are working in this run.")
        finally:
            mine.unlink(missing_ok=True)

    def _remove_the_dead(self) -> None:
        try:
            owner = json.loads(self.file.read_text())
            job_id, host, pid = str(owner["job"]), str(owner["host"]), int(owner["pid"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            job_id = host = ""
            pid = 0
        if job_id and job_id != self.me["job"] and is_alive(job_id, host, pid):
            raise ValueError(
                f"the run is held by job {job_id} on {host}, which is still running: wait for it, or cancel it. "
                f"(If it is not running, remove {self.file}.)"
            )
        taken = self.file.with_name(f"{OWNER_FILE}.dead-{self.me['job']}")
        with suppress(FileNotFoundError):
            self.file.rename(taken)
            taken.unlink()

    def release(self) -> None:
        with suppress(OSError, ValueError):
            if json.loads(self.file.read_text()) == self.me:
                self.file.unlink()


def is_alive(job_id: str, host: str, pid: int) -> bool:
    """Whether the job that holds a run is still running; if SLURM cannot be asked, it is assumed to be."""
    if job_id.startswith("local-"):
        return host != socket.gethostname() or Path(f"/proc/{pid}").exists()
    try:
        state = scheduler.states([job_id]).get(job_id)
    except scheduler.SchedulerError:
        return True
    return state is not None and state.is_active
