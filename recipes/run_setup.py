"""What every recipe begins with: processes that agree, a run folder, and what all of its stages share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.choices import Chosen
from bigtrain.data.pictures import jpeg_decoder
from bigtrain.data.plan import Plan
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import Transform
from bigtrain.models.flops import peak_flops
from bigtrain.runtime.heartbeat import Heartbeat
from bigtrain.runtime.precision import autocast
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import RunSettings, result_settings

if TYPE_CHECKING:  # Accelerate is imported when a run begins, behind the mistakes that its network shows
    from accelerate import Accelerator

    from bigtrain.runtime.preempt import Stop


def check_alike(settings: Mapping[str, Any]) -> None:
    """Refuse processes with different settings: they would train different networks without a word."""
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
    """What all stages of a run share."""

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
        from bigtrain.runtime.preempt import Stop
        from bigtrain.runtime.start import start

        settings = run.config.run
        accelerator = start(
            precision, timeout_min=2 * settings.hang_timeout_min, trackers=settings.trackers, folder=run.path,
            deterministic=settings.deterministic,
        )  # fmt: skip
        if settings.threads:
            torch.set_num_threads(settings.threads)
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
        if settings.trackers:
            accelerator.init_trackers("bigtrain", flat(result_settings(run.config)), tracker_options(run))
        heartbeat = Heartbeat(accelerator, 60 * settings.hang_timeout_min)
        return cls(run, accelerator, Stop(accelerator, run.path), settings, precision, heartbeat)

    def end_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def autocast(self) -> torch.autocast:
        return autocast(self.accelerator.device, self.precision)

    def stream(self, shard_set: ShardSet, plan: Plan, transform: Transform, **further: Any) -> Stream:
        """This process's share of a plan."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return Stream(
            shard_set, plan, transform,
            rank=rank, world_size=world_size, workers=self.settings.workers, mark=self.heartbeat.mark, **further,
        )  # fmt: skip

    def in_order(self, shard_set: ShardSet, sample_N: NDArray[np.int64], transform: Transform, batch: int) -> Stream:
        """This process's share of some samples in the order of the index, `batch` of them at once. Nothing is saved
        while they are read: a run that is asked to stop leaves, and a restart reads them again."""
        plan = shard_set.plan(sample_N, batch * self.accelerator.num_processes, shuffle=False)
        return self.stream(shard_set, plan, transform, behind_batch=self.stop.leave_if_asked)

    def peak_flops(self) -> float | None:
        """What one of these devices can do at most, if it is known."""
        if self.settings.peak_tflops:
            return self.settings.peak_tflops * 1e12
        on_gpu = self.accelerator.device.type == "cuda"
        return peak_flops(torch.cuda.get_device_name(), self.precision) if on_gpu else None


def tracker_options(run: RunFolder) -> dict[str, dict[str, Any]]:
    """A run keeps its name, and where the tracker can, its history over restarts."""
    name = run.path.resolve().name
    return {
        "wandb": {"name": name, "dir": str(run.path), "id": run.resolved("id"), "resume": "allow"},
        "mlflow": {"run_name": name},
        "trackio": {"name": name, "resume": "allow"},
    }


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers and words."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
