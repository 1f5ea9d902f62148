"""A cluster file: what each job asks of the scheduler, typed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from bigtrain.choices import check_ranges, checked_values, setting
from bigtrain.files import read_toml

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Cluster:
    """What each job gets. Empty or 0: SLURM's own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    nodes: int = setting(1, 1)
    gpus_per_node: int = setting(0, 0)  # One process for each; 0: a job without GPUs.
    tasks_per_node: int = setting(1, 1)  # Processes on a node without GPUs.
    cpus_per_task: int = setting(1, 1)
    """For each process; torch takes as many threads, and the workers that read share them."""
    mem_gb: float = setting(0.0, 0)  # Of each node.
    timeout_min: int = setting(60, 1)  # Of one attempt; an unfinished run is saved, and the next attempt continues it.
    signal_delay_s: int = setting(120, 1)  # How long before its time limit a job is asked to save and exit.
    max_attempts: int = setting(100, 1)  # How many times a job is started at most.
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
        check_ranges(self, lambda name: f"{where}: {name}")
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
        if "max_lives" in given:  # its name in earlier versions
            given["max_attempts"] = given.pop("max_lives")
        return replace(self, **checked_values(where, given, get_type_hints(Cluster))).checked(where)


def read_cluster(path: Path) -> Cluster:
    """Raises:
    ValueError: no such file, not TOML, or an unknown setting.
    """
    return Cluster().changed(str(path), **read_toml(path, "name a cluster file (shipped ones lie in slurm/clusters/)"))
