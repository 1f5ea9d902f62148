"""A cluster file: what each job asks of the scheduler, typed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bigtrain.choices import fits
from bigtrain.files import read_toml

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Cluster:
    """What each job gets. Empty or 0: SLURM's own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    nodes: int = 1
    gpus_per_node: int = 0  # One process for each; 0: a job without GPUs.
    tasks_per_node: int = 1  # Processes on a node without GPUs.
    cpus_per_task: int = 1  # For each process; torch takes as many threads, and the workers that read share them.
    mem_gb: float = 0.0  # Of each node.
    timeout_min: int = 60  # Of one attempt; an unfinished run is saved, and the next attempt continues it.
    signal_delay_s: int = 120  # How long before its time limit a job is asked to save and exit.
    max_attempts: int = 100  # How many times a job is started at most.
    strategy: Strategy = "ddp"  # What several processes share: DDP, or DeepSpeed's ZeRO.
    setup: tuple[str, ...] = ()
    """Shell lines before the processes start: modules, a virtual environment, NCCL_SOCKET_IFNAME."""
    container: str = ""  # An image for srun's --container-image (pyxis), with this Python and `scontrol` in it.
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
        lowest = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "timeout_min": 1, "max_attempts": 1}
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
                f"{60 * self.timeout_min} s, or a job is asked to stop before it begins."
            )
        return self

    def changed(self, where: str, **given: Any) -> Cluster:
        """The same with other values.

        Raises:
            ValueError: an unknown name or a value of another kind.
        """
        kinds = get_type_hints(Cluster)
        if "max_lives" in given:  # its name in earlier versions
            given["max_attempts"] = given.pop("max_lives")
        for name, value in given.items():
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=2) or sorted(kinds)
                raise ValueError(f"{where}: there is no setting {name!r}; near it: {', '.join(near)}.")
            value = given[name] = tuple(value) if isinstance(value, list) else value
            if not fits(value, kinds[name]):
                raise ValueError(f"{where}: {name} is {value!r}; it must be {said(kinds[name])}.")
        return replace(self, **given).checked(where)


def said(kind: Any) -> str:
    """A kind of value in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of strings"
    return {int: "a whole number", float: "a number", str: "a string"}[kind]


def read_cluster(path: Path) -> Cluster:
    """Raises:
    ValueError: no such file, not TOML, or an unknown setting.
    """
    return Cluster().changed(str(path), **read_toml(path, "name a cluster file (shipped ones lie in slurm/clusters/)"))
