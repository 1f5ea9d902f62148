"""One life of a job: what each of its processes does from when SLURM starts it until it ends or is started again.

The recipe runs in a process of its own. This one, above it, passes signals on, reads what it says last, and decides
when it has ended: done, failed for good, or to be queued again under the same job. Rank 0 decides; where it has gone,
another rank does. README.md has the whole course as a picture.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from bigtrain.runtime.exit_codes import INTERRUPTED, LOST, STOPPED, USER_ERROR
from slurm import jobs
from slurm.history import (
    FOLDER,
    LAST_WORDS,
    RESULTS_FILE,
    Job,
    Owner,
    events,
    idle_lives,
    lives,
    position,
    tell,
    write_text,
)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MEETING_FILE = "meeting.json"
MEETING_S = 180  # a network file system may show a new file late
GIVEN_UP_S = 90  # another rank has failed: so long until this one's recipe is killed
NO_WORD_S = 30  # rank 0 has said nothing of the end: another decides
BACKOFF_S, LONGEST_BACKOFF_S = 15, 600
LIMIT_S = 300  # told to leave so near to the time limit, that is why
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


@dataclass(frozen=True)
class Task:
    """Which process of which job this is."""

    run: Path
    job_id: str
    restarts: int
    rank: int
    processes: int
    local_rank: int
    local_processes: int
    first_host: str
    on_slurm: bool

    @classmethod
    def of_this_process(cls, run: Path) -> Task:
        told = JobEnvironment()
        on_slurm = told.cluster == "slurm"
        return cls(
            run=run,
            job_id=told.job_id if on_slurm else f"local-{told.job_id}",
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if on_slurm else 0,
            rank=told.global_rank,
            processes=told.num_tasks,
            local_rank=told.local_rank,
            local_processes=told.num_tasks // told.num_nodes,
            first_host=told.hostnames[0] if on_slurm else "127.0.0.1",
            on_slurm=on_slurm,
        )

    def tell(self, event: str, **further: object) -> None:
        tell(self.run, event, job=self.job_id, restarts=self.restarts, **further)

    def of_this_life(self, *names: str) -> list[dict[str, object]]:
        """What has been told of this life, by any rank."""
        mine = {"job": self.job_id, "restarts": self.restarts}
        return [row for row in events(self.run) if row["event"] in names and mine.items() <= row.items()]


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
    with socket.socket() as free:
        free.bind(("", 0))
        port = int(free.getsockname()[1])
    task.tell("started", life=len(begun) + 1, at=position(task.run), processes=task.processes)
    gather(task, port)
    return port


def gather(task: Task, port: int | None) -> None:
    """Tell the other ranks of this life where to meet; None: nowhere."""
    record = {"job": task.job_id, "restarts": task.restarts, "port": port}
    write_text(task.run / FOLDER / MEETING_FILE, json.dumps(record) + "\n")


def met(task: Task) -> int | None:
    """Another rank: wait for what rank 0 says.

    Raises:
        ValueError: it says nothing that this process can see.
    """
    file, until = task.run / FOLDER / MEETING_FILE, time.monotonic() + MEETING_S
    while time.monotonic() < until:
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            record = {}
        if (record.get("job"), record.get("restarts")) == (task.job_id, task.restarts):
            return record["port"]
        time.sleep(0.2)
    raise ValueError(
        f"rank {task.rank} has seen no word of rank 0 in {file} for {MEETING_S} s: the run's folder must lie on a file "
        "system that all nodes share."
    )


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
    """Until the job's time is up."""
    try:
        return time.mktime(time.strptime(record["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    except (KeyError, ValueError):  # without a limit
        return None
