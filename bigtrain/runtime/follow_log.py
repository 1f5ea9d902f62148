"""Reading a run's log.jsonl while it is written: its stages, their figures, its events. Needs no torch."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRESS_FILE = "progress.json"
KEPT_ROWS = 4096  # of a stage, for the curve
SHOWN = {  # figures in readable units; the rest as "loss 0.1234"
    "images_per_s": "{:.0f} images/s",
    "images_per_s_per_process": "{:.0f} images/s per process",
    "data_wait_percent": "waits for data {:.0f} %",
    "read_mb_per_s": "reads {:.1f} MB/s",
    "memory_gib": "{:.1f} GiB",
    "mfu_percent": "MFU {:.1f} %",
    "checkpoint_s": "waited {:.1f} s to save",
}


class Follower:
    """Reads what has been added to a log since the last look; starts over where the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.stages: dict[str, LoggedStage] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=5)
        self.times: deque[float] = deque(maxlen=20)
        self._place, self._inode, self._half = 0, -1, b""

    def look(self) -> None:
        try:
            with self.path.open("rb") as file:
                about = self.path.stat()
                if about.st_ino != self._inode or about.st_size < self._place:
                    self._forget()
                    self._inode = about.st_ino
                file.seek(self._place)
                added = self._half + file.read()
                self._place = file.tell()
        except FileNotFoundError:
            return
        *rows, self._half = added.split(b"\n")
        for row in rows:
            self._take(row)
        self._take_progress()

    def _take_progress(self) -> None:
        """The step that the run is at, which is ahead of the newest row."""
        try:
            record = json.loads((self.path.parent / PROGRESS_FILE).read_text())
            stage, at = self.stages[record["stage"]], float(record["time"])
            is_newer = math.isfinite(at) and at >= max(self.times, default=0.0)  # not of a start before this one
            if stage is self.newest and is_newer and stage.step < int(record["step"]) <= int(record["steps"]):
                stage.step = int(record["step"])
                self.times.append(at)
        except (OSError, ValueError, KeyError, TypeError):
            return

    def _take(self, row: bytes) -> None:
        try:
            record = json.loads(row)
            name, step, at = str(record["stage"]), int(record["step"]), float(record["time"])
            if not math.isfinite(at):
                return
        except (ValueError, KeyError, TypeError, OverflowError):
            return  # no row of ours, or one that was being written when the run was killed
        stage = self.stages.setdefault(name, LoggedStage(name))
        stage.step = step
        self.times.append(at)
        if "event" in record:
            self.events.append(record)
            return
        stage.steps = record["steps"] if isinstance(record.get("steps"), int) else stage.steps
        stage.last = record
        if is_number(loss := record.get("loss")):
            stage.losses.append((step, float(loss)))

    @property
    def newest(self) -> LoggedStage | None:
        return list(self.stages.values())[-1] if self.stages else None


@dataclass
class LoggedStage:
    """What the log holds of one stage."""

    name: str
    step: int = 0
    steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT_ROWS))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(numbers: Mapping[str, float]) -> str:
    """Figures as a person reads them: "loss 0.1234  72 images/s  waits for data 3 %"."""
    return "  ".join(SHOWN.get(name, name.replace("_", " ") + " {:.4g}").format(n) for name, n in numbers.items())
