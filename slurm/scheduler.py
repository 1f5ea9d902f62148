"""All communication with SLURM: asking about jobs, submitting them. Nothing else runs its commands.

Another scheduler (LSF, say) is another module with these functions and their answers, a choice between the two here by
the commands that there are, and the settings that it lacks in cluster.py. It answers in SLURM's words: job ids "12" and
"12_3", the states of JobState, on_slurm for a job that can be requeued; its logs are named JOB_..._RANK_log.out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from submitit import JobEnvironment
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm.cluster import Cluster
from slurm.job_parameters import parameters
from slurm.refusals import explained

ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
AT_ONCE = 500  # job ids per query
ANSWER_S = 60


class SchedulerError(ValueError):
    """SLURM cannot be asked here."""


class JobState(NamedTuple):
    name: str  # SLURM's word: RUNNING, PENDING, CANCELLED ...
    reason: str = ""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.name in ACTIVE

    @property
    def is_waiting(self) -> bool:
        return self.name in WAITING


def check_slurm(cluster: Cluster) -> None:
    """Refuse, before anything is written, to submit where SLURM does not answer or has no such node.

    Raises:
        ValueError: SLURM does not answer, or no node has that many GPUs: some accept such a job, which waits forever.
    """
    if missing := [tool for tool in ("sbatch", "srun", "squeue", "scontrol") if not shutil.which(tool)]:
        raise SchedulerError(
            f"there is no SLURM here ({', '.join(missing)} not on the PATH): run this on a login node of the cluster, "
            "or with --local on this machine."
        )
    ask("sinfo", "-h", "-o", "%P")
    most = most_gpus(cluster.partition)
    if most is not None and cluster.gpus_per_node > most:
        where = f"partition {cluster.partition}" if cluster.partition else "the default partition"
        raise ValueError(
            f"gpus_per_node is {cluster.gpus_per_node}, and a node of {where} has at most {most}:{what_there_is()} "
            "Change the cluster file or give another flag."
        )


def most_gpus(partition: str = "") -> int | None:
    """Of a node of a partition, or of the default one; None where there is no such partition."""
    found = []
    for row in ask("sinfo", "-h", "-o", "%P|%G").splitlines():
        name, has = row.split("|", 1)
        if name.rstrip("*") in partition.split(",") if partition else name.endswith("*"):
            found.append(sum(int(count) for count in re.findall(r"\bgpu(?::[\w.-]+)?:(\d+)", has)))
    return max(found, default=None)


def what_there_is() -> str:
    """The partitions and what their nodes have."""
    try:
        found = ask("sinfo", "-h", "-o", "%R: %D nodes of %c CPUs, %m MB, %G").splitlines()
    except SchedulerError:
        return ""
    return f" There is {'; '.join(line.replace('(null)', 'no GPUs') for line in sorted(set(found)))}." if found else ""


def ask(*command: str) -> str:
    """Raises:
    SchedulerError: the command is missing, fails or takes too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError as error:
        raise SchedulerError(f"{command[0]} is not on the PATH.") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} has not answered for {ANSWER_S} s: is its controller up?") from error
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return done.stdout


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """What is known of each job, "12" or, of an array, "12_3"; those that SLURM has forgotten are left out.

    Raises:
        SchedulerError: the controller cannot be asked.
    """
    wanted = set(job_ids)
    found: dict[str, JobState] = {}
    whole = sorted({job_id.split("_")[0] for job_id in wanted})
    for first in range(0, len(whole), AT_ONCE):
        some = ",".join(whole[first : first + AT_ONCE])
        try:
            rows = ask("squeue", "-h", "-r", "-t", "all", "-j", some, "-o", "%i|%T|%r|%N")
        except SchedulerError as error:
            if "Invalid job id" not in str(error):
                raise
            rows = ""
        for row in rows.splitlines():
            job_id, name, reason, nodes = row.split("|", 3)
            found[job_id] = JobState(name, "" if reason == "None" else reason, nodes)
    if absent := wanted - found.keys():
        found |= accounted(absent)
    return {job_id: state for job_id, state in found.items() if job_id in wanted}


