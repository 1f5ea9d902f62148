"""`bigtrain score`: every picture of a source scored once, by any number of processes, in a table.

    names are listed -> batches are read ahead -> scored -> rows (OUT.unfinished/, a file for some hundred) -> the table

A file of rows is written whole or not at all, so that the same command continues after whatever stopped it. Processes
share these files by their numbers and speak through them alone: no process group is formed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bigtrain.detectors.calibration import Threshold
from bigtrain.detectors.picture_judge import PictureJudge, first_of
from bigtrain.files import write_json, write_text
from bigtrain.progress import Progress
from bigtrain.runtime.exit_codes import UNREADABLE
from bigtrain.serving.any_detector import any_detector
from bigtrain.serving.novel_pictures import Extras, write_page_of
from bigtrain.serving.read_ahead import Ready, batches_ahead
from bigtrain.serving.score_job import (
    JOB_FILE,
    Options,
    Place,
    begin,
    finished_before,
    job_of,
    listed,
    read_json,
    rows_file,
    summary_file,
    text_of,
    unfinished_of,
    wait_for,
)
from bigtrain.serving.sources import Named, Reader, chunks
from bigtrain.serving.summary import Counts, summary_lines
from bigtrain.serving.table_files import Row, read_table, write_table, writer_for
from bigtrain.text import class_name

ROWS = 256  # pictures, at least: what is scored again after a kill


def score(options: Options) -> int:
    """Score, or continue; returns the exit code.

    Raises:
        ValueError: a mistake in the command; nothing has been written.
    """
    writer_for(options.out)
    place = Place.here()
    job = job_of(options)
    if (code := finished_before(options, job)) is not None:
        return code
    detector = any_detector(options.detector, options.device, place.local_rank, place.world_size)
    threshold = detector.threshold(options.threshold)
    extras = Extras.of(options, detector)
    unfinished = unfinished_of(options.out)
    if job["resume"]:
        extras.first = (read_json(summary_file(options.out)) or {"pictures": 0})["pictures"]
    if place.rank == 0:
        begin(unfinished, job, options)
    else:
        wait_for(lambda: is_listed(unfinished, job, options), "the first process to list the pictures")
        if not unfinished.is_dir():
            return 0  # so few pictures that the others have finished
    extras.begin()
    total = sum(1 for _ in listed(unfinished))
    reader = Reader(options.images, may_be_private=options.allow_private)
    extras.fix_scale(detector, reader, [named for named, _ in islice(listed(unfinished), 64)])
    size = options.batch or detector.scoring.batch
    rows_size = -(-ROWS // size) * size
    with Progress(total, is_shown=place.rank == 0, has_bar=place.world_size == 1) as progress:
        began = time.monotonic()
        score_rest(unfinished, rows_size, place, detector, threshold, reader, size, extras, progress)
        count = -(-total // rows_size)
        if place.rank:
            return 0
        wait_for(lambda: all(rows_file(unfinished, number).is_file() for number in range(count)), "the other processes")
    seconds = time.monotonic() - began
    counts = finish(options, job, unfinished, count, threshold)
    by = "now" if place.world_size == 1 else "by this process"
    print(summary_lines(counts, threshold, detector.calibration, options.out, progress.new, seconds, by), flush=True)
    if options.page:
        write_page_of(options, counts, detector, extras)
    extras.tell()
    shutil.rmtree(unfinished)
    return UNREADABLE if counts.unreadable else 0


def is_listed(unfinished: Path, job: dict[str, Any], options: Options) -> bool:
    """Whether the first process has listed the pictures, or the whole job is done already."""
    done = read_json(summary_file(options.out))
    return read_json(unfinished / JOB_FILE) == job or (
        done is not None and {**done["job"], "resume": job["resume"]} == job
    )


def score_rest(
    unfinished: Path,
    rows_size: int,
    place: Place,
    detector: PictureJudge,
    threshold: Threshold | None,
    reader: Reader,
    size: int,
    extras: Extras,
    progress: Progress,
) -> None:
    """Score this process's share of the files of rows that no earlier start has written."""
    own = list[int]()

    def batches() -> Iterator[Sequence[Named]]:
        for number, some in enumerate(chunks((named for named, _ in listed(unfinished)), rows_size)):
            if rows_file(unfinished, number).is_file():
                progress.add(len(some), is_new=False)
            elif number % place.world_size == place.rank:
                for start in range(0, len(some), size):
                    own.append(number)
                    yield some[start : start + size]

    rows: list[Row] = []
    ready_batches = batches_ahead(batches(), reader, detector.view(), size)
    for done, ready in enumerate(ready_batches):
        first = own[done] * rows_size + len(rows)
        rows += rows_of(ready, detector, threshold, extras, first)
        progress.add(len(ready.named))
        if done + 1 == len(own) or own[done + 1] != own[done]:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(rows_file(unfinished, own[done]), text, "renamed")
            rows = []


def rows_of(ready: Ready, detector: PictureJudge, threshold: Threshold | None, extras: Extras, first: int) -> list[Row]:
    """The rows of a batch, in its order; `first` is the number of its first picture."""
    judgements: Iterable[Any] = ()
    if ready.image_B3HW is not None:
        found = first_of(detector.score_views(ready.image_B3HW), int(ready.is_read_b.sum()))
        judgements = detector.judgements(found, None if threshold is None else threshold.value)
    rest = iter(judgements)
    rows: list[Row] = []
    for place, (named, why_not) in enumerate(zip(ready.named, ready.why_not, strict=True)):
        row: Row = dict.fromkeys(("score", "p_value", "novel", "class"))
        row |= {"path": text_of(named.name), "why_not": text_of(why_not) or None, "shows": named.classes}
        judged = None if why_not else next(rest)
        if judged is not None and not math.isfinite(judged.score):
            row["why_not"] = f"its score is {judged.score}: look for an overflow in the network"
        elif judged is not None:
            row |= {"score": judged.score, "p_value": judged.p_value, "novel": judged.novel, "class": judged.class_name}
            extras.write(first + place, named, judged)
        rows.append(row)
    return rows


def finish(options: Options, job: dict[str, Any], unfinished: Path, count: int, threshold: Threshold | None) -> Counts:
    """Join the files of rows to the table, and count on the way."""
    counts = Counts(options.top if options.page else 0, frozenset(map(class_name, options.known)))

    def rows() -> Iterator[Row]:
        before = set()
        if job["resume"]:
            for row in read_table(options.out):
                before.add(row["path"])
                yield counts.seen({**row, "shows": ""}, None)
        named = (each for each, _ in listed(unfinished))
        for number in range(count):
            for line in rows_file(unfinished, number).read_text(encoding="utf-8").splitlines():
                row, its = json.loads(line), next(named)
                if row["path"] not in before:  # else joined already, before a kill
                    yield counts.seen(row, its)

    write_table(options.out, rows())
    record = {"job": job, **counts.record(), "threshold": None if threshold is None else threshold._asdict()}
    write_json(summary_file(options.out), record)
    return counts
