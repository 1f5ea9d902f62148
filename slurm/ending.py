"""How a life ends: what its recipe's end means, and what becomes of the job."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping

from bigtrain.runtime.exit_codes import INTERRUPTED, LOST, STOPPED, USER_ERROR
from slurm import scheduler as jobs
from slurm.rank import Task
from slurm.run_record import LAST_WORDS, Owner, events, idle_lives, position

NO_WORD_S = 30  # rank 0 has said nothing of the end: another decides
BACKOFF_S, LONGEST_BACKOFF_S = 15, 600
LIMIT_S = 300  # told to leave so near to the time limit, that is why


def end(task: Task, code: int, error: str, asked: int | None) -> int:
    """Say how the recipe has ended, and what becomes of the job; the exit code of this process."""
    stopped = code in (STOPPED, INTERRUPTED) or (asked is not None and code == -asked)
    lost = code == LOST or code < 0
    if code and not stopped and not lost:
        if not task.of_this_life("failed"):  # the first is what counts: the others end because of it
            task.tell("failed", rank=task.rank, code=code, error=error or f"exit code {code}")
        Owner(task.run, task.job_id).release()
        return code
    if task.rank and (not lost or others_decide(task)):
        return 0
    if lost and task.processes > 1:
        time.sleep(3)  # a rank that failed is about to say so
    return decide(task, code, error, asked, stopped)


def others_decide(task: Task) -> bool:
    """Whether a rank before this one has said what becomes of the job."""
    until = time.monotonic() + NO_WORD_S + 3 * task.rank
    while time.monotonic() < until:
        if task.of_this_life(*LAST_WORDS):
            return True
        time.sleep(1)
    return False


def decide(task: Task, code: int, error: str, asked: int | None, stopped: bool) -> int:
    """What becomes of the job, by the one rank that decides."""
    owner = Owner(task.run, task.job_id)
    try:
        if task.of_this_life("failed"):
            return USER_ERROR
        if code == 0:
            task.tell("finished")
            return 0
        if stopped and asked is None:
            task.tell("stopped", why="by the file `stop`, or a signal to the recipe's own process")
            return 0
        if not task.on_slurm:
            task.tell("stopped" if stopped else "failed", code=code, error=error, why=reason(code, asked))
            return 0 if stopped else 1
        record = jobs.described(task.job_id)
        if int(record.get("Restarts") or 0) > task.restarts:
            task.tell("requeued", why="by SLURM: preemption, or an operator", code=code)
            return 0
        left_s = seconds_left(record)
        if record.get("JobState") not in ("RUNNING", None) and not (left_s is not None and left_s <= 0):
            task.tell("cancelled", code=code)
            return 0
        why = reason(code, asked)
        if stopped and left_s is not None and left_s < LIMIT_S:
            why = "the time limit"
        idle = idle_lives(events(task.run), task.job_id, position(task.run))
        delay_s = min(BACKOFF_S * 2 ** (idle - 1), LONGEST_BACKOFF_S) if idle else 0
        task.tell("requeued", why=why, code=code, error=error, delay_s=delay_s)
        owner.release()
        try:
            jobs.requeue(task.job_id, delay_s)
        except jobs.NoSlurmError as problem:
            task.tell("failed", rank=task.rank, code=code, error=f"it could not be queued again: {problem}")
            return 1
        return 0
    finally:
        owner.release()


def reason(code: int, asked: int | None) -> str:
    if asked is not None:
        return f"told to leave ({signal.Signals(asked).name})"
    if code == LOST:
        return "a process of it died, hung or could not be reached"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def seconds_left(record: Mapping[str, str]) -> float | None:
    """Until the job's time is up; not from EndTime, which is now where a job is cancelled."""
    limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", record.get("TimeLimit", ""))
    try:
        begun = time.mktime(time.strptime(record["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    except (KeyError, ValueError):
        return None
    if not limit:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    return begun + 86400 * days + 3600 * hours + 60 * minutes + seconds - time.time()
