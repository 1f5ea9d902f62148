"""`bigtrain score`: every picture of a source scored once, by any number of processes, in a table.

    names are listed -> batches are read ahead -> scored -> rows (OUT.unfinished/, a file for some hundred) -> the table

A file of rows is written whole or not at all, so that the same command continues after whatever stopped it. Processes
share these files by their numbers and speak through them alone: no process group is formed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bigtrain.detectors.calibration import Threshold
from bigtrain.detectors.picture_judge import PictureJudge, first_of
from bigtrain.detectors.record import DETECTOR_FILE, sha256_of
from bigtrain.files import remove_unfinished, whole_file, write_json, write_text
from bigtrain.progress import Progress
from bigtrain.runtime.exit_codes import UNREADABLE
from bigtrain.serving.any_detector import any_detector, file_of
from bigtrain.serving.novel_pictures import Extras, write_page_of
from bigtrain.serving.read_ahead import Ready, batches_ahead
from bigtrain.serving.sources import Named, Reader, pictures_of
from bigtrain.serving.summary import Counts, summary_lines
from bigtrain.serving.table_files import Row, read_table, write_table, writer_for
from bigtrain.text import class_name, counted

ROWS = 256  # pictures, at least: what is scored again after a kill
WAIT_S = 0.2
PICTURES_FILE, JOB_FILE = "pictures.jsonl", "job.json"


@dataclass(frozen=True)
class Options:
    """Of the command; see its help."""

    detector: str
    images: str
    out: Path
    threshold: str = ""
    device: str | None = None
    batch: int | None = None
    known: tuple[str, ...] = ()
    maps: Path | None = None
    maps_raw: Path | None = None
    top: int = 50
    page: Path | None = None
    copy_novel: Path | None = None
    link_novel: Path | None = None
    resume: bool = False
    allow_private: bool = False


@dataclass(frozen=True)
class Place:
    """Of this process among those that a launcher has started: torchrun, accelerate, or srun."""

    rank: int = field(default_factory=lambda: _number("RANK", "SLURM_PROCID", otherwise=0))
    world_size: int = field(default_factory=lambda: _number("WORLD_SIZE", "SLURM_NTASKS", otherwise=1))
    local_rank: int = field(default_factory=lambda: _number("LOCAL_RANK", "SLURM_LOCALID", otherwise=0))


def _number(*names: str, otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), otherwise)


def score(options: Options) -> int:
    """Score, or continue; returns the exit code.

    Raises:
        ValueError: a mistake in the command; nothing has been written.
    """
    writer_for(options.out)
    place = Place()
    job = job_of(options)
    if place.rank == 0 and (code := finished_before(options, job)) is not None:
        return code
    detector = any_detector(options.detector, options.device, place.local_rank, place.world_size)
    threshold = detector.threshold(options.threshold)
    extras = Extras.of(options, detector)
    unfinished = unfinished_of(options.out)
    if options.resume:
        extras.first = (read_json(summary_file(options.out)) or {"pictures": 0})["pictures"]
    if place.rank == 0:
        begin(unfinished, job, options)
    else:
        wait_for(lambda: read_json(unfinished / JOB_FILE) == job, "the first process to list the pictures")
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
    counts = finish(options, job, unfinished, count, threshold, detector)
    print(summary_lines(counts, threshold, detector.calibration, options.out, progress.new, seconds), flush=True)
    if options.page:
        write_page_of(options, counts, detector, extras)
    return UNREADABLE if counts.unreadable else 0


def job_of(options: Options) -> dict[str, Any]:
    """What makes two commands the same job: the detector by its bytes, the pictures, the threshold."""
    file = file_of(options.detector)
    return {
        "detector": options.detector,
        "sha256": sha256_of(file / DETECTOR_FILE if file.is_dir() else file),
        "images": options.images if options.images == "-" or "://" in options.images else str(Path(options.images)),
        "threshold": options.threshold,
        "batch": options.batch,
        "resume": options.resume,
    }


def finished_before(options: Options, job: dict[str, Any]) -> int | None:
    """Refuse a table of another job; of the same job, say that it is finished and return its exit code."""
    out = options.out
    if read_json(unfinished_of(out) / JOB_FILE) == job:
        return None  # stopped on the way, perhaps between the table and what it leaves to be removed
    if not out.exists():
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: the folder {out.parent} does not exist: make it, or name another.")
        return None
    done = read_json(summary_file(out))
    if done is None:
        raise ValueError(f"--out {out} exists, and no summary beside it says what it is: give another name.")
    differ = [key for key in ("sha256", "images", "threshold", "batch") if done["job"].get(key) != job[key]]
    if differ:
        names = {"sha256": f"detector ({done['job'].get('detector')})"}
        what = ", ".join(names.get(key, f"{key} ({done['job'].get(key)!r})") for key in differ)
        raise ValueError(
            f"--out {out} holds scores of another {what}: give another name, or that command again, with --resume to "
            "add new pictures."
        )
    if options.resume:
        return None
    print(f"{out} is finished, nothing to do; --resume adds pictures that are new.", flush=True)
    return UNREADABLE if done["unreadable"] else 0


def begin(unfinished: Path, job: dict[str, Any], options: Options) -> None:
    """List the pictures, once; a job that was stopped keeps its list."""
    before = read_json(unfinished / JOB_FILE)
    if before is not None:
        if before != job:
            raise ValueError(
                f"{unfinished} holds the beginning of another job ({before['detector']} on {before['images']}, threshold "
                f"{before['threshold'] or 'its own'}): give another --out, or delete it."
            )
        remove_unfinished(unfinished)
        return
    names = pictures_of(options.images, may_be_private=options.allow_private)
    if options.resume and options.out.exists():
        judged = {row["path"] for row in read_table(options.out)}
        names = (named for named in names if text_of(named.name) not in judged)
    first = next(names, None)  # a source without pictures is an error before anything is written
    unfinished.mkdir(exist_ok=True)
    with whole_file(unfinished / PICTURES_FILE) as file:
        for named in [] if first is None else [first]:
            file.write(_line(named))
        file.writelines(_line(named) for named in names)
    write_json(unfinished / JOB_FILE, job)


def _line(named: Named) -> bytes:
    return json.dumps(named).encode("ascii") + b"\n"  # with what is no UTF-8 as surrogates


def listed(unfinished: Path) -> Iterator[tuple[Named, int]]:
    """Each picture of the list with its number."""
    with (unfinished / PICTURES_FILE).open(encoding="ascii") as file:
        for number, line in enumerate(file):
            yield Named(*json.loads(line)), number


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


def chunks(names: Iterable[Named], size: int) -> Iterator[list[Named]]:
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some


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
        row |= {"path": text_of(named.name), "why_not": why_not or None, "shows": named.classes}
        if not why_not:
            judged = next(rest)
            row |= {"score": judged.score, "p_value": judged.p_value, "novel": judged.novel, "class": judged.class_name}
            extras.write(first + place, named, judged)
        rows.append(row)
    return rows


def finish(
    options: Options,
    job: dict[str, Any],
    unfinished: Path,
    count: int,
    threshold: Threshold | None,
    detector: PictureJudge,
) -> Counts:
    """Join the files of rows to the table, count on the way, and remove them."""
    counts = Counts(options.top if options.page else 0, frozenset(map(class_name, options.known)))

    def rows() -> Iterator[Row]:
        before = set()
        if options.resume and options.out.exists():
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
    shutil.rmtree(unfinished)
    return counts


def unfinished_of(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def rows_file(unfinished: Path, number: int) -> Path:
    return unfinished / f"rows-{number:08d}.jsonl"


def summary_file(out: Path) -> Path:
    return out.with_name(out.name + ".summary.json")


def text_of(name: str) -> str:
    """A name as text; bytes that are no UTF-8 are written as \\x.."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def wait_for(is_done: Any, what: str, *, said_after_s: float = 30.0) -> None:
    began = said = time.monotonic()
    while not is_done():
        if time.monotonic() - said > said_after_s:
            said = time.monotonic()
            print(f"waiting for {what} ({counted(round(said - began), 'second')})", flush=True)
        time.sleep(WAIT_S)
