"""A process of a job: which one it is, and how it finds the others."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment

from bigtrain.files import write_text
from slurm.run_record import FOLDER, events, tell

MEETING_FILE = "meeting.json"
MEETING_S = 180  # a network file system may show a new file late


@dataclass(frozen=True)
class Task:
    """Which process of which job this is."""

    run: Path
    job_id: str
    restarts: int
    rank: int
    processes: int
    local_rank: int
    local_processes: int
    first_host: str
    on_slurm: bool

    @classmethod
    def of_this_process(cls, run: Path) -> Task:
        told = JobEnvironment()
        on_slurm = told.cluster == "slurm"
        return cls(
            run=run,
            job_id=told.job_id if on_slurm else f"local-{told.job_id}",
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if on_slurm else 0,
            rank=told.global_rank,
            processes=told.num_tasks,
            local_rank=told.local_rank,
            local_processes=told.num_tasks // told.num_nodes,
            first_host=told.hostnames[0] if on_slurm else "127.0.0.1",
            on_slurm=on_slurm,
        )

    def tell(self, event: str, **further: object) -> None:
        tell(self.run, event, job=self.job_id, restarts=self.restarts, **further)

    def of_this_life(self, *names: str) -> list[dict[str, object]]:
        """What has been told of this life, by any rank."""
        mine = {"job": self.job_id, "restarts": self.restarts}
        return [row for row in events(self.run) if row["event"] in names and mine.items() <= row.items()]


def gather(task: Task, port: int | None) -> None:
    """Tell the other ranks of this life where to meet; None: nowhere."""
    record = {"job": task.job_id, "restarts": task.restarts, "port": port}
    write_text(task.run / FOLDER / MEETING_FILE, json.dumps(record) + "\n")


def met(task: Task) -> int | None:
    """Another rank: wait for what rank 0 says.

    Raises:
        ValueError: it says nothing that this process can see.
    """
    file, until = task.run / FOLDER / MEETING_FILE, time.monotonic() + MEETING_S
    while time.monotonic() < until:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            record = {}
        if (record.get("job"), record.get("restarts")) == (task.job_id, task.restarts):
            return record["port"]
        time.sleep(0.2)
    raise ValueError(
        f"rank {task.rank} has seen no word of rank 0 in {file} for {MEETING_S} s: the run's folder must lie on a file "
        "system that all nodes share."
    )
