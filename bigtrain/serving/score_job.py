"""The files of a scoring job: its list of pictures, the rows that are written, what it may be taken for.

OUT.unfinished/job.json         what the job is: written when the list is whole
OUT.unfinished/pictures.jsonl   a picture a line, in the order of the table
OUT.unfinished/rows-*.jsonl     the rows of some hundred pictures, each file whole or absent
OUT.summary.json                beside a finished table: what it is
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.detectors.record import DETECTOR_FILE, sha256_of
from bigtrain.files import remove_unfinished, whole_file, write_json
from bigtrain.runtime.exit_codes import UNREADABLE
from bigtrain.serving.any_detector import file_of
from bigtrain.serving.sources import Named, pictures_of
from bigtrain.serving.table_files import read_table
from bigtrain.text import UNSAFE, counted

WAIT_S, WAIT_LIMIT_S = 0.2, 3600.0
BESIDE = ("page", "maps", "maps_raw", "copy_novel", "link_novel", "known")  # options of what a table does not hold
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

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Place:
        """By the variables of the nearest launcher: srun's are those of its step, which a batch script has not."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ):  # fmt: skip
            values = [os.environ.get(name, "") for name in names]
            if all(value.isdigit() for value in values):
                return cls(*map(int, values))
        return cls()


def job_of(options: Options) -> dict[str, Any]:
    """What makes two commands the same job: the detector by its bytes, the pictures, the threshold. `resume`: rows are
    added to a table; of a job that was stopped, whether that was so when it began."""
    file = file_of(options.detector)
    job = {
        "detector": options.detector,
        "sha256": sha256_of(file / DETECTOR_FILE if file.is_dir() else file),
        "images": options.images if options.images == "-" or "://" in options.images else str(Path(options.images)),
        "threshold": options.threshold,
        "batch": options.batch,
        "resume": options.resume and options.out.exists(),
    }
    stopped = read_json(unfinished_of(options.out) / JOB_FILE)
    return stopped if isinstance(stopped, dict) and {**stopped, "resume": job["resume"]} == job else job


def finished_before(options: Options, job: dict[str, Any]) -> int | None:
    """Refuse a table of another job; of the same job, say that it is finished and return its exit code. Every process
    asks, the first one says so."""
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
    if Place.here().rank == 0:
        left_out = [f"--{name.replace('_', '-')}" for name in BESIDE if getattr(options, name)]
        also = f" ({', '.join(left_out)} belong to a new table: give another --out)" if left_out else ""
        print(f"{out} is finished, nothing to do; --resume adds pictures that are new{also}.", flush=True)
    return UNREADABLE if done["unreadable"] else 0


def begin(unfinished: Path, job: dict[str, Any], options: Options) -> None:
    """List the pictures, once; a job that was stopped keeps its list."""
    before = read_json(unfinished / JOB_FILE)
    if before is not None:
        if before != job:
            raise ValueError(
                f"{unfinished} holds the beginning of another job ({before['detector']} on {before['images']}, "
                f"threshold {before['threshold'] or 'its own'}): give another --out, or delete it."
            )
        remove_unfinished(unfinished, is_shared=True)  # others may have begun
        return
    names = pictures_of(options.images, may_be_private=options.allow_private)
    if job["resume"]:
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


def unfinished_of(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def rows_file(unfinished: Path, number: int) -> Path:
    return unfinished / f"rows-{number:08d}.jsonl"


def summary_file(out: Path) -> Path:
    return out.with_name(out.name + ".summary.json")


def text_of(name: str) -> str:
    """A name, or a reason, on one line of text: bytes that are no UTF-8, and control characters, as \\x.."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def wait_for(is_done: Callable[[], bool], what: str, *, said_after_s: float = 30.0) -> None:
    """Raises ValueError: it has taken WAIT_LIMIT_S, so the other processes have ended or hang."""
    began = said = time.monotonic()
    while not is_done():
        if time.monotonic() - began > WAIT_LIMIT_S:
            raise ValueError(f"{what} could be waited for no longer: look at the other processes' messages.")
        if time.monotonic() - said > said_after_s:
            said = time.monotonic()
            print(f"waiting for {what} ({counted(round(said - began), 'second')})", flush=True)
        time.sleep(WAIT_S)
