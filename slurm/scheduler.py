"""What SLURM knows of jobs: from the controller, and from accounting where there is some. It only asks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
AT_ONCE = 500  # job ids in one question
PATIENCE_S = 60


class NoSlurmError(ValueError):
    """SLURM cannot be asked here."""


@dataclass(frozen=True)
class State:
    name: str
    """SLURM's word: RUNNING, PENDING, CANCELLED ..."""
    reason: str = ""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.name in ACTIVE

    @property
    def is_waiting(self) -> bool:
        return self.name in WAITING


def check_slurm() -> None:
    """Raises:
    NoSlurmError: there is no SLURM on the PATH, or it does not answer.
    """
    if missing := [tool for tool in ("sbatch", "srun", "squeue", "scontrol") if not shutil.which(tool)]:
        raise NoSlurmError(
            f"there is no SLURM here ({', '.join(missing)} not on the PATH): run this on a login node of the cluster, "
            "or with --local on this machine."
        )
    ask("sinfo", "-h", "-o", "%P")


def most_gpus(partition: str = "") -> int | None:
    """Of a node of a partition, or of the default one; None where there is no such partition."""
    found = []
    for row in ask("sinfo", "-h", "-o", "%P|%G").splitlines():
        name, has = row.split("|", 1)
        if name.rstrip("*") in partition.split(",") if partition else name.endswith("*"):
            found.append(sum(int(count) for count in re.findall(r"\bgpu(?::[\w.-]+)?:(\d+)", has)))
    return max(found, default=None)


def ask(*command: str) -> str:
    """Raises:
    NoSlurmError: the command is missing, fails or takes too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError as error:
        raise NoSlurmError(f"{command[0]} is not on the PATH.") from error
    except subprocess.TimeoutExpired as error:
        raise NoSlurmError(f"{command[0]} has not answered for {PATIENCE_S} s: is its controller up?") from error
    if done.returncode:
        raise NoSlurmError(f"{command[0]}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return done.stdout


def states(job_ids: Iterable[str]) -> dict[str, State]:
    """What is known of each job, "12" or, of an array, "12_3"; those that nobody knows any more are left out.

    Raises:
        NoSlurmError: the controller cannot be asked.
    """
    wanted = set(job_ids)
    found: dict[str, State] = {}
    whole = sorted({job_id.split("_")[0] for job_id in wanted})
    for first in range(0, len(whole), AT_ONCE):
        some = ",".join(whole[first : first + AT_ONCE])
        try:
            rows = ask("squeue", "-h", "-r", "-t", "all", "-j", some, "-o", "%i|%T|%r|%N")
        except NoSlurmError as error:
            if "Invalid job id" not in str(error):
                raise
            rows = ""
        for row in rows.splitlines():
            job_id, name, reason, nodes = row.split("|", 3)
            found[job_id] = State(name, "" if reason == "None" else reason, nodes)
    if absent := wanted - found.keys():
        found |= accounted(absent)
    return {job_id: state for job_id, state in found.items() if job_id in wanted}


def accounted(job_ids: Iterable[str]) -> dict[str, State]:
    """What accounting says of jobs that the controller has forgotten; nothing where there is no accounting."""
    whole = sorted({job_id.split("_")[0] for job_id in job_ids})
    found: dict[str, State] = {}
    for first in range(0, len(whole), AT_ONCE):
        some = ",".join(whole[first : first + AT_ONCE])
        try:
            rows = ask("sacct", "-n", "-P", "-X", "-j", some, "-o", "JobID,State,NodeList")
        except NoSlurmError:
            return found
        for row in rows.splitlines():
            job_id, name, nodes = row.split("|", 2)
            found[job_id] = State(name.split(" ")[0], "", nodes)  # "CANCELLED by 1000"
    return found


def described(job_id: str) -> dict[str, str]:
    """The controller's record of one job, such as JobState, Restarts, EndTime; empty where it cannot be had."""
    try:
        record = ask("scontrol", "-o", "show", "job", job_id)
    except NoSlurmError:
        return {}
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", record))


def requeue(job_id: str, delay_s: int = 0) -> None:
    """Have a running job start again, not before so many seconds. It ends the process that calls it, soon.

    Raises:
        NoSlurmError: it cannot be.
    """
    ask("scontrol", "requeue", job_id)
    if delay_s:
        ask("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{delay_s}")


def largest_array() -> int:
    """How many jobs one array may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(1, int(found[1]) - 1) if found else 1000
