"""One life of a job: what each of its processes does from when SLURM starts it until it ends or is started again.

The recipe runs in a process of its own. This one, above it, passes signals on, reads what it says last, and decides
when it has ended: done, failed for good, or to be queued again under the same job. Rank 0 decides; where it has gone,
another rank does. README.md has the whole course as a picture.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO

from submitit.core.utils import DelayedSubmission

from bigtrain.runtime.exit_codes import STOPPED, USER_ERROR
from bigtrain.runtime.ports import free_port
from slurm.ending import end
from slurm.rank import Task, gather, met
from slurm.run_record import (
    LAST_WORDS,
    RESULTS_FILE,
    Job,
    Owner,
    events,
    lives,
    position,
    tell,
)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


GIVEN_UP_S = 90  # another rank has failed: so long until this one's recipe is killed


OF_ERROR = re.compile(r"^([\w.-]+: error|[\w.]*(Error|Exception|Interrupt|Exit))\b")


class Life:
    """What submitit pickles: the run's folder, and nothing else."""

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> None:
        if code := live(Path(self.run)):
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """For a signal before the life has begun: there is nothing to save, the job is queued again."""
        return DelayedSubmission(self)


class Told:
    """The first signal that this process got; each is passed on to the recipe."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._take)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the recipe gets it itself

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self.child and self.child.returncode is None:
            self.child.send_signal(number)


def live(run: Path) -> int:
    """One life; the exit code of this process."""
    told, task = Told(), Task.of_this_process(run)
    try:
        job = Job.read(run)
        port = begin(task, job) if task.rank == 0 else met(task)
    except ValueError as error:
        print(f"bigtrain-slurm: error: {error}", file=sys.stderr, flush=True)
        task.tell("failed", rank=task.rank, code=USER_ERROR, error=str(error))
        return USER_ERROR
    if port is None:
        return 0
    if told.signal:
        code, last = STOPPED, ""
    else:
        code, last = run_recipe(task, job, port, told)
    return end(task, code, last, told.signal)


def begin(task: Task, job: Job) -> int | None:
    """Rank 0: take the run, find a port for the processes to meet at; None where there is nothing to do.

    Raises:
        ValueError: the run is another job's, or has been started too often, or misses what another run should leave.
    """
    history = events(task.run)
    begun = lives(history, task.job_id)
    try:
        Owner(task.run, task.job_id).take()
        if (task.run / RESULTS_FILE).is_file():
            print(f"{task.run} is finished, nothing to do", flush=True)
            if all(row["event"] != "finished" for row in history):  # killed before it could tell
                task.tell("finished")
            gather(task, None)
            return None
        if len(begun) >= job.cluster.max_lives:
            raise ValueError(
                f"the job has had its {job.cluster.max_lives} lives (max_lives): `bigtrain-slurm retry` gives new ones."
            )
        for file, other in job.needs.items():
            if not Path(file).is_file():
                raise ValueError(
                    f"{file} is missing: the run {other}, which leaves it, has not done so. Retry that one first."
                )
    except ValueError:
        gather(task, None)
        raise
    mine = [row for row in history if row.get("job") == task.job_id and row["event"] in (*LAST_WORDS, "started")]
    if mine and mine[-1]["event"] == "started":
        why = "ended without a word: its node failed, or it was killed before it could save"
        tell(task.run, "lost", job=task.job_id, restarts=mine[-1].get("restarts"), why=why)
    port = free_port()
    task.tell("started", life=len(begun) + 1, at=position(task.run), processes=task.processes)
    gather(task, port)
    return port


def environment(task: Task, job: Job, port: int, given: Mapping[str, str]) -> dict[str, str]:
    """What the recipe finds around it: the other processes, its threads, DeepSpeed."""
    found = {**given, "OMP_NUM_THREADS": str(job.cluster.cpus_per_task), "BIGTRAIN_LAUNCHED": "1"}
    if job.cluster.strategy != "ddp":
        found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": job.cluster.strategy[-1]}
    if task.processes > 1 or job.cluster.strategy != "ddp":
        found |= {
            "RANK": str(task.rank), "WORLD_SIZE": str(task.processes), "LOCAL_RANK": str(task.local_rank),
            "LOCAL_WORLD_SIZE": str(task.local_processes), "MASTER_ADDR": task.first_host, "MASTER_PORT": str(port),
        }  # fmt: skip
    return found


def run_recipe(task: Task, job: Job, port: int, told: Told) -> tuple[int, str]:
    """Its exit code, minus a signal's number where one killed it, and its last line about an error."""
    command = [sys.executable, job.recipe, *job.flags, "--out", str(task.run)]
    lines: deque[str] = deque(maxlen=200)
    around = environment(task, job, port, os.environ)
    with subprocess.Popen(command, cwd=job.cwd, env=around, stderr=subprocess.PIPE) as told.child:
        assert told.child.stderr
        reader = Thread(target=pass_on, args=(told.child.stderr, lines), daemon=True)
        reader.start()
        looked = time.monotonic()
        given_up: float | None = None
        while told.child.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if task.processes > 1 and given_up is None and now - looked > 2:
                looked = now
                if task.of_this_life("failed"):  # this one would wait for it
                    told.child.terminate()
                    given_up = now
            if given_up is not None and now - given_up > GIVEN_UP_S:
                told.child.kill()
        reader.join(timeout=5)  # a reader process that it left behind may hold the pipe
    return told.child.returncode, last_error(lines)


def pass_on(said: IO[bytes], lines: deque[str]) -> None:
    """What the recipe says, to this process's own stderr, and its last lines kept."""
    for line in said:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        lines.append(line.decode(errors="replace").rstrip())


def last_error(lines: deque[str]) -> str:
    """The line that names an error, the last of them; without one the last line."""
    named = [line for line in lines if OF_ERROR.match(line)]
    filled = [line for line in lines if line.strip()]
    return (named or filled or [""])[-1][:1000]
