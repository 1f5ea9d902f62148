"""The status of runs, from their folders and from what SLURM knows of their jobs. Read only."""

from __future__ import annotations

import codecs
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.runtime.follow_log import Follower
from bigtrain.text import clean, clock
from slurm import scheduler
from slurm.run_record import FOLDER, JOB_FILE, RESULTS_FILE, JobSpec, events, is_alive

SWEEP_FILE = "sweep.json"
ENDED_BADLY = {
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "OUT_OF_MEMORY": "out of memory: raise mem_gb, or lower the batch",
    "TIMEOUT": "ran into its time limit before it could save: raise signal_delay_s",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline has passed",
    "PREEMPTED": "preempted and not queued again",
}


class RunStatus(NamedTuple):
    """One run: done, running, waiting, failed, cancelled, stopped, lost, or new."""

    run: Path
    state: str
    detail: str = ""
    job: str = ""
    requeued: int = 0

    @property
    def is_live(self) -> bool:
        return self.state in ("running", "waiting")


def runs_in(folder: Path) -> list[Path]:
    """The runs of a sweep's folder, or the one run of a folder.

    Raises:
        ValueError: there are none.
    """
    if record := sweep_record(folder)["runs"]:
        return [folder / row["name"] for row in record]
    if (folder / FOLDER / JOB_FILE).is_file():
        return [folder]
    if found := sorted(file.parents[1] for file in folder.glob(f"*/{FOLDER}/{JOB_FILE}")):
        return found
    raise ValueError(
        f"{folder} holds neither a sweep nor a submitted run: name the folder that `bigtrain-slurm submit` or `sweep` "
        "has printed."
    )


def sweep_record(folder: Path) -> dict[str, Any]:
    """What a sweep has written about its runs; of a folder without a sweep, none."""
    file = folder / SWEEP_FILE
    return json.loads(file.read_text()) if file.is_file() else {"max_parallel": 100, "runs": []}


def statuses(runs: Sequence[Path]) -> list[RunStatus]:
    """The status of each run; from the folders alone if SLURM does not answer."""
    histories = {run: events(run) for run in runs}
    ids = {run: newest_job(history) for run, history in histories.items()}
    try:
        known = scheduler.states(job for job in ids.values() if job and not job.startswith("local-"))
    except scheduler.SchedulerError:
        known = {}
    return [status_of(run, histories[run], ids[run], known.get(ids[run])) for run in runs]


def newest_job(history: Iterable[Mapping[str, Any]]) -> str:
    """The job a run was last submitted as."""
    return next((str(row["job"]) for row in reversed(list(history)) if row["event"] == "submitted"), "")


def status_of(run: Path, history: Sequence[Mapping[str, Any]], job: str, state: scheduler.JobState | None) -> RunStatus:
    """The status of a run, given its history and SLURM's state of its newest job."""
    own = [row for row in history if row.get("job") == job]
    requeued = sum(row["event"] in ("requeued", "lost") for row in own)

    def as_status(word: str, detail: str = "") -> RunStatus:
        return RunStatus(run, word, detail, job, requeued)

    if (run / RESULTS_FILE).is_file():
        return as_status("done")
    if not job:
        return as_status("new", "not submitted yet")
    if state and state.is_waiting:
        return as_status("waiting", state.reason)
    last = next((row for row in reversed(own) if row["event"] not in ("submitted", "lost")), None)
    is_here = job.startswith("local-") and is_alive(job, str(own[-1].get("host")), int(job.removeprefix("local-")))
    if (state and state.is_active) or is_here:
        return as_status("running", progress(run) or ("ending" if last and last["event"] != "started" else "starting"))
    failed = next((row for row in reversed(own) if row["event"] in ("failed", "started")), None)
    if failed and failed["event"] == "failed":
        where = f" (rank {failed['rank']} on {failed['host']})" if failed.get("rank") else ""
        return as_status("failed", f"{failed.get('error') or failed.get('why') or ''}{where}")
    if last and last["event"] in ("cancelled", "stopped"):
        return as_status(last["event"], str(last.get("why", "")))
    if state and state.name in ENDED_BADLY:
        why = ENDED_BADLY[state.name]
        return as_status("cancelled") if why == "cancelled" else as_status("failed", why)
    if state and state.name == "FAILED":
        return as_status("failed", last_line(run, job))
    if last is None and log_files(run, job):  # a line of the cluster file's setup failed, say
        return as_status("failed", last_line(run, job))
    if last is None:
        return as_status("lost", "SLURM no longer knows its job, which never started")
    return as_status("lost", "its last attempt ended unexpectedly")


