"""One attempt of a job: what each of its processes does from its start until it ends or is requeued.

The recipe runs in a process of its own. This one, above it, passes signals on, reads what it says last, and decides
what becomes of the job when it has ended: done, failed for good, or requeued. Rank 0 decides; if it is gone, another
rank does. README.md has the diagram.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO

from submitit.core.utils import DelayedSubmission

from bigtrain.runtime.exit_codes import STOPPED, USER_ERROR
from bigtrain.runtime.ports import free_port
from slurm import scheduler
from slurm.attempt_end import end
from slurm.process import Process, publish_port, wait_for_port
from slurm.run_record import FINAL_EVENTS, RESULTS_FILE, JobSpec, RunLock, attempts, events, position, record_event

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
KILL_AFTER_S = 90  # after another rank has failed, how long until this one's recipe is killed
OF_ERROR = re.compile(r"^([\w.-]+: error|[\w.]*(Error|Exception|Interrupt|Exit))\b")


class Attempt:
    """What submitit pickles: the run's folder, and nothing else."""

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> None:
        if code := run_attempt(Path(self.run)):
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """For a signal before the attempt has begun: there is nothing to save, the job is requeued."""
        return DelayedSubmission(self)


class SignalRelay:
    """Passes each signal on to the recipe, and keeps the first."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._take)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal: the recipe gets it too

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self.child and self.child.returncode is None:
            self.child.send_signal(number)


def run_attempt(run: Path) -> int:
    """Returns the exit code of this process."""
    relay, process = SignalRelay(), Process(run, **scheduler.environment())
    try:
        job = JobSpec.read(run)
        port = begin(process, job) if process.rank == 0 else wait_for_port(process)
    except ValueError as error:
        print(f"bigtrain-slurm: error: {error}", file=sys.stderr, flush=True)
        process.record_event("failed", rank=process.rank, code=USER_ERROR, error=str(error))
        return USER_ERROR
    if port is None:
        return 0
    if relay.signal:
        code, last = STOPPED, ""
    else:
        code, last = run_recipe(process, job, port, relay)
    return end(process, code, last, relay.signal)


def begin(process: Process, job: JobSpec) -> int | None:
    """Rank 0: lock the run, find a port where the processes can meet; None if there is nothing to do.

    Raises:
        ValueError: another job holds the run, it was started too often, or what another run should write is missing.
    """
    history = events(process.run)
    begun = attempts(history, process.job_id)
    try:
        RunLock(process.run, process.job_id).acquire()
        if (process.run / RESULTS_FILE).is_file():
            print(f"{process.run} is finished, nothing to do", flush=True)
            if all(row["event"] != "finished" for row in history):  # killed before it could say so
                process.record_event("finished")
            publish_port(process, None)
            return None
        if len(begun) >= job.cluster.max_attempts:
            raise ValueError(
                f"the job has been started {job.cluster.max_attempts} times (max_attempts): `bigtrain-slurm retry` "
                "submits it again."
            )
        for file, other in job.needs.items():
            if not Path(file).is_file():
                raise ValueError(f"{file} is missing: the run {other} should have written it. Retry that one first.")
    except ValueError:
        publish_port(process, None)
        raise
    mine = [row for row in history if row.get("job") == process.job_id and row["event"] in (*FINAL_EVENTS, "started")]
    if mine and mine[-1]["event"] == "started":
        why = "ended unexpectedly: its node failed, or it was killed before it could save"
        record_event(process.run, "lost", job=process.job_id, restarts=mine[-1].get("restarts"), why=why)
    port = free_port()
    process.record_event("started", attempt=len(begun) + 1, at=position(process.run), processes=process.world_size)
    publish_port(process, port)
    return port


def environment(process: Process, job: JobSpec, port: int) -> dict[str, str]:
    """The recipe's environment: the other processes, its threads, DeepSpeed."""
    found = {**os.environ, "OMP_NUM_THREADS": str(job.cluster.cpus_per_task), "BIGTRAIN_LAUNCHED": "1"}
    if job.cluster.strategy != "ddp":
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": job.cluster.strategy[-1]}
    if process.world_size > 1 or job.cluster.strategy != "ddp":
        found |= {
            "RANK": str(process.rank), "WORLD_SIZE": str(process.world_size), "LOCAL_RANK": str(process.local_rank),
            "LOCAL_WORLD_SIZE": str(process.local_world_size), "MASTER_ADDR": process.first_host,
            "MASTER_PORT": str(port),
        }  # fmt: skip
    return found


def run_recipe(process: Process, job: JobSpec, port: int, relay: SignalRelay) -> tuple[int, str]:
    """The recipe's exit code (minus the number of a signal that killed it) and its last error line."""
    command = [sys.executable, job.recipe, *job.flags, "--out", str(process.run)]
    lines: deque[str] = deque(maxlen=200)
    own = environment(process, job, port)
    with subprocess.Popen(command, cwd=job.cwd, env=own, stderr=subprocess.PIPE) as relay.child:
        assert relay.child.stderr
        reader = Thread(target=pass_on, args=(relay.child.stderr, lines), daemon=True)
        reader.start()
        looked = time.monotonic()
        terminated_at: float | None = None
        while relay.child.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if process.world_size > 1 and terminated_at is None and now - looked > 2:
                looked = now
                if process.events_of_attempt("failed"):  # this rank would wait for the failed one
                    relay.child.terminate()
                    terminated_at = now
            if terminated_at is not None and now - terminated_at > KILL_AFTER_S:
                relay.child.kill()
        reader.join(timeout=5)  # a reader process that it left behind may hold the pipe
    return relay.child.returncode, last_error(lines, was_killed=relay.child.returncode < 0)


def pass_on(said: IO[bytes], lines: deque[str]) -> None:
    """Copy the recipe's stderr to this process's own, and keep its last lines."""
    for line in said:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        lines.append(line.decode(errors="replace").rstrip())


def last_error(lines: deque[str], *, was_killed: bool = False) -> str:
    """The last line that names an error, else the last line; of a killed process that one says nothing."""
    named = [line for line in lines if OF_ERROR.match(line)]
    filled = [line for line in lines if line.strip() and not was_killed]
    return (named or filled or [""])[-1][:1000]
