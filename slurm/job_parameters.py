"""From a cluster file to what submitit writes into a job's script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster


def parameters(
    cluster: Cluster, *, name: str, folder: Path, parallel: int | None = None, after: Sequence[str] = ()
) -> dict[str, Any]:
    """submitit's parameters for such a job, or an array of them.

    Args:
        folder: where submitit keeps its files, which all nodes must see.
        parallel: of an array, how many may run at once.
        after: jobs that must have ended before.
    """
    made: dict[str, Any] = {
        "job_name": name,
        "time": cluster.timeout_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "signal_delay_s": cluster.signal_delay_s,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }
    optional = ("partition", "account", "qos", "gpus_per_node", "constraint", "exclude")
    made |= {key: value for key in optional if (value := getattr(cluster, key))}
    if cluster.mem_gb:
        made["mem"] = f"{round(cluster.mem_gb * 1024)}MB"
    if parallel:
        made["array_parallelism"] = parallel
    if after:
        made["dependency"] = f"afterany:{':'.join(after)}"
    setup = [*watched(cluster.setup), *([see_folder(folder)] if cluster.nodes > 1 else [])]
    if setup:
        made["setup"] = setup
    srun = [f"--cpus-per-task={cluster.cpus_per_task}"]  # since SLURM 22.05 srun does not inherit sbatch's
    if cluster.container:
        srun.append(f"--container-image={cluster.container}")
        if cluster.container_mounts:
            srun.append(f"--container-mounts={cluster.container_mounts}")
    made["srun_args"] = srun
    return made


def watched(lines: Sequence[str]) -> list[str]:
    """The cluster file's own lines of shell; one that fails ends the job and is named. A condition may fail."""
    if not lines:
        return []
    sentence = "bigtrain-slurm: error: this line of setup failed: $BASH_COMMAND"
    return [f"trap 'echo \"{sentence}\" >&2; exit 2' ERR", *lines, "trap - ERR"]


def see_folder(folder: Path) -> str:
    """A shell line of the first node: end the job with an error if another node does not see the folder."""
    quoted = "'" + str(folder).replace("'", "'\"'\"'") + "'"
    look = f"srun --ntasks-per-node=1 --chdir=/ --output=/dev/null --error=/dev/null test -d {quoted}"
    sentence = "bigtrain-slurm: error: not all nodes of this job see its folder: choose one on a shared file system."
    return f'{look} || {{ echo "{sentence}" >&2; exit 2; }}'
