"""What every training loop of a recipe shares: where it begins, one step further, when it saves and when it stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from bigtrain.data.pictures import jpeg_decoder
from bigtrain.data.plan import Plan, Position
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import Transform
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.config import RunSettings
from bigtrain.runtime.log import StageLog, show_warnings
from bigtrain.runtime.preempt import Stop
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.start import seed_step, start


@dataclass(frozen=True)
class Setup:
    """What all stages of a run share."""

    run: RunFolder
    accelerator: Accelerator
    stop: Stop
    settings: RunSettings

    @classmethod
    def begin(cls, run: RunFolder, precision: Literal["fp32", "bf16", "fp16"], settings: RunSettings) -> Setup:
        """Form the process group and create the run folder."""
        accelerator = start(precision)
        show_warnings(accelerator.process_index)
        if accelerator.is_main_process:
            run.create(precision=precision, jpeg_decoder=jpeg_decoder())
        accelerator.wait_for_everyone()
        return cls(run, accelerator, Stop(accelerator, run.path), settings)

    def stream(self, shard_set: ShardSet, plan: Plan, transform: Transform) -> Stream:
        """This process's share of a plan."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return Stream(shard_set, plan, transform, rank=rank, world_size=world_size, workers=self.settings.workers)

    def in_order(self, shard_set: ShardSet, sample_N: NDArray[np.int64], transform: Transform, batch: int) -> Stream:
        """This process's share of some samples in the order of the index, `batch` of them at once."""
        plan = shard_set.plan(sample_N, batch * self.accelerator.num_processes, shuffle=False)
        return self.stream(shard_set, plan, transform)


def already_finished(run: RunFolder) -> bool:
    """Refuse a folder of another run; say so, once, if this one is finished."""
    run.check()
    if run.finished and os.environ.get("RANK", "0") == "0":
        print(f"this run is finished, nothing to do: see {run.path}")
    return run.finished


class Stage:
    """One training stage of a run, which a restart takes up where it was left.

        for batch in stage.batches():
            ...                                     # the method's own step, on stage.module and stage.optimizer
            stage.advance(batch, loss=loss)

    Args:
        name: of its folder of checkpoints and of its rows in the log.
        trained: the one module that learns; `stage.module` is it, prepared for this launch.
        optimizer: over parameters of `trained`.
        stream: what is read in each of `epochs`.
        state: all that a checkpoint holds, where that is more than `trained`, which is then a part of it.
    """

    def __init__(
        self,
        name: str,
        setup: Setup,
        *,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        epochs: int,
        state: nn.Module | None = None,
    ) -> None:
        self.setup, self.stream, self.epochs = setup, stream, epochs
        accelerator, settings = setup.accelerator, setup.settings
        (state or trained).to(accelerator.device)  # before the moments are loaded beside the weights
        folder = setup.run / "checkpoints" / name
        self.checkpoints = Checkpoints(folder, accelerator, state or trained, optimizer, settings.keep_checkpoints)
        found = self.checkpoints.load()
        self.start = Position(found["epoch"], found["batch"]) if found else Position()
        self.step = stream.plan.steps_before(self.start)
        self.steps = epochs * stream.plan.batches_per_epoch
        self.module, self.optimizer = accelerator.prepare(
            trained, optimizer, device_placement=[True, False]
        )  # the optimizer's state is where it belongs; moving AdamW's step counts to a GPU would sync at each
        self.log = StageLog(
            setup.run.path,
            accelerator,
            name,
            steps=self.steps,
            done=self.step,
            images_per_step=stream.plan.global_batch,
            every=settings.log_every,
        )

    def batches(self) -> Iterator[Batch]:
        """The batches that are left, on the device; torch's generator is seeded anew for each step and rank."""
        for batch in self.stream.batches(self.start, self.epochs):
            seed_step(self.stream.plan.seed, self.step, self.setup.accelerator.process_index)
            yield batch.to(self.setup.accelerator.device)
        self.log.close()

    def advance(self, batch: Batch, **figures: torch.Tensor | float) -> None:
        """Count the step, log its figures, save when it is due; leave when any rank was asked to."""
        self.step += 1
        skipped = self.stream.budget.by_kind
        self.log.step(wait_s=batch.wait_s, read_bytes=batch.read_bytes, skipped=skipped, **figures)
        following = asdict(self.stream.plan.after(batch.position))
        asked, bad = self.setup.stop.agreed_and_sum(len(batch.bad))
        if self.setup.accelerator.num_processes > 1:  # a stream alone has counted them itself
            self.stream.budget.agree(batch.position.epoch, bad)
        if asked:
            self.checkpoints.save(self.step, following)
            self.log.close()
            self.setup.stop.leave()
        elif self.step % self.setup.settings.checkpoint_every == 0:
            self.checkpoints.save(self.step, following)
