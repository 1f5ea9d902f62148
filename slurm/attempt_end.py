"""The end of an attempt: what the recipe's exit means, and what becomes of the job."""

from __future__ import annotations

import signal
import time

from bigtrain.runtime.exit_codes import INTERRUPTED, LOST, STOPPED, USER_ERROR
from slurm import scheduler
from slurm.process import Process
from slurm.run_record import FINAL_EVENTS, RunLock, events, idle_attempts, position

RANK_0_TIMEOUT_S = 30  # if rank 0 records no end within this time, another rank decides
BACKOFF_S, LONGEST_BACKOFF_S = 15, 600
NEAR_LIMIT_S = 300  # a stop this close to the time limit is blamed on it


def end(process: Process, code: int, error: str, asked: int | None) -> int:
    """Record how the recipe ended and decide what becomes of the job. Returns the exit code of this process."""
    stopped = code in (STOPPED, INTERRUPTED) or (asked is not None and code == -asked)
    lost = code == LOST or code < 0
    if code and not stopped and not lost:
        if not process.events_of_attempt("failed"):  # the first failure counts: the others follow from it
            process.record_event("failed", rank=process.rank, code=code, error=error or f"exit code {code}")
        RunLock(process.run, process.job_id).release()
        return code
    if process.rank and (not lost or others_decide(process)):
        return 0
    if lost and process.world_size > 1:
        time.sleep(3)  # time for a failed rank to record it
    return decide(process, code, error, asked, stopped)


def others_decide(process: Process) -> bool:
    """Whether a lower rank has decided what becomes of the job."""
    until = time.monotonic() + RANK_0_TIMEOUT_S + 3 * process.rank
    while time.monotonic() < until:
        if process.events_of_attempt(*FINAL_EVENTS):
            return True
        time.sleep(1)
    return False


def decide(process: Process, code: int, error: str, asked: int | None, stopped: bool) -> int:
    """Decide what becomes of the job; one rank does."""
    owner = RunLock(process.run, process.job_id)
    try:
        if process.events_of_attempt("failed"):
            return USER_ERROR
        if code == 0:
            process.record_event("finished")
            return 0
        if stopped and asked is None:
            process.record_event("stopped", why="by the file `stop`, or a signal to the recipe's own process")
            return 0
        if not process.on_slurm:
            process.record_event("stopped" if stopped else "failed", code=code, error=error, why=reason(code, asked))
            return 0 if stopped else 1
        record = scheduler.described(process.job_id)
        if record.restarts > process.restarts:
            process.record_event("requeued", why="by SLURM: preemption, or an operator", code=code)
            return 0
        left_s = record.seconds_left
        if not record.is_running and not (left_s is not None and left_s <= 0):
            process.record_event("cancelled", code=code)
            return 0
        why = reason(code, asked)
        if stopped and left_s is not None and left_s < NEAR_LIMIT_S:
            why = "the time limit"
        idle = idle_attempts(events(process.run), process.job_id, position(process.run))
        delay_s = min(BACKOFF_S * 2 ** (idle - 1), LONGEST_BACKOFF_S) if idle else 0
        process.record_event("requeued", why=why, code=code, error=error, delay_s=delay_s)
        owner.release()
        try:
            scheduler.requeue(process.job_id, delay_s)
        except scheduler.SchedulerError as problem:
            process.record_event("failed", rank=process.rank, code=code, error=f"it could not be requeued: {problem}")
            return 1
        return 0
    finally:
        owner.release()


def reason(code: int, asked: int | None) -> str:
    if asked is not None:
        return f"asked to stop ({signal.Signals(asked).name})"
    if code == LOST:
        return "one of its processes died, hung or could not be reached"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
