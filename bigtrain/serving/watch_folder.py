"""`bigtrain score --watch`: a folder's pictures are judged as they come, each once, over restarts too."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bigtrain.detectors.calibration import Threshold
from bigtrain.detectors.picture_judge import PictureJudge
from bigtrain.files import write_json
from bigtrain.images import IMAGE_EXTENSIONS
from bigtrain.runtime.exit_codes import UNREADABLE
from bigtrain.serving.any_detector import any_detector
from bigtrain.serving.novel_pictures import Extras
from bigtrain.serving.read_ahead import batches_ahead
from bigtrain.serving.score import rows_of
from bigtrain.serving.score_job import Options, Place, finished_before, job_of, summary_file, text_of
from bigtrain.serving.sources import Named, Reader, chunks, files_below
from bigtrain.serving.summary import Counts, summary_lines
from bigtrain.serving.table_files import COLUMNS, Row, csv_line, json_line, read_table
from bigtrain.text import clean, counted

LINES = {".csv": csv_line, ".jsonl": json_line}
SETTLES_WITHIN_S = 30.0  # a picture that cannot be read may still be on its way


def watch_folder(options: Options, *, every_s: float) -> int:
    """Judge what is in the folder and what comes, until SIGTERM or Ctrl-C; returns the exit code.

    Raises:
        ValueError: a mistake in the command.
    """
    folder, out = Path(options.images), options.out
    check(options, every_s)
    job = job_of(options)
    if out.exists():
        finished_before(Options(**{**vars(options), "resume": True}), job)
    detector = any_detector(options.detector, options.device)
    threshold = detector.threshold(options.threshold)
    extras, reader, counts = Extras.of(options, detector), Reader(options.images), Counts(known=frozenset())
    began, scored = time.monotonic(), 0
    with appended(out) as table, asked_to_stop() as stop:
        judged = {counts.seen({**row, "shows": ""}, None)["path"] for row in read_table(out)}
        write_json(summary_file(out), {"job": job, **counts.record()})
        extras.first = len(judged)
        extras.begin()
        print(f"watching {folder}: {counted(len(judged), 'picture')} judged before; Ctrl-C ends it", flush=True)
        arriving = Arriving(folder, judged)
        while not stop.is_set():
            for rows in judged_rows(arriving.settled(), detector, threshold, reader, extras, options.batch):
                kept = [row for row in rows if not (row["why_not"] and arriving.may_still_come(row["path"]))]
                table.write(b"".join(LINES[out.suffix](counts.seen(row, None)) for row in kept))
                table.flush()
                os.fsync(table.fileno())
                judged.update(row["path"] for row in kept)
                scored += len(kept)
                tell(kept)
                if stop.is_set():
                    break
            stop.wait(every_s)
    write_json(summary_file(out), {"job": job, **counts.record()})
    print(summary_lines(counts, threshold, detector.calibration, out, scored, time.monotonic() - began), flush=True)
    return UNREADABLE if counts.unreadable else 0


def check(options: Options, every_s: float) -> None:
    if not Path(options.images).is_dir():
        raise ValueError(f"--watch follows a folder, and --images {options.images} is none.")
    if options.out.suffix not in LINES:
        raise ValueError(f"--watch adds to the end of --out {options.out}, so it must end in {' or '.join(LINES)}.")
    if Place.here().world_size > 1:
        raise ValueError("--watch is one process: start it without a launcher.")
    if every_s <= 0:
        raise ValueError(f"--every {every_s} must be above 0 seconds.")
    if options.page or options.known:
        raise ValueError("--page and --known belong to a table that is finished: score it without --watch.")


def judged_rows(
    files: list[Path],
    detector: PictureJudge,
    threshold: Threshold | None,
    reader: Reader,
    extras: Extras,
    batch: int | None,
) -> Iterator[list[Row]]:
    names = [Named(str(file), str(file)) for file in files]
    size = batch or max(1, min(len(names), detector.scoring.batch))  # filling up would cost a batch for each picture
    if names and extras.scale is None:
        extras.fix_scale(detector, reader, names[:64])
    for ready in batches_ahead(chunks(names, size), reader, detector.view(), size):
        rows = rows_of(ready, detector, threshold, extras, 0)
        extras.first += len(rows)
        yield rows


class Arriving:
    """The pictures of a folder that are whole: the same size and time at two looks, one after another."""

    def __init__(self, folder: Path, judged: set[str]) -> None:
        self.folder, self.judged = folder, judged
        self._before: dict[str, tuple[int, int]] = {}

    def settled(self) -> list[Path]:
        found: list[Path] = []
        now: dict[str, tuple[int, int]] = {}
        for file in files_below(self.folder):
            if file.suffix[1:].lower() not in IMAGE_EXTENSIONS or text_of(str(file)) in self.judged:
                continue
            try:
                status = file.stat()
            except OSError:
                continue  # gone since it was listed
            now[str(file)] = (status.st_size, status.st_mtime_ns)
            if self._before.get(str(file)) == now[str(file)]:
                found.append(file)
        self._before = now
        return found

    def may_still_come(self, name: str) -> bool:
        """Whether a file that cannot be read was changed so lately that it is looked at again."""
        try:
            return time.time() - Path(name).stat().st_mtime < SETTLES_WITHIN_S
        except OSError:
            return False


def tell(rows: list[Row]) -> None:
    for row in rows:
        if row["why_not"]:
            print(f"cannot be read: {clean(row['path'])}: {clean(row['why_not'])}", flush=True)
        elif row["novel"]:
            p_value = "" if row["p_value"] is None else f", p {row['p_value']:.3g}"
            print(f"novel: {clean(row['path'])}: {row['score']:.6g}{p_value}", flush=True)


@contextmanager
def appended(out: Path) -> Iterator[IO[bytes]]:
    """A table to add lines to; a last line that a kill cut short is removed."""
    with out.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out {out}: another `score --watch` is adding to it.") from error
        file.seek(0)
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)
        if not whole and out.suffix == ".csv":
            file.write((",".join(COLUMNS) + "\n").encode())
            file.flush()
        yield file


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
