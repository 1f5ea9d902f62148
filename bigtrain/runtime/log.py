"""The log of a run: a progress bar on a terminal, plain lines elsewhere, log.jsonl and TensorBoard always."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from bigtrain.files import write_json, write_text
from bigtrain.runtime.follow_log import PROGRESS_FILE, shown
from bigtrain.runtime.trackers import log_figures
from bigtrain.text import clean, clock

LINE_EVERY_S = 10.0  # without a terminal
TELL_EVERY_S = 1.0  # PROGRESS_FILE
EVENTS = ("started", "ended", "compiled", "saved", "stopped", "step skipped", "failed", "finished")


class StageLog:
    """Progress and figures of one stage; only the main process writes.

    Args:
        folder: the run folder.
        stage: its name, e.g. "distil".
        steps: of the whole stage; `done` of them were taken by earlier starts.
        images_per_step: over all processes.
        every: steps between two rows of log.jsonl.
        flops_per_step: of the model over all processes, for its share of the devices' peak; 0: not known.
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
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
    ) -> None:
        self.stage, self.steps, self.done, self.first, self.row_at = stage, steps, done, done, done
        self.images_per_step, self.every = images_per_step, every
        self.flops_per_step, self.peak_flops = flops_per_step, peak_flops
        self.accelerator = accelerator
        self.writes = accelerator.is_main_process
        self.folder = folder
        self.began = self.last_line = self.last_row = self.told = time.monotonic()
        self.waited_s, self.read_bytes, self.saving_s = 0.0, 0, 0.0  # since the last row
        self.reading: dict[str, float] = {}  # the figures of the last row
        self.skipped_steps = 0
        if self.writes:
            path = folder / "log.jsonl"
            self.before = continued(path, stage, done)
            self.file = path.open("a", buffering=1)
            from torch.utils.tensorboard import SummaryWriter  # half a second: on this rank alone

            self.board = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=done + 1)
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
        """Count a step, on all ranks; now and then write its figures.

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
        if now - self.told > TELL_EVERY_S or self.done == self.steps:  # rows are further apart
            self.told = now
            record = {"stage": self.stage, "step": self.done, "steps": self.steps, "time": time.time()}
            with suppress(OSError):  # nothing but `watch` needs it
                write_json(self.folder / PROGRESS_FILE, record, "renamed")
        line_due = self.bar.disable and (now - self.last_line > LINE_EVERY_S or self.done == self.steps)
        if not (row_due or line_due):
            return
        left_s = (now - self.began) / (self.done - self.first) * (self.steps - self.done)
        numbers = {name: float(value) for name, value in values.items()} | self.reading
        if self.skipped_steps:
            numbers["skipped_steps"] = self.skipped_steps
        if row_due:
            self._write({"steps": self.steps, **numbers, "left_s": round(left_s, 1)})
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self.done)
            log_figures(self.accelerator, self.stage, numbers, self.before + self.done)
            self.bar.set_postfix_str(shown(numbers))
        if line_due:
            print(f"{self.stage}  step {self.done}/{self.steps}  {shown(numbers)}  left {clock(left_s)}", flush=True)
            self.last_line = now

    def event(self, event: str, text: str = "", **further: Any) -> None:
        """Write an event to log.jsonl: one of EVENTS."""
        assert event in EVENTS
        if self.writes:
            self._write({"event": event, "text": text, **further})

    def saved(self, seconds: float, step: int) -> None:
        """Log a checkpoint that is whole now, and the seconds that training waited for it."""
        self.saving_s += seconds
        what = f"checkpoint of step {step}; training waited {seconds:.2f} s"
        self.event("saved", what, step=step, checkpoint_s=round(seconds, 3))

    def skipped(self, why: str, keys: Sequence[str]) -> None:
        """Log a skipped step and its samples."""
        self.skipped_steps += 1
        self.event("step skipped", why, keys=list(keys))
        if self.writes:
            print(f"{self.stage}  step {self.done} was skipped: {why} (its pictures are in log.jsonl)", flush=True)

    def over_ranks(self, elapsed_s: float, skipped: Mapping[str, int]) -> dict[str, float]:
        """Speed and reading since the last row: the longest wait of a rank, all ranks' bytes, all samples left out."""
        here = {"wait_s": self.waited_s, "bytes": self.read_bytes, "skipped": dict(skipped), "gib": memory_gib()}
        ranks = gather_object([here])
        per_s = (self.done - self.row_at) / max(elapsed_s, 1e-9)
        figures = {
            "images_per_s": per_s * self.images_per_step,
            "images_per_s_per_process": per_s * self.images_per_step / len(ranks),
            "data_wait_percent": 100 * max(rank["wait_s"] for rank in ranks) / max(elapsed_s, 1e-9),
            "read_mb_per_s": sum(rank["bytes"] for rank in ranks) / max(elapsed_s, 1e-9) / 1e6,
            "memory_gib": max(rank["gib"] for rank in ranks),
        }
        if self.flops_per_step and self.peak_flops:
            figures["mfu_percent"] = 100 * per_s * self.flops_per_step / (self.peak_flops * len(ranks))
        if self.saving_s:
            figures["checkpoint_s"], self.saving_s = self.saving_s, 0.0
        for kind in sorted({kind for rank in ranks for kind in rank["skipped"]}):
            figures["skipped_" + kind.replace(" ", "_")] = sum(rank["skipped"].get(kind, 0) for rank in ranks)
        return figures

    def _write(self, row: Mapping[str, Any]) -> None:
        # JSON has no NaN or infinity
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        record = {"stage": self.stage, "step": self.done, "time": time.time(), **finite}
        self.file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            self.board.close()
            self.file.close()


def memory_gib() -> float:
    """Peak memory of this process: of its GPU, or where there is none, of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def continued(path: Path, stage: str, done: int) -> int:
    """Drop from a log the rows of steps after the checkpoint of a killed start: they are taken again.

    Returns:
        The steps of the other stages, so that trackers see steps that only rise.
    """
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if not is_row_after(row, stage, done)]
    if len(kept) < len(rows):
        write_text(path, "".join(kept), "renamed")
    steps: dict[str, int] = {}
    for record in map(json.loads, kept):
        if record["stage"] != stage:
            steps[record["stage"]] = max(steps.get(record["stage"], 0), record["step"])
    return sum(steps.values())


def is_row_after(row: str, stage: str, done: int) -> bool:
    try:
        record = json.loads(row)
    except json.JSONDecodeError:
        return True  # the row at which the run was killed
    return record["stage"] == stage and record["step"] > done


class CleanFormatter(logging.Formatter):
    """Names of pictures and classes come from outside."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def show_warnings(rank: int) -> None:
    """Let the library's warnings (a skipped picture, a fallback) reach the terminal as plain lines.

    What all ranks would log alike (`extra={"of_all_ranks": True}`) is logged by the first.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(CleanFormatter("%(message)s"))
        handler.addFilter(lambda record: rank == 0 or not getattr(record, "of_all_ranks", False))
