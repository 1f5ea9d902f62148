"""What all stages of a run share: processes that agree, the run folder, streams over this process's share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.choices import Chosen
from bigtrain.data.decode import jpeg_decoder
from bigtrain.data.plan import Plan
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import Transform
from bigtrain.models.attention import torch_dtype
from bigtrain.models.flops import peak_flops
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network
from bigtrain.runtime.heartbeat import Heartbeat
from bigtrain.runtime.launch import threads_of_process, workers_of_process
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import RunSettings
from bigtrain.text import clean, counted

if TYPE_CHECKING:  # Accelerate is imported when a run begins, after errors in its network are reported
    from accelerate import Accelerator

    from bigtrain.runtime.stopping import Stop


def check_alike(settings: Mapping[str, Any]) -> None:
    """Refuse processes with different settings: they would silently train different networks."""
    from accelerate.utils import gather_object

    own = {name: value for name, value in settings.items() if name not in ("run", "workers")}
    first, *others = gather_object([own])
    for rank, other in enumerate(others, 1):
        if differ := [name for name in own if other[name] != first[name]]:
            pairs = ", ".join(f"{name} ({first[name]!r} and {other[name]!r})" for name in differ)
            raise ValueError(
                f"rank 0 and rank {rank} have different settings: {pairs}. Start all with the same command."
            )


@dataclass(frozen=True)
class Setup:
    run: RunFolder
    accelerator: Accelerator
    stop: Stop
    settings: RunSettings
    precision: Chosen
    heartbeat: Heartbeat

    @classmethod
    def begin(cls, run: RunFolder, precision: Chosen, leaves: Mapping[str, str]) -> Setup:
        """Form the process group and create the run folder.

        Args:
            leaves: the recipe's stages in their order, and the file that each leaves in the run folder.
        """
        from accelerate.utils import broadcast_object_list

        from bigtrain.runtime.log import show_warnings
        from bigtrain.runtime.start import start
        from bigtrain.runtime.stopping import Stop
        from bigtrain.runtime.trackers import begin_trackers

        settings = run.config.run
        accelerator = start(
            precision, timeout_min=2 * settings.hang_timeout_min, trackers=settings.trackers, folder=run.path,
            deterministic=settings.deterministic,
        )  # fmt: skip
        torch.set_num_threads(settings.threads or threads_of_process())
        show_warnings(accelerator.process_index)
        check_alike(asdict(run.config) | asdict(settings) | {"precision": precision})
        problem: list[Exception | None] = [None]
        if accelerator.is_main_process:
            try:
                run.lock()
                run.take_over(leaves)
                run.create(precision=precision, jpeg_decoder=jpeg_decoder(), id=secrets.token_hex(4))
            except (OSError, ValueError) as error:
                problem = [error]
        broadcast_object_list(problem)  # the others wait here
        if problem[0]:
            raise problem[0]
        begin_trackers(accelerator, run)
        heartbeat = Heartbeat(accelerator, 60 * settings.hang_timeout_min)
        return cls(run, accelerator, Stop(accelerator, run.path), settings, precision, heartbeat)

    @property
    def workers(self) -> int:
        """How many processes read and decode for this one."""
        return workers_of_process(self.settings.workers, on_gpu=self.accelerator.device.type == "cuda")

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json, which makes the run a finished one, and close the trackers."""
        from bigtrain.runtime.trackers import end_trackers
        from bigtrain.training.caches import remove_caches

        if self.accelerator.is_main_process:
            remove_caches(self.run.path)
            self.run.finish(results)
        end_trackers(self.accelerator)

    def announce(self, what: str) -> None:
        """The first line of a start: what it does, and on what."""
        device, decoder = self.accelerator.device.type, jpeg_decoder()
        processes, threads = self.accelerator.num_processes, counted(torch.get_num_threads(), "thread")
        self.accelerator.print(
            f"{clean(what)}; {processes} process(es) on {device}, {threads} each, precision {self.precision}, "
            f"JPEGs by {decoder}"
        )

    def leave(self, name: str, network: Network, dtype: torch.dtype = torch.float32) -> Network:
        """Write the network that ends a stage into the run folder."""
        if self.accelerator.is_main_process:
            network.save(self.run / name, dtype)
        return network.to(self.accelerator.device)

    def left(self, name: str, **options: Any) -> Network | None:
        """The network that a finished stage left; None while the stage is not finished."""
        path = self.run / name
        return load_network(path, device=self.accelerator.device, **options) if path.is_file() else None

    def autocast(self) -> torch.autocast:
        """Mixed precision by torch alone, the same under DDP and DeepSpeed: weights stay float32."""
        dtype = torch_dtype(self.precision)
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def mean(self, batch: Batch, value_B: Tensor) -> Tensor:
        """The mean over a step's images on all ranks, of this rank's values; see `Batch.mean`."""
        return batch.mean(value_B, self.accelerator.num_processes)

    def stream(
        self, shard_set: ShardSet, plan: Plan, transform: Transform, *, steps: int = 0, **further: Any
    ) -> Stream:
        """This process's share of a plan.

        Args:
            steps: that are taken of it; where that is more than an epoch, views that are always the same are kept.
        """
        from bigtrain.training.caches import view_cache

        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        is_repeated = steps > plan.batches_per_epoch
        cache = view_cache(self, shard_set, transform, len(plan.sample_N), is_repeated=is_repeated)
        return Stream(
            shard_set, plan, transform, cache=cache,
            rank=rank, world_size=world_size, workers=self.workers, mark=self.heartbeat.mark, **further,
        )  # fmt: skip

    def in_order(self, shard_set: ShardSet, sample_N: NDArray[np.int64], transform: Transform, batch: int) -> Stream:
        """This process's share of some samples in the order of the index, in batches of `batch` a process. Nothing is
        saved while they are read: a run that is asked to stop leaves, and a restart reads them again."""
        plan = shard_set.plan(sample_N, batch * self.accelerator.num_processes, shuffle=False)
        return self.stream(shard_set, plan, transform, behind_batch=self.stop.leave_if_asked)

    def peak_flops(self) -> float | None:
        """The peak of one of these devices, where it is known."""
        if self.settings.peak_tflops:
            return self.settings.peak_tflops * 1e12
        on_gpu = self.accelerator.device.type == "cuda"
        return peak_flops(torch.cuda.get_device_name(), self.precision) if on_gpu else None
