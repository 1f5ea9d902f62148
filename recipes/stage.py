"""What every training loop of a recipe shares: where it begins, one step further, when it saves and when it stops."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.data.pictures import jpeg_decoder
from bigtrain.data.plan import PADDING, Plan, Position, check_divides
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import Transform
from bigtrain.models.flops import peak_flops
from bigtrain.runtime import start, zero
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.config import RunSettings, result_settings
from bigtrain.runtime.heartbeat import Heartbeat
from bigtrain.runtime.log import StageLog, show_warnings
from bigtrain.runtime.preempt import Stop
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.update import Update

M = TypeVar("M", bound=nn.Module)


def check_batch(global_batch: int, settings: RunSettings) -> None:
    """Refuse a batch that does not divide among the launched processes, and each one's parts."""
    share = global_batch // check_divides(global_batch, start.world_size_of_launch())
    if share % settings.accumulate:
        allowed = [str(parts) for parts in range(1, share + 1) if share % parts == 0]
        raise ValueError(
            f"--accumulate {settings.accumulate} does not divide each process's share of a batch, {share} images: use "
            f"{', '.join(allowed[:-1])}{' or ' if allowed[:-1] else ''}{allowed[-1]}."
        )


@dataclass(frozen=True)
class Setup:
    """What all stages of a run share."""

    run: RunFolder
    accelerator: Accelerator
    stop: Stop
    settings: RunSettings
    precision: start.Chosen
    heartbeat: Heartbeat

    @classmethod
    def begin(cls, run: RunFolder, precision: start.Chosen, leaves: Mapping[str, str]) -> Setup:
        """Form the process group and create the run folder.

        Args:
            leaves: the recipe's stages in their order, and the file that each leaves in the run folder.
        """
        settings = run.config.run
        accelerator = start.start(
            precision, timeout_min=2 * settings.hang_timeout_min, trackers=settings.trackers, folder=run.path,
            deterministic=settings.deterministic,
        )  # fmt: skip
        show_warnings(accelerator.process_index)
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
        return start.autocast(self.accelerator, self.precision)

    def stream(self, shard_set: ShardSet, plan: Plan, transform: Transform) -> Stream:
        """This process's share of a plan."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return Stream(
            shard_set, plan, transform,
            rank=rank, world_size=world_size, workers=self.settings.workers, mark=self.heartbeat.mark,
        )  # fmt: skip

    def in_order(self, shard_set: ShardSet, sample_N: NDArray[np.int64], transform: Transform, batch: int) -> Stream:
        """This process's share of some samples in the order of the index, `batch` of them at once."""
        plan = shard_set.plan(sample_N, batch * self.accelerator.num_processes, shuffle=False)
        return self.stream(shard_set, plan, transform)

    def peak_flops(self) -> float | None:
        """What one of these devices can do at most, if it is known."""
        if self.settings.peak_tflops:
            return self.settings.peak_tflops * 1e12
        on_gpu = self.accelerator.device.type == "cuda"
        return peak_flops(torch.cuda.get_device_name(), self.precision) if on_gpu else None


def already_finished(run: RunFolder) -> bool:
    """Refuse a folder of another run; say so, once, if this one is finished."""
    run.check()
    if run.finished and os.environ.get("RANK", "0") == "0":
        print(f"this run is finished, nothing to do: see {run.path}")
    return run.finished


