"""What a run says: a bar on a terminal, plain lines elsewhere, log.jsonl and TensorBoard always."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LINE_EVERY_S = 10.0  # without a terminal


class StageLog:
    """Progress and figures of one stage; only the main process writes.

    Args:
        folder: the run folder.
        stage: its name, e.g. "distil".
        steps: of the whole stage; `done` of them were taken by earlier starts.
        images_per_step: over all processes.
        every: steps between two rows of log.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        stage: str,
        *,
        steps: int,
        done: int,
        images_per_step: int,
        every: int,
    ) -> None:
        self.stage, self.steps, self.done, self.first, self.row_at = stage, steps, done, done, done
        self.images_per_step, self.every = images_per_step, every
        self.accelerator = accelerator
        self.writes = accelerator.is_main_process
        self.began = self.last_line = self.last_row = time.monotonic()
        self.waited_s, self.read_bytes = 0.0, 0  # since the last row
        self.reading: dict[str, float] = {}  # the figures of the last row
        if self.writes:
            self.file = continued(folder / "log.jsonl", stage, done).open("a", buffering=1)
            self.board = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=done)
            self.bar = tqdm(
                total=steps, initial=done, desc=stage, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )

    def step(
        self,
        *,
        wait_s: float = 0.0,
        read_bytes: int = 0,
        skipped: Mapping[str, int] | None = None,
        **values: Tensor | float,
    ) -> None:
        """Count a step, on all ranks; now and then write its figures, which stay on the device until then.

        Args:
            wait_s: how long this rank waited for its batch.
            read_bytes: what it read for it.
            skipped: the samples that it has left out so far, by reason.
        """
        self.done += 1
        self.waited_s += wait_s
        self.read_bytes += read_bytes
        now = time.monotonic()
        row_due = self.done % self.every == 0 or self.done == self.steps
        if row_due:
            self.reading = self.over_ranks(now - self.last_row, skipped or {})
            self.row_at, self.last_row, self.waited_s, self.read_bytes = self.done, now, 0.0, 0
        if not self.writes:
            return
        self.bar.update()
        line_due = self.bar.disable and (now - self.last_line > LINE_EVERY_S or self.done == self.steps)
        if not (row_due or line_due):
            return
        numbers = {name: float(value) for name, value in values.items()}
        numbers |= self.reading
        if torch.cuda.is_available():
            numbers["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if row_due:
            self.file.write(json.dumps({"stage": self.stage, "step": self.done, "time": time.time(), **numbers}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self.done)
            self.bar.set_postfix_str(shown(numbers))
        if line_due:
            left_s = (now - self.began) / (self.done - self.first) * (self.steps - self.done)
            print(f"{self.stage}  step {self.done}/{self.steps}  {shown(numbers)}  left {clock(left_s)}", flush=True)
            self.last_line = now

    def over_ranks(self, elapsed_s: float, skipped: Mapping[str, int]) -> dict[str, float]:
        """Speed and reading since the last row: the longest wait of a rank, all ranks' bytes, all samples left out."""
        here = {"wait_s": self.waited_s, "bytes": self.read_bytes, "skipped": dict(skipped)}
        ranks = gather_object([here])
        figures = {
            "images_per_s": (self.done - self.row_at) * self.images_per_step / max(elapsed_s, 1e-9),
            "data_wait_percent": 100 * max(rank["wait_s"] for rank in ranks) / max(elapsed_s, 1e-9),
            "read_mb_per_s": sum(rank["bytes"] for rank in ranks) / max(elapsed_s, 1e-9) / 1e6,
        }
        for kind in sorted({kind for rank in ranks for kind in rank["skipped"]}):
            figures["skipped_" + kind.replace(" ", "_")] = sum(rank["skipped"].get(kind, 0) for rank in ranks)
        return figures

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            self.board.close()
            self.file.close()


SHOWN = {  # the rest as "loss 0.1234"
    "images_per_s": "{:.0f} images/s",
    "data_wait_percent": "waits for data {:.0f} %",
    "read_mb_per_s": "reads {:.1f} MB/s",
    "memory_gib": "{:.1f} GiB",
}


def shown(numbers: Mapping[str, float]) -> str:
    """Figures as a person reads them: "loss 0.1234  72 images/s  waits for data 3 %"."""
    return "  ".join(SHOWN.get(name, name.replace("_", " ") + " {:.4g}").format(n) for name, n in numbers.items())


def continued(path: Path, stage: str, done: int) -> Path:
    """Leave out of a log the rows of steps that are taken again, those behind the checkpoint of a killed start."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if not is_row_after(row, stage, done)]
    if len(kept) < len(rows):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return path


def is_row_after(row: str, stage: str, done: int) -> bool:
    try:
        record = json.loads(row)
    except json.JSONDecodeError:
        return True  # the row at which the run was killed
    return record["stage"] == stage and record["step"] > done


def clock(seconds: float) -> str:
    """4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def show_warnings(rank: int) -> None:
    """Let the library's warnings (a skipped picture, a fallback) reach the terminal as plain lines.

    What all ranks would say alike (`extra={"of_all_ranks": True}`) is said by the first.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: rank == 0 or not getattr(record, "of_all_ranks", False))
