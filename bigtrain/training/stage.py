"""A training stage: its loop's order, what a checkpoint holds, when it saves, when it stops."""

from __future__ import annotations

import copy
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar
from typing import Protocol as Interface

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bigtrain.data import later
from bigtrain.runtime import start, zero
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.log import StageLog
from bigtrain.runtime.stopping import AskedWhileWaiting
from bigtrain.runtime.trackers import end_trackers
from bigtrain.training.compiling import compile_pays, prepare_compiling
from bigtrain.training.optim import follow
from bigtrain.training.run_setup import Setup
from bigtrain.training.step import PROBLEM, B, Step
from bigtrain.training.update import PROBLEMS, Update

M = TypeVar("M", bound=nn.Module)
AGREED = "agreed_"  # names of numbers that are no figures of the log


class Outcome(NamedTuple, Generic[B]):
    """A step that was taken or skipped, and its numbers, which may still be under way."""

    step: int
    batch: B
    numbers: later.Later


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
    """One training stage of a run; a restart continues it from its newest checkpoint.

        for step in stage:
            for part in step.parts():
                ...                                 # the method's own loss, on stage.module
                step.backward(loss)
            step.update(lr=...)

    Between two steps the stage counts, logs, saves when it is due, and leaves when any rank was asked to stop. On a GPU
    it reads a step's figures, whether it was skipped, and what the ranks agree on, `later.STEPS` steps behind, so that
    the device never waits for this process; before it saves, it waits for all of them.

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
        self.taken: Tensor | bool = True  # Whether the newest update has changed the weights.
        self._outcomes: deque[Outcome[B]] = deque()
        self._problem, self._asked = "", False  # of the newest step whose outcome is known
        self._first_is_timed = compile_pays(settings.compile, accelerator.device, steps)
        if self._first_is_timed:
            prepare_compiling(settings.compile)
            trained.compile(dynamic=False)
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
        self._behind = later.STEPS if self.updates.skips_on_device and accelerator.device.type == "cuda" else 0
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
            began, step = time.monotonic(), Step(self, batch.to(self.setup.accelerator.device))
            yield step
            if self._first_is_timed:
                self.log.event("compiled", f"the first step took {time.monotonic() - began:.1f} s, with compiling")
                self._first_is_timed = False
            step._check(step.figures is not None, "the step ended without step.update()")
            self._end(step)
        self._close()

    def end(self, why: str) -> None:
        """End the stage before its last step; the loop is left at once."""
        self._learn(0)
        self.log.event("ended", f"at step {self.step + 1} of {self.steps}: {why}")
        self._close()

    def _next(self, batches: Iterator[B]) -> B | None:
        """The next batch; None at the end."""
        try:
            with self.setup.stop.waiting():
                return next(batches, None)
        except AskedWhileWaiting:
            self._learn(0)
            if not self.skipped_in_a_row:  # else the weights may be bad
                self._save()
            self._leave()

    def _leave(self) -> NoReturn:
        self.log.event("stopped", "when asked")
        self._close()
        end_trackers(self.setup.accelerator)
        self.setup.stop.leave(self.step, self.name)

    def _end(self, step: Step[B]) -> None:
        """Count the step, learn what came of it or of earlier ones, save when it is due; leave when any rank was asked
        to."""
        self.step += 1
        sums = self.setup.stop.sums(self.stream.bad(step.batch))
        agreed = {f"{AGREED}{number}": value for number, value in enumerate(sums)}
        self._outcomes.append(
            Outcome(self.step, step.batch.without_views(), later.Later({**(step.figures or {}), **agreed}))
        )
        self._learn(self._behind)
        self._save_is_due |= self.step % self.setup.settings.checkpoint_every == 0
        if self._asked or self._save_is_due:
            self._learn(0)
            if self._problem:  # the weights may be bad: saving, and so stopping, waits for the next step
                return
            self._save()
            self._save_is_due = False
            if self._asked:
                self._leave()

    def _learn(self, behind: int) -> None:
        """Log what came of the steps but for the newest `behind`; those that were skipped are named."""
        while len(self._outcomes) > behind:
            step, batch, numbers = self._outcomes.popleft()
            figures = numbers.read()
            asked, *bad = (int(figures.pop(name)) for name in list(figures) if name.startswith(AGREED))
            self._problem, self._asked = PROBLEMS[int(figures.pop(PROBLEM))], asked > 0
            self.log.step(wait_s=batch.wait_s, read_bytes=batch.read_bytes, skipped=self.stream.skipped, **figures)
            if self._problem:
                self._skipped(step, batch, self._problem)
            else:
                self.skipped_in_a_row = 0
            if self.setup.accelerator.num_processes > 1:  # a stream alone has counted them itself
                self.stream.agree(batch, bad)
        self._log_saved()

    def _close(self) -> None:
        """All steps are in the log, and the newest checkpoint is whole."""
        self._learn(0)
        self.checkpoints.settle()
        self._log_saved()
        self.log.close()

    def _log_saved(self) -> None:
        for step, waited_s in self.checkpoints.newly_whole():
            self.log.saved(waited_s, step)

    @torch.no_grad()
    def constrain(self, module: nn.Module, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Put a weight of what is trained, or of its moving average, back where it belongs (on a sphere, say), after an
        update; a step that was skipped leaves it as it is."""
        if self.taken is False:
            return
        if module is self.trained and zero.is_used(self.setup.accelerator):
            zero.set_weight(self.module, name, function(zero.whole_weight(self.module, name)))
            return
        weight = module.get_parameter(name)
        moved = function(weight)
        weight.copy_(torch.where(self.taken, moved, weight) if isinstance(self.taken, Tensor) else moved)

    def follow(self, average: nn.Module, network: nn.Module, momentum: float) -> None:
        """Move a moving average of a network one step, unless the step was skipped."""
        follow(average, network, momentum, self.taken)

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
        self.checkpoints.save(self.step, state, self.module)

    def _skipped(self, step: int, batch: B, problem: str) -> None:
        """Log a step whose loss or gradient was not finite with its samples; too many in a row stop the run."""
        self.log.skipped(problem, gather_object(self.stream.keys(batch)))
        if self.updates.searches_scale(problem):
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.setup.settings.max_skipped_steps:
            self.checkpoints.settle()
            first, newest = step - self.skipped_in_a_row + 1, self.checkpoints.newest
            self.log.event("failed", problem)
            self.log.close()
            raise FloatingPointError(
                f"{problem} in {self.skipped_in_a_row} steps in a row, {first} to {step} of {self.name}; "
                f"their pictures are in {self.setup.run / 'log.jsonl'}, and the last good checkpoint is "
                f"{newest or 'none yet'}. Lower the learning rate, clip, or use --precision fp32."
            )