def accounted(job_ids: Iterable[str]) -> dict[str, JobState]:
    """What accounting says of jobs that the controller has forgotten; nothing where there is no accounting."""
    whole = sorted({job_id.split("_")[0] for job_id in job_ids})
    found: dict[str, JobState] = {}
    for first in range(0, len(whole), AT_ONCE):
        some = ",".join(whole[first : first + AT_ONCE])
        try:
            rows = ask("sacct", "-n", "-P", "-X", "-j", some, "-o", "JobID,State,NodeList")
        except SchedulerError:
            return found
        for row in rows.splitlines():
            job_id, name, nodes = row.split("|", 2)
            found[job_id] = JobState(name.split(" ")[0], "", nodes)  # "CANCELLED by 1000"
    return found


class JobRecord(NamedTuple):
    """What the controller says of one job now."""

    state: str = ""  # "": SLURM did not answer
    restarts: int = 0
    seconds_left: float | None = None  # until its time limit

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "")


def described(job_id: str) -> JobRecord:
    try:
        text = ask("scontrol", "-o", "show", "job", job_id)
    except SchedulerError:
        return JobRecord()
    fields = dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", text))
    return JobRecord(fields.get("JobState", ""), int(fields.get("Restarts") or 0), seconds_left(fields))


def requeue(job_id: str, delay_s: int = 0) -> None:
    """Restart a running job after at least delay_s seconds. The calling process is killed soon after.

    Raises:
        SchedulerError: SLURM refuses.
    """
    ask("scontrol", "requeue", job_id)
    if delay_s:
        ask("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{delay_s}")


def largest_array() -> int:
    """How many jobs one array may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(1, int(found[1]) - 1) if found else 1000


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs. Raises SchedulerError where the controller refuses."""
    for first in range(0, len(job_ids), AT_ONCE):
        ask("scancel", *job_ids[first : first + AT_ONCE])


def seconds_left(record: Mapping[str, str]) -> float | None:
    """Until the time limit; not from EndTime, which becomes "now" on cancelling."""
    limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", record.get("TimeLimit", ""))
    try:
        begun = time.mktime(time.strptime(record["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    except (KeyError, ValueError):
        return None
    if not limit:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    return begun + 86400 * days + 3600 * hours + 60 * minutes + seconds - time.time()


def environment() -> dict[str, Any]:
    """Which process this is of which job, as fields of `process.Process`: from SLURM, or from submitit's stand-in
    on this machine."""
    found = JobEnvironment()
    on_slurm = found.cluster == "slurm"
    return {
        "job_id": found.job_id if on_slurm else f"local-{found.job_id}",
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0) if on_slurm else 0,
        "rank": found.global_rank,
        "world_size": found.num_tasks,
        "local_rank": found.local_rank,
        "local_world_size": found.num_tasks // found.num_nodes,
        "first_host": found.hostnames[0] if on_slurm else "127.0.0.1",
        "on_slurm": on_slurm,
    }


class Executor(submitit.SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # SLURM is checked for elsewhere; showing a script does not need it


def executor(cluster: Cluster, logs: Path, name: str, **further: Any) -> Executor:
    made = Executor(folder=logs, max_num_timeout=cluster.max_attempts)
    job_name = re.sub(r"[^\w.+=-]+", "_", name, flags=re.ASCII) or "bigtrain"
    made.update_parameters(**parameters(cluster, name=job_name, folder=logs, **further))
    return made


def script(cluster: Cluster, logs: Path, name: str, *, runs: int = 1, **further: Any) -> str:
    """The text that sbatch gets."""
    made = executor(cluster, logs, name, **further)
    if runs > 1:
        made.parameters["map_count"] = runs
    return made._make_submission_file_text(made._submitit_command_str, "")


def queue(calls: Sequence[Callable[[], None]], cluster: Cluster, logs: Path, name: str, **further: Any) -> list[str]:
    """Give calls to sbatch: one as a job, more as an array. Their job ids.

    Raises:
        ValueError: sbatch refuses.
    """
    made = executor(cluster, logs, name, **further)
    try:
        with without_slurm_variables():
            if len(calls) == 1:
                return [made.submit(calls[0]).job_id]
            with made.batch():
                submitted = [made.submit(call) for call in calls]
            return [job.job_id for job in submitted]
    except (FailedJobError, FailedSubmissionError) as error:
        text = script(cluster, logs, name, runs=len(calls), **further)
        raise ValueError(explained(str(error), text, what_there_is)) from error


@contextmanager
def without_slurm_variables() -> Iterator[None]:
    """A job submitted from inside another must not inherit its requests."""
    names = [name for name in os.environ if re.match("SLURM_(?!CONF$)|SBATCH_", name)]
    before = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(before)