def progress(run: Path) -> str:
    """Step, speed and time left, from the run's log."""
    follower = Follower(run / "log.jsonl")
    follower.look()
    if not (stage := follower.newest):
        return ""
    words = [f"{stage.name} {stage.step}" + (f" of {stage.steps}" if stage.steps else "")]
    figures = stage.last
    if isinstance(speed := figures.get("images_per_s"), int | float):
        words.append(f"{speed:.0f} images/s")
    if isinstance(left := figures.get("left_s"), int | float):
        words.append(f"{clock(left)} left")
    return ", ".join(words)


def last_line(run: Path, job: str) -> str:
    """The last line of the first process's log, for a job that ended before it could record why."""
    newest = [line for file in log_files(run, job)[:1] for line in tail(file)]
    lines = [line for line in newest if line.strip() and not line.startswith("submitit ")]
    return lines[-1] if lines else "it left no log"


def log_files(run: Path, job: str) -> list[Path]:
    """A job's logs, one a process: failed ranks first, then by rank."""
    failed = {row.get("rank") for row in events(run) if row["event"] == "failed" and row.get("job") == job}

    def place(log: Path) -> tuple[bool, int]:
        rank = int(log.stem.split("_")[-2])
        return rank not in failed, rank

    return sorted(Path(JobSpec.read(run).logs).glob(f"{job.removeprefix('local-')}_*_log.out"), key=place)


def tail(file: Path, lines: int = 40) -> list[str]:
    """The last lines of a log."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 200 * lines))
        return opened.read().decode(errors="replace").splitlines()[-lines:]


def table(found: Sequence[RunStatus], root: Path) -> list[str]:
    """Lines to print."""
    rows = []
    for one in found:
        name = one.run.name if one.run != root else str(one.run)
        detail = one.detail + (f"{', ' if one.detail else ''}requeued {one.requeued} times" if one.requeued else "")
        rows.append((name, one.state, one.job, detail))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        clean("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()) for row in rows
    ]
    return [*lines, count_of(found)] if len(found) > 1 else lines


def count_of(found: Sequence[RunStatus]) -> str:
    count = Counter(one.state for one in found)
    return f"{len(found)} runs: " + ", ".join(f"{number} {how}" for how, number in count.most_common())


def follow(files: Sequence[Path], until_ended: Sequence[Path]) -> None:
    """Print what is added to logs until none of the runs is live."""
    places = dict.fromkeys(files, 0)
    looked = 0.0
    while True:
        for file, place in places.items():
            places[file] = print_from(file, place)
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            if not any(one.is_live for one in statuses(until_ended)):
                return
        time.sleep(0.5)


def print_from(log: Path, place: int) -> int:
    """Print what was added to a log, if it is there yet; the place up to which it is printed now."""
    try:
        with log.open("rb") as file:
            file.seek(place)
            added = file.read()
    except FileNotFoundError:
        return place
    text, read = codecs.utf_8_decode(added, "replace", False)  # a character that is still being written waits
    print(clean_log(text), end="", flush=True)
    return place + read


def clean_log(text: str) -> str:
    """A log as a terminal may show it: without control characters except line ends; a bar's steps are lines."""
    return clean(text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n"))
