"""One process of a job: its rank, and where it meets the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from bigtrain.files import write_text
from slurm.run_record import FOLDER, events, record_event

MEETING_FILE = "meeting.json"
MEETING_S = 180  # a network file system may show a new file late


class Process(NamedTuple):
    """Which process of which job this is."""

    run: Path
    job_id: str
    restarts: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    first_host: str
    on_slurm: bool

    def record_event(self, event: str, **further: object) -> None:
        record_event(self.run, event, job=self.job_id, restarts=self.restarts, **further)

    def events_of_attempt(self, *names: str) -> list[dict[str, object]]:
        """What any rank has recorded of this attempt."""
        mine = {"job": self.job_id, "restarts": self.restarts}
        return [row for row in events(self.run) if row["event"] in names and mine.items() <= row.items()]


def publish_port(process: Process, port: int | None) -> None:
    """Rank 0: tell the other ranks of this attempt where to meet; None: there is nothing to do."""
    record = {"job": process.job_id, "restarts": process.restarts, "port": port}
    write_text(process.run / FOLDER / MEETING_FILE, json.dumps(record) + "\n")


def wait_for_port(process: Process) -> int | None:
    """Another rank: wait until rank 0 has published the port.

    Raises:
        ValueError: nothing appears within MEETING_S.
    """
    file, until = process.run / FOLDER / MEETING_FILE, time.monotonic() + MEETING_S
    while time.monotonic() < until:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            record = {}
        if (record.get("job"), record.get("restarts")) == (process.job_id, process.restarts):
            return record["port"]
        time.sleep(0.2)
    raise ValueError(
        f"rank {process.rank} heard nothing from rank 0 in {file} for {MEETING_S} s: the run's folder must lie on a "
        "file system that all nodes share."
    )
