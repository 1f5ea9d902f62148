"""What every training loop of a recipe shares: one step further, when it saves and when it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Generic, TypeVar
from typing import Protocol as Interface

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bigtrain.data.mixture import Batches
from bigtrain.data.stream import Batch
from bigtrain.runtime import start, zero
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.log import StageLog
from bigtrain.runtime.update import Update
from recipes.run_setup import Setup

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B", Batch, Batches)


class Source(Interface[B]):
    """Where batches come from: a `Stream`, or a `Mixture` of several."""

    @property
    def seed(self) -> int: ...
    @property
    def images_per_step(self) -> int: ...
    @property
    def skipped(self) -> Counter[str]: ...
    def from_step(self, step: int, steps: int) -> Generator[B]: ...
    def bad(self, batch: B) -> list[int]: ...
    def agree(self, batch: B, bad: Sequence[int]) -> None: ...
    def keys(self, batch: B) -> list[str]: ...


class Stage(Generic[B]):
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
        stream: what is read.
        steps: how many there are in all.
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
        stream: Source[B],
        steps: int,
        clip: float = 0.0,
        state: nn.Module | None = None,
        flops_per_image: float = 0.0,
    ) -> None:
        self.setup, self.steps, self.name, self.trained = setup, steps, name, trained
        self.stream: Source[B] = stream
        accelerator, settings = setup.accelerator, setup.settings
        (state or trained).to(accelerator.device)  # before the moments are loaded beside the weights
        self.checkpoints = Checkpoints(
            setup.run / "checkpoints" / name, accelerator, trained, optimizer,
            state=state, keep=settings.keep_checkpoints, keep_every=settings.keep_every,
        )  # fmt: skip
        found = self.checkpoints.load()
        self.step = found.get("step", 0)
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
            images_per_step=stream.images_per_step,
            every=settings.log_every,
            flops_per_step=flops_per_image * stream.images_per_step,
            peak_flops=setup.peak_flops(),
        )
        self.log.event("started", f"at step {self.step} of {self.steps}, {accelerator.num_processes} process(es)")

    def batches(self) -> Iterator[B]:
        """The batches that are left, on the device; torch's generator is seeded anew for each step and rank."""
        for batch in self.stream.from_step(self.step, self.steps):
            start.seed_step(self.stream.seed, self.step, self.setup.accelerator.process_index)
            yield batch.to(self.setup.accelerator.device)
        self.log.close()

    def parts(self, batch: B) -> Iterator[B]:
        """A batch's parts of --accumulate; gradients are averaged over the processes with the last of them."""
        accelerator, parts = self.setup.accelerator, self.setup.settings.accumulate
        for number in range(parts):
            self._is_last_part = number + 1 == parts
            alone = not self._is_last_part and not zero.is_used(accelerator)
            with accelerator.no_sync(self.module) if alone else nullcontext():
                yield batch.part(number, parts)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part's loss, this process's share of it: see `Batch.mean`."""
        self.setup.heartbeat.mark(f"computed a loss of step {self.step + 1}")
        self.updates.backward(loss, last=self._is_last_part)

    def update(self) -> bool:
        """Change the weights; False where loss or gradient were not finite and the step is skipped."""
        self.setup.heartbeat.mark(f"computed the gradient of step {self.step + 1}")
        self.figures, self.problem = self.updates.take()
        return not self.problem

    def advance(self, batch: B, **figures: Tensor | float) -> None:
        """Count the step, log its figures, save when it is due; leave when any rank was asked to."""
        self.step += 1
        self.log.step(
            wait_s=batch.wait_s, read_bytes=batch.read_bytes, skipped=self.stream.skipped, **self.figures, **figures
        )
        if self.problem:
            self._skipped(batch)
        else:
            self.skipped_in_a_row = 0
        # behind a step that was skipped the weights may be no good: saving, and so stopping, waits for the next
        asked, bad = self.setup.stop.agreed_and_sums(self.stream.bad(batch))
        if self.setup.accelerator.num_processes > 1:  # a stream alone has counted them itself
            self.stream.agree(batch, bad)
        if asked and not self.problem:
            self._save()
            self.log.event("stopped", "when asked")
            self.log.close()
            self.setup.end_trackers()
            self.setup.stop.leave(self.step, self.name)
        self._save_is_due |= self.step % self.setup.settings.checkpoint_every == 0
        if self._save_is_due and not self.problem:
            self._save()
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

    def _save(self) -> None:
        state: dict[str, Any] = {"skipped_in_a_row": self.skipped_in_a_row}
        if self.updates.scaler:
            state["scaler"] = self.updates.scaler.state_dict()
        self.log.saved(self.checkpoints.save(self.step, state, self.module), self.step)

    def _skipped(self, batch: B) -> None:
        """Log a step whose loss or gradient was not finite with its samples; too many in a row stop the run."""
        self.log.skipped(self.problem, gather_object(self.stream.keys(batch)))
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
