"""A cluster file: what one job asks of SLURM, typed; and what SLURM's refusals mean in its terms."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from slurm import scheduler as jobs

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Cluster:
    """What each job gets. Empty or 0: SLURM's own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    """One process for each; 0: a job without GPUs."""
    tasks_per_node: int = 1
    """Processes on a node without GPUs."""
    cpus_per_task: int = 1
    """For each process; torch takes as many threads, and the workers that read share them."""
    mem_gb: float = 0.0
    """Of each node."""
    timeout_min: int = 60
    """Of one life of a job; what is not done then is saved, and goes on in the next."""
    signal_delay_s: int = 120
    """So long before the end a job is told to save and leave."""
    max_lives: int = 100
    """How often a job is started at most."""
    strategy: Strategy = "ddp"
    """What several processes share: DDP, or DeepSpeed's ZeRO."""
    setup: tuple[str, ...] = ()
    """Shell lines before the processes start: modules, a virtual environment, NCCL_SOCKET_IFNAME."""
    container: str = ""
    """An image for srun's --container-image (pyxis), with this Python and `scontrol` in it."""
    container_mounts: str = ""
    constraint: str = ""
    exclude: str = ""

    @property
    def processes_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    def checked(self, where: str) -> Cluster:
        """Raises:
        ValueError: a value that no job can have.
        """
        lowest = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "timeout_min": 1, "max_lives": 1}
        lowest |= {"gpus_per_node": 0, "mem_gb": 0, "signal_delay_s": 1}
        for name, low in lowest.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{where}: {name} is {value}; it must be at least {low}.")
        if self.gpus_per_node and self.tasks_per_node > 1:
            raise ValueError(
                f"{where}: tasks_per_node is for nodes without GPUs; with GPUs there is one process a GPU."
            )
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"{where}: signal_delay_s is {self.signal_delay_s}; it must be less than timeout_min, "
                f"{60 * self.timeout_min} s, or a job is told to leave before it begins."
            )
        return self

    def changed(self, where: str, **given: Any) -> Cluster:
        """The same with other values.

        Raises:
            ValueError: an unknown name or a value of another kind.
        """
        kinds = get_type_hints(Cluster)
        for name, value in given.items():
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=2) or sorted(kinds)
                raise ValueError(f"{where}: there is no setting {name!r}; near it: {', '.join(near)}.")
            value = given[name] = tuple(value) if isinstance(value, list) else value
            if not _fits(value, kinds[name]):
                raise ValueError(f"{where}: {name} is {value!r}; it must be {said(kinds[name])}.")
        return replace(self, **given).checked(where)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(line, str) for line in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def said(kind: Any) -> str:
    """A kind of value in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "a whole number", float: "a number", str: "a string"}[kind]


def read_cluster(path: Path) -> Cluster:
    """Raises:
    ValueError: no such file, no TOML, or a setting that there is not.
    """
    return Cluster().changed(str(path), **read_toml(path, "a cluster file (shipped ones lie in slurm/clusters/)"))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"{path} cannot be read ({reason}): name {what}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def submission(
    cluster: Cluster, *, name: str, folder: Path, parallel: int | None = None, after: str = ""
) -> dict[str, Any]:
    """submitit's parameters for such a job, or an array of them.

    Args:
        folder: where submitit keeps its files, which all nodes must see.
        parallel: of an array, how many may run at once.
        after: jobs that must have ended before, for --dependency.
    """
    parameters: dict[str, Any] = {
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
    parameters |= {key: value for key in optional if (value := getattr(cluster, key))}
    if cluster.mem_gb:
        parameters["mem"] = f"{round(cluster.mem_gb * 1024)}MB"
    if parallel:
        parameters["array_parallelism"] = parallel
    if after:
        parameters["dependency"] = after
    setup = list(cluster.setup)
    if cluster.nodes > 1:
        setup.append(see_folder(folder))
    if setup:
        parameters["setup"] = setup
    srun = [f"--cpus-per-task={cluster.cpus_per_task}"]  # since SLURM 22.05 srun does not take over sbatch's
    if cluster.container:
        srun.append(f"--container-image={cluster.container}")
        if cluster.container_mounts:
            srun.append(f"--container-mounts={cluster.container_mounts}")
    parameters["srun_args"] = srun
    return parameters


def see_folder(folder: Path) -> str:
    """A shell line of the first node: end the job with a sentence where another node does not see the folder."""
    quoted = "'" + str(folder).replace("'", "'\"'\"'") + "'"
    look = f"srun --ntasks-per-node=1 --chdir=/ --output=/dev/null --error=/dev/null test -d {quoted}"
    sentence = "bigtrain-slurm: error: not all nodes of this job see its folder: choose one on a shared file system."
    return f'{look} || {{ echo "{sentence}" >&2; exit 2; }}'


CAUSES = {  # a word of sbatch's refusal -> the parameters behind it
    "partition": ("partition", "account"),
    "account": ("account", "partition"),
    "qos": ("qos",),
    "time limit": ("time",),
    "node count": ("nodes",),
    "more processors": ("nodes", "ntasks-per-node", "cpus-per-task"),
    "memory": ("mem",),
    "feature": ("constraint",),
    "gres": ("gpus-per-node",),
    "gpu": ("gpus-per-node",),
    "dependency": ("dependency",),
    "node name": ("exclude",),
    "node configuration": ("gpus-per-node", "cpus-per-task", "ntasks-per-node", "mem", "nodes", "constraint"),
    "array": ("array",),
}


def explained(refusal: str, script: str) -> str:
    """One sentence of what sbatch has said, with the lines of the script that caused it and what there is instead."""
    words = [line.split("error:", 1)[1].strip() for line in refusal.splitlines() if "sbatch: error:" in line]
    words = [w for w in words if "Batch job submission failed" not in w] + [
        w for w in words if "submission failed" in w
    ]
    told = words[0].rstrip(".") if words else (refusal.strip().splitlines() or ["no word of why"])[-1]
    everything = " ".join(words).lower()
    names = [name for word, names in CAUSES.items() if word in everything for name in names]
    lines = [line for line in script.splitlines() for n in dict.fromkeys(names) if line.startswith(f"#SBATCH --{n}=")]
    cause = f" The line{'s' if len(lines) > 1 else ''} behind it: {'; '.join(lines)}." if lines else ""
    there = what_there_is() if {"partition", "nodes", "gpus-per-node", "mem"} & set(names) else ""
    return f"sbatch refuses the job: {told}.{cause}{there} Change the cluster file or give another flag."


def what_there_is() -> str:
    """The partitions and what their nodes have."""
    try:
        found = jobs.ask("sinfo", "-h", "-o", "%R: %D nodes of %c CPUs, %m MB, %G").splitlines()
    except jobs.NoSlurmError:
        return ""
    return f" There is {'; '.join(line.replace('(null)', 'no GPUs') for line in sorted(set(found)))}." if found else ""


def names_of_settings() -> Mapping[str, Any]:
    """Each setting and its kind."""
    kinds = get_type_hints(Cluster)
    return {field.name: kinds[field.name] for field in fields(Cluster)}
