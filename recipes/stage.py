"""What every training loop of a recipe shares: where it begins, one step further, when it saves and when it stops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from accelerate import Accelerator
from torch import nn

from bigtrain.data.plan import Plan, Position
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import Transform
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.config import RunSettings
from bigtrain.runtime.log import StageLog
from bigtrain.runtime.preempt import Stop
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.start import seed_step


def stream_of(
    accelerator: Accelerator, shard_set: ShardSet, plan: Plan, transform: Transform, settings: RunSettings
) -> Stream:
    """This process's share of a plan."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return Stream(shard_set, plan, transform, rank=rank, world_size=world_size, workers=settings.workers)


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
        run: RunFolder,
        accelerator: Accelerator,
        stop: Stop,
        settings: RunSettings,
        *,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        epochs: int,
        state: nn.Module | None = None,
    ) -> None:
        self.accelerator, self.stop, self.settings, self.stream, self.epochs = (
            accelerator,
            stop,
            settings,
            stream,
            epochs,
        )
        (state or trained).to(accelerator.device)  # before the moments are loaded beside the weights
        folder = run / "checkpoints" / name
        self.checkpoints = Checkpoints(folder, accelerator, state or trained, optimizer, settings.keep_checkpoints)
        found = self.checkpoints.load()
        self.start = Position(found["epoch"], found["batch"]) if found else Position()
        self.step = stream.plan.steps_before(self.start)
        self.steps = epochs * stream.plan.batches_per_epoch
        self.module, self.optimizer = accelerator.prepare(trained, optimizer)
        self.log = StageLog(
            run.path,
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
            seed_step(self.stream.plan.seed, self.step, self.accelerator.process_index)
            yield batch.to(self.accelerator.device)
        self.log.close()

    def advance(self, batch: Batch, **figures: torch.Tensor | float) -> None:
        """Count the step, log its figures, save when it is due; leave when any rank was asked to."""
        self.step += 1
        self.log.step(**figures)
        following = asdict(self.stream.plan.after(batch.position))
        if self.stop.agreed():
            self.checkpoints.save(self.step, following)
            self.stop.leave()
        elif self.step % self.settings.checkpoint_every == 0:
            self.checkpoints.save(self.step, following)