class Stage:
    """One training stage of a run, which a restart takes up where it was left.

        for batch in stage.batches():
            for part in stage.parts(batch):
                ...                                 # the method's own loss, on stage.module
                stage.backward(loss)
            stage.update()
            stage.advance(batch)

    Args:
        name: of its folder of checkpoints and of its rows in the log.
        trained: the one module that learns; `stage.module` is it, prepared for this launch.
        optimizer: over parameters of `trained`.
        stream: what is read in each of `epochs`.
        clip: largest norm of the gradient; 0: not clipped.
        state: all that a checkpoint holds, where that is more than `trained`, which is then a part of it.
        flops_per_image: of a training step, for the log.
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
        clip: float = 0.0,
        state: nn.Module | None = None,
        flops_per_image: float = 0.0,
    ) -> None:
        self.setup, self.stream, self.epochs, self.name, self.trained = setup, stream, epochs, name, trained
        accelerator, settings = setup.accelerator, setup.settings
        (state or trained).to(accelerator.device)  # before the moments are loaded beside the weights
        self.checkpoints = Checkpoints(
            setup.run / "checkpoints" / name, accelerator, trained, optimizer,
            state=state, keep=settings.keep_checkpoints, keep_every=settings.keep_every,
        )  # fmt: skip
        found = self.checkpoints.load()
        self.start = Position(found["epoch"], found["batch"]) if found else Position()
        self.step = stream.plan.steps_before(self.start)
        self.steps = epochs * stream.plan.batches_per_epoch
        self.skipped_in_a_row = found.get("skipped_in_a_row", 0)
        if settings.compile:
            trained.compile()
        if zero.is_used(accelerator):
            accelerator.free_memory()  # of the stage before
            accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip
            self.module, self.optimizer = accelerator.prepare(trained, optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare_model(trained), optimizer
        self.checkpoints.load_moments(self.module)
        self.updates = Update(accelerator, self.module, self.optimizer, clip=clip, precision=setup.precision)
        if self.updates.scaler and "scaler" in found:
            self.updates.scaler.load_state_dict(found["scaler"])
        self.figures: dict[str, Tensor | float] = {}
        self.problem = ""
        self._is_last_part, self._save_is_due = True, False
        self.log = StageLog(
            setup.run.path,
            accelerator,
            name,
            steps=self.steps,
            done=self.step,
            images_per_step=stream.plan.global_batch,
            every=settings.log_every,
            flops_per_step=flops_per_image * stream.plan.global_batch,
            peak_flops=setup.peak_flops(),
        )
        self.log.event("started", f"at step {self.step} of {self.steps}, {accelerator.num_processes} process(es)")

    def batches(self) -> Iterator[Batch]:
        """The batches that are left, on the device; torch's generator is seeded anew for each step and rank."""
        for batch in self.stream.batches(self.start, self.epochs):
            start.seed_step(self.stream.plan.seed, self.step, self.setup.accelerator.process_index)
            yield batch.to(self.setup.accelerator.device)
        self.log.close()

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """A batch's parts of --accumulate; gradients are averaged over the processes with the last of them."""
        accelerator, parts = self.setup.accelerator, self.setup.settings.accumulate
        for number in range(parts):
            self._is_last_part = number + 1 == parts
            alone = not self._is_last_part and not zero.is_used(accelerator)
            with accelerator.no_sync(self.module) if alone else nullcontext():
                yield batch.part(number, parts)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part's loss, this process's share of it: see `Batch.mean`."""
        self.updates.backward(loss, last=self._is_last_part)

    def update(self) -> bool:
        """Change the weights; False where loss or gradient were not finite and the step is skipped."""
        self.figures, self.problem = self.updates.take()
        return not self.problem

    def advance(self, batch: Batch, **figures: Tensor | float) -> None:
        """Count the step, log its figures, save when it is due; leave when any rank was asked to."""
        self.step += 1
        skipped = self.stream.budget.by_kind
        self.log.step(wait_s=batch.wait_s, read_bytes=batch.read_bytes, skipped=skipped, **self.figures, **figures)
        if self.problem:
            self._skipped(batch)
        else:
            self.skipped_in_a_row = 0
        asked, bad = self.setup.stop.agreed_and_sum(len(batch.bad))
        if self.setup.accelerator.num_processes > 1:  # a stream alone has counted them itself
            self.stream.budget.agree(batch.position.epoch, bad)
        if asked:
            self._save(batch)
            self.log.event("stopped", "when asked")
            self.log.close()
            self.setup.end_trackers()
            self.setup.stop.leave(self.step, self.name)
        self._save_is_due |= self.step % self.setup.settings.checkpoint_every == 0
        if self._save_is_due and not self.problem:  # behind a step that was skipped the weights may be no good
            self._save(batch)
            self._save_is_due = False

    @torch.no_grad()
    def constrain(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Put a trained weight back where it belongs (on a sphere, say), behind an update."""
        if zero.is_used(self.setup.accelerator):
            zero.set_weight(self.module, name, function(zero.whole_weight(self.module, name)))
        else:
            weight = self.trained.get_parameter(name)
            weight.copy_(function(weight))

    def into(self, module: M, prefix: str = "") -> M:
        """Load what was trained, or the part of it whose names begin so, into a module that is not prepared."""
        is_shared = zero.is_used(self.setup.accelerator)
        weights = zero.whole_weights(self.module) if is_shared else self.trained.state_dict()
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        module.load_state_dict(own)
        return module.to(self.setup.accelerator.device).requires_grad_(False).eval()

    def _save(self, batch: Batch) -> None:
        state: dict[str, Any] = asdict(self.stream.plan.after(batch.position))
        state["skipped_in_a_row"] = self.skipped_in_a_row
        if self.updates.scaler:
            state["scaler"] = self.updates.scaler.state_dict()
        self.log.saved(self.checkpoints.save(self.step, state, self.module), self.step)

    def _skipped(self, batch: Batch) -> None:
        """Log a step whose loss or gradient was not finite with its samples; too many in a row stop the run."""
        here = [self.stream.shard_set.key(sample) for sample in batch.sample_B.tolist() if sample != PADDING]
        self.log.skipped(self.problem, gather_object(here))
        if self.updates.searches_scale(self.problem):
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.setup.settings.max_skipped_steps:
            first, newest = self.step - self.skipped_in_a_row + 1, self.checkpoints.newest
            self.log.event("failed", self.problem)
            self.log.close()
            raise FloatingPointError(
                f"{self.problem} in {self.skipped_in_a_row} steps in a row, {first} to {self.step} of {self.name}; "
                f"their pictures are in {self.setup.run / 'log.jsonl'}, and the last good checkpoint is "
                f"{newest or 'none yet'}. Lower the learning rate, clip, or use --precision fp32."
            )


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
