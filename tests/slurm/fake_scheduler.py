"""Stand-ins for the commands of SLURM, on a simulated clock that a sleep advances at once.

Jobs run in the test's own process, where submitit's entry point starts them as srun would; only a recipe is its own
process. So an hour's time limit, a lost node or the tenth requeue takes milliseconds and happens at a known step.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from submitit.core import submission, utils

from slurm import attempt, attempt_end, process, run_record, status
from slurm import scheduler as slurm_scheduler

CLOCKED = (attempt_end, run_record, attempt, status, process, slurm_scheduler)
SHORTEST_S = 0.002  # a real wait, in which a recipe's process gets its turn
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGINT)


class Gone(BaseException):
    """The processes of an attempt were killed before they could record it; carries the state of its job."""


class Clock:
    """The module `time`, except that a sleep takes almost no real time and can trigger planned events."""

    def __init__(self):
        self.now, self.in_sleep = time.time(), lambda: None

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return self.now

    monotonic = time

    def pass_by(self, seconds):
        self.now += seconds

    def sleep(self, seconds):
        self.now += seconds
        self.in_sleep()


@dataclass
class Submitted:
    """One job, or one task of an array."""

    job_id: str
    options: dict[str, str]
    folder: Path
    state: str = "PENDING"
    reason: str = "Priority"
    restarts: int = 0
    started: float = 0.0
    not_before: float = 0.0
    is_signalled: bool = False
    is_queued_again: bool = False
    began: list[float] = field(default_factory=list)
    """When its attempts began."""

    @property
    def limit_s(self):
        return 60 * int(self.options["time"])

    @property
    def is_over(self):
        return self.state not in ("PENDING", "RUNNING", "COMPLETING")


class Scheduler:
    """A cluster of one partition. Jobs run when the test says so: `run()`, one attempt after the other."""

    def __init__(self, monkeypatch):
        self.clock, self.jobs, self.asked = Clock(), dict[str, Submitted](), list[tuple[str, ...]]()
        self.plans = list[tuple]()
        self.refusal, self.is_down, self.gpus, self.max_array_size = "", False, "(null)", 1001
        self.forgotten = dict[str, str]()  # what only accounting knows of: job id -> state
        self.clock.in_sleep = self.pass_on
        for module in CLOCKED:
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr(slurm_scheduler, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}"))
        monkeypatch.setattr(
            slurm_scheduler, "subprocess", SimpleNamespace(run=self.answer, TimeoutExpired=subprocess.TimeoutExpired)
        )
        monkeypatch.setattr(utils, "CommandFunction", self.of_submitit)
        monkeypatch.setattr(attempt, "subprocess", SimpleNamespace(Popen=self.start, PIPE=subprocess.PIPE))
        self.children = list[subprocess.Popen]()

    # ---- the commands

    def answer(self, command, **_):
        """`subprocess.run` of one of SLURM's commands."""
        self.asked.append(tuple(command))
        out, error = "", "Unable to contact slurm controller" if self.is_down else ""
        try:
            out = error or getattr(self, command[0])(*command[1:])
        except LookupError as problem:
            error = f"{command[0]}: error: {problem.args[0]}\n"
        return SimpleNamespace(returncode=bool(error), stdout=out, stderr=error)

    def of_submitit(self, command, **_):
        def call():
            done = self.answer(command)
            if done.returncode:
                raise utils.FailedJobError(done.stderr)
            return done.stdout

        return call

    def sbatch(self, file):
        if self.refusal:
            raise LookupError(f"{self.refusal}\nsbatch: error: Batch job submission failed: {self.refusal}")
        assert not [name for name in os.environ if re.match("SLURM_(?!CONF$)|SBATCH_", name)], (
            "of the job it is called in"
        )
        text = Path(file).read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        assert "requeue" in options and "export SUBMITIT_EXECUTOR=slurm" in text
        srun = shlex.split(text.strip().splitlines()[-1])
        assert srun[0] == "srun" and srun[-5:-1] == [sys.executable, "-u", "-m", "submitit.core._submit"]
        number = 7 + len({job.split("_")[0] for job in self.jobs})
        last = re.match(r"0-(\d+)%\d+$", options.get("array", ""))
        if last and int(last[1]) + 1 >= self.max_array_size:
            raise LookupError("Batch job submission failed: Invalid job array specification")
        for job_id in [f"{number}_{place}" for place in range(int(last[1]) + 1)] if last else [str(number)]:
            self.jobs[job_id] = Submitted(job_id, options, Path(srun[-1]))
        return f"Submitted batch job {number}\n"

    def of(self, job_id):
        """A job or the tasks of an array."""
        found = [job for name, job in self.jobs.items() if job_id in (name, name.split("_")[0])]
        if not found:
            raise LookupError("Invalid job id specified")
        return found

    def squeue(self, *words):
        assert words[:5] == ("-h", "-r", "-t", "all", "-j") and words[6:] == ("-o", "%i|%T|%r|%N")
        known = [job for number in words[5].split(",") for job in self.of_known(number)]
        if not known:
            raise LookupError("slurm_load_jobs error: Invalid job id specified")
        nodes = {"RUNNING": "node1"}
        for job in known:
            self.must_wait(job)
        return "".join(f"{job.job_id}|{job.state}|{job.reason}|{nodes.get(job.state, '')}\n" for job in known)

    def of_known(self, number):
        with contextlib.suppress(LookupError):
            return self.of(number)
        return []

    def sacct(self, *words):
        assert words[:4] == ("-n", "-P", "-X", "-j") and words[5:] == ("-o", "JobID,State,NodeList")
        wanted = words[4].split(",")
        return "".join(f"{job}|{state}|node1\n" for job, state in self.forgotten.items() if job.split("_")[0] in wanted)

    def sinfo(self, *words):
        assert words[:2] == ("-h", "-o")
        return {
            "%P": "low*\n",
            "%P|%G": f"low*|{self.gpus}\n",
            "%R: %D nodes of %c CPUs, %m MB, %G": f"low: 3 nodes of 2 CPUs, 4000 MB, {self.gpus}\n",
        }[words[2]]

    def scontrol(self, *words):
        if words == ("show", "config"):
            return f"MaxArraySize            = {self.max_array_size}\n"
        if words[:3] == ("-o", "show", "job"):
            (job,) = self.of(words[3])
            begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job.started))
            hours, minutes = divmod(int(job.options["time"]), 60)
            return (
                f"JobId={job.job_id} JobName=x JobState={job.state} Reason={job.reason} Restarts={job.restarts} "
                f"StartTime={begun} EndTime={begun} TimeLimit={hours:02d}:{minutes:02d}:00\n"
            )
        if words[0] == "requeue":
            (job,) = self.of(words[1])
            assert job.state == "RUNNING" and not job.is_queued_again
            job.is_queued_again = True
            return ""
        update, job_id, start = words
        assert update == "update"
        (job,) = self.of(job_id.removeprefix("JobId="))
        job.not_before = self.clock.now + int(start.removeprefix("StartTime=now+"))
        return ""

    def scancel(self, *job_ids):
        for job in [job for job_id in job_ids for job in self.of(job_id) if not job.is_over]:
            is_running, job.state = job.state == "RUNNING", "CANCELLED"
            if is_running:
                self.send(signal.SIGTERM)
        return ""

    # ---- what happens to jobs

    def send(self, number):
        """Send a signal to the processes of the running attempt."""
        os.kill(os.getpid(), number)

    def requeue(self, job_id, number=signal.SIGTERM):
        """A preemption, or an operator's `scontrol requeue`."""
        (job,) = self.of(job_id)
        job.is_queued_again, job.state = True, "COMPLETING"
        job.restarts += 1
        self.send(number)

    def start(self, *args, **options):
        """`subprocess.Popen` of a recipe."""
        self.children.append(subprocess.Popen(*args, **options))
        return self.children[-1]

    def kill(self, state="NODE_FAIL"):
        """End the running attempt with no chance to record it, as a power failure of its node would."""
        self.children[-1].kill()
        raise Gone(state)

    def when(self, condition, action):
        """Run an action once, during an attempt, when the condition holds."""
        self.plans.append((condition, action))

    def pass_on(self):
        """What happens while a process sleeps."""
        if any(child.poll() is None for child in self.children):
            time.sleep(SHORTEST_S)
        for job in self.jobs.values():
            left_s = job.started + job.limit_s - self.clock.now
            if job.state == "RUNNING" and left_s <= 0:
                self.kill("TIMEOUT")
            if job.state == "RUNNING" and not job.is_signalled and left_s <= int(job.options["signal"].split("@")[1]):
                job.is_signalled = True
                self.send(signal.SIGUSR2)
        for plan in [plan for plan in self.plans if plan[0]()]:
            if plan in self.plans:  # not done inside of another
                self.plans.remove(plan)
                plan[1]()

    # ---- attempts

    def ready(self):
        """The job that begins next, and when; None where none will."""
        waiting = [job for job in self.jobs.values() if job.state == "PENDING" and not self.must_wait(job)]
        return min(waiting, key=lambda job: job.not_before, default=None)

    def must_wait(self, job):
        needs = job.options.get("dependency", "").removeprefix("afterany:")
        waits = any(not other.is_over for number in filter(None, needs.split(":")) for other in self.of_known(number))
        if job.state == "PENDING":
            job.reason = "Dependency" if waits else "BeginTime" if job.not_before > self.clock.now else "Priority"
        return waits

    def run(self):
        """Run all attempts, one after another, until no job is waiting."""
        while job := self.ready():
            assert len(job.began) < 50, f"{job} is queued again and again"
            self.live(job.job_id)

    def live(self, job_id, rank=0, **around):
        """One process of one attempt of a job, as srun starts it; how it has ended."""
        (job,) = self.of(job_id)
        if rank == 0:
            self.clock.now = max(self.clock.now, job.not_before)
            job.state, job.reason, job.started, job.is_signalled = "RUNNING", "None", self.clock.now, False
            job.began.append(self.clock.now)
            job.restarts = len(job.began) - 1
        with self.process_of(job, rank, around):
            try:
                submission.process_job(job.folder)
                end = "COMPLETED"
            except SystemExit as leaving:
                end = "FAILED" if leaving.code else "COMPLETED"
            except Gone as gone:
                end = gone.args[0]
                job.is_queued_again = end == "NODE_FAIL"  # since it was submitted with --requeue
        if rank == 0:
            if job.state in ("RUNNING", "COMPLETING"):
                job.state = "PENDING" if job.is_queued_again else end
            job.is_queued_again = False
        return end

    @contextlib.contextmanager
    def process_of(self, job, rank, around):
        number, _, place = job.job_id.partition("_")
        nodes, each = int(job.options["nodes"]), int(job.options["ntasks-per-node"])
        environment = {
            "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": number, "SLURM_NTASKS": str(nodes * each),
            "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": f"node[1-{nodes}]" if nodes > 1 else "node1",
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each), "SLURM_NODEID": str(rank // each),
            "SLURM_RESTART_COUNT": str(job.restarts), **around,
        }  # fmt: skip
        if place:
            environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": place}
        log = (job.folder / f"{job.job_id}_{rank}_log.out").open("a")
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = [os.dup(1), os.dup(2)]
        try:
            out, err = contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)
            with log, mock.patch.dict(os.environ, environment), out, err:
                os.dup2(log.fileno(), 1)  # for the recipe
                os.dup2(log.fileno(), 2)
                yield
        finally:
            for place, handle in enumerate(before, 1):
                os.dup2(handle, place)
                os.close(handle)
            for number, handler in handlers.items():
                signal.signal(number, handler)
