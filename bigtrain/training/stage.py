"""A training stage: its loop's order, what a checkpoint holds, when it saves, when it stops."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NoReturn, TypeVar
from typing import Protocol as Interface

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bigtrain.data.mixture import Batches
from bigtrain.data.stream import Batch
from bigtrain.runtime import start, zero
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.log import StageLog
from bigtrain.runtime.stopping import AskedWhileWaiting
from bigtrain.runtime.trackers import end_trackers
from bigtrain.training.optim import follow
from bigtrain.training.run_setup import Setup
from bigtrain.training.update import Update

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


class Step(Generic[B]):
    """One step of a stage: parts, each with a backward pass, then one update. Any other order is an error."""

    def __init__(self, stage: Stage[B], batch: B) -> None:
        self.stage: Stage[B] = stage
        self.batch: B = batch
        self.problem: str | None = None  # after the update: why the step was skipped, "" if it was not
        self.figures: dict[str, Tensor | float] = {}
        self._parts_open, self._is_last_part = 0, False

    def parts(self) -> Iterator[B]:
        """The batch's parts of --accumulate; gradients are averaged over the processes with the last of them."""
        accelerator, parts = self.stage.setup.accelerator, self.stage.setup.settings.accumulate
        for number in range(parts):
            self._parts_open, self._is_last_part = self._parts_open + 1, number + 1 == parts
            alone = not self._is_last_part and not zero.is_used(accelerator)
            with accelerator.no_sync(self.stage.module) if alone else nullcontext():
                yield self.batch.part(number, parts)
            self._check(not self._parts_open, "a part went by without step.backward(loss)")

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part's loss, this process's share of it: see `Batch.mean`."""
        self._check(self._parts_open == 1, "step.backward(loss) belongs inside `for part in step.parts()`, once a part")
        self._parts_open = 0
        self.stage.setup.heartbeat.mark(f"computed a loss of step {self.stage.step + 1}")
        self.stage.updates.backward(loss, last=self._is_last_part)

    def update(self, **figures: Tensor | float) -> bool:
        """Change the weights; False where loss or gradient were not finite and the step is skipped.

        Args:
            figures: of this step for the log, beside loss and norm of the gradient.
        """
        self._check(self._is_last_part and not self._parts_open, "step.update() comes after all parts")
        self._check(self.problem is None, "step.update() was called twice")
        self.stage.setup.heartbeat.mark(f"computed the gradient of step {self.stage.step + 1}")
        taken, self.problem = self.stage.updates.take()
        self.figures = {**taken, **figures}
        if self.stage.average is not None and not self.problem:
            follow(self.stage.average, self.stage.trained, self.stage.ema)
        return not self.problem

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            raise RuntimeError(f"stage {self.stage.name!r}, step {self.stage.step + 1}: {what}.")


class Stage(Generic[B]):
    """One training stage of a run; a restart continues it from its newest checkpoint.

        for step in stage:
            for part in step.parts():
                ...                                 # the method's own loss, on stage.module
                step.backward(loss)
            step.update(lr=...)

    Between two steps the stage counts, logs, saves when it is due, and leaves when any rank was asked to stop.

    Args:
        name: of its folder of checkpoints and of its rows in the log.
        trained: the one module that learns; `stage.module` is the same module, prepared for this launch.
        optimizer: over parameters of `trained`.
        stream: what is read.
        steps: how many there are in all.
        clip: largest norm of the gradient; 0: not clipped.
        state: what a checkpoint holds, by name, where that is more than `trained`, which it must then include.
        ema: momentum of a moving average of `trained`, which `into` gives instead; 0: none.
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
        state: Mapping[str, nn.Module] | None = None,
        ema: float = 0.0,
        flops_per_image: float = 0.0,
    ) -> None:
        self.setup, self.steps, self.name, self.trained = setup, steps, name, trained
        self.stream: Source[B] = stream
        self.ema, self.average = ema, copy.deepcopy(trained).requires_grad_(False) if ema else None
        accelerator, settings = setup.accelerator, setup.settings
        kept: nn.Module = trained
        if self.average is not None:
            state = {**(state or {"trained": trained}), "ema": self.average}
        if state:
            kept = nn.ModuleDict(state)
        kept.to(accelerator.device)  # before the moments are loaded beside the weights
        self.checkpoints = Checkpoints(
            setup.run / "checkpoints" / name, accelerator, trained, optimizer,
            state=kept, keep=settings.keep_checkpoints, keep_every=settings.keep_every,
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
        self._save_is_due = False
        self.log = StageLog(
            setup.run.path, accelerator, name,
            steps=self.steps, done=self.step, images_per_step=stream.images_per_step, every=settings.log_every,
            flops_per_step=flops_per_image * stream.images_per_step, peak_flops=setup.peak_flops(),
        )  # fmt: skip
        self.log.event("started", f"at step {self.step} of {self.steps}, {accelerator.num_processes} process(es)")

    def __iter__(self) -> Iterator[Step[B]]:
        """The steps that are left; torch's generator is seeded again for each step and rank."""
        batches = self.stream.from_step(self.step, self.steps)
        while (batch := self._next(batches)) is not None:
            start.seed_step(self.stream.seed, self.step, self.setup.accelerator.process_index)
            step = Step(self, batch.to(self.setup.accelerator.device))
            yield step
            step._check(step.problem is not None, "the step ended without step.update()")
            self._end(step)
        self.log.close()

    def end(self, why: str) -> None:
        """End the stage before its last step; the loop is left at once."""
        self.log.event("ended", f"at step {self.step + 1} of {self.steps}: {why}")
        self.log.close()

    def _next(self, batches: Iterator[B]) -> B | None:
        """The next batch; None at the end."""
        try:
            with self.setup.stop.waiting():
                return next(batches, None)
        except AskedWhileWaiting:
            if not self.skipped_in_a_row:  # else the weights may be bad
                self._save()
            self._leave()

    def _leave(self) -> NoReturn:
        self.log.event("stopped", "when asked")
        self.log.close()
        end_trackers(self.setup.accelerator)
        self.setup.stop.leave(self.step, self.name)

    def _end(self, step: Step[B]) -> None:
        """Count the step, log its figures, save when it is due; leave when any rank was asked to."""
        batch, problem = step.batch, step.problem or ""
        self.step += 1
        self.log.step(wait_s=batch.wait_s, read_bytes=batch.read_bytes, skipped=self.stream.skipped, **step.figures)
        if problem:
            self._skipped(batch, problem)
        else:
            self.skipped_in_a_row = 0
        # after a skipped step the weights may be bad: saving, and so stopping, waits for the next
        asked, bad = self.setup.stop.agreed_and_sums(self.stream.bad(batch))
        if self.setup.accelerator.num_processes > 1:  # a stream alone has counted them itself
            self.stream.agree(batch, bad)
        if asked and not problem:
            self._save()
            self._leave()
        self._save_is_due |= self.step % self.setup.settings.checkpoint_every == 0
        if self._save_is_due and not problem:
            self._save()
            self._save_is_due = False

    @torch.no_grad()
    def constrain(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Put a trained weight back where it belongs (on a sphere, say), after an update."""
        if zero.is_used(self.setup.accelerator):
            zero.set_weight(self.module, name, function(zero.whole_weight(self.module, name)))
        else:
            weight = self.trained.get_parameter(name)
            weight.copy_(function(weight))

    def into(self, module: M, prefix: str = "") -> M:
        """Load what was trained, or its moving average, into a module that is not prepared; of it the part whose names
        begin with `prefix`."""
        is_shared = zero.is_used(self.setup.accelerator) and self.average is None
        learnt = self.trained if self.average is None else self.average
        weights = zero.whole_weights(self.module) if is_shared else learnt.state_dict()
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        module.load_state_dict(own)
        return module.to(self.setup.accelerator.device).requires_grad_(False).eval()

    def _save(self) -> None:
        state: dict[str, Any] = {"skipped_in_a_row": self.skipped_in_a_row}
        if self.updates.scaler:
            state["scaler"] = self.updates.scaler.state_dict()
        self.log.saved(self.checkpoints.save(self.step, state, self.module), self.step)

    def _skipped(self, batch: B, problem: str) -> None:
        """Log a step whose loss or gradient was not finite with its samples; too many in a row stop the run."""
        self.log.skipped(problem, gather_object(self.stream.keys(batch)))
        if self.updates.searches_scale(problem):
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.setup.settings.max_skipped_steps:
            first, newest = self.step - self.skipped_in_a_row + 1, self.checkpoints.newest
            self.log.event("failed", problem)
            self.log.close()
            raise FloatingPointError(
                f"{problem} in {self.skipped_in_a_row} steps in a row, {first} to {self.step} of {self.name}; "
                f"their pictures are in {self.setup.run / 'log.jsonl'}, and the last good checkpoint is "
                f"{newest or 'none yet'}. Lower the learning rate, clip, or use --precision fp32."
            )
