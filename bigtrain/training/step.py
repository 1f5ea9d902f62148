"""One step of a stage: parts, each with a backward pass, then one update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from bigtrain.data.mixture import Batches
from bigtrain.data.stream import Batch
from bigtrain.runtime import zero

if TYPE_CHECKING:
    from bigtrain.training.stage import Stage

B = TypeVar("B", Batch, Batches)
PROBLEM = "problem"  # the name of a number that is no figure of the log


class Step(Generic[B]):
    """One step of a stage: parts, each with a backward pass, then one update. Any other order is an error."""

    def __init__(self, stage: Stage[B], batch: B) -> None:
        self.stage: Stage[B] = stage
        self.batch: B = batch
        self.figures: dict[str, Tensor | float] | None = None  # After the update.
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

    def update(self, **figures: Tensor | float) -> None:
        """Change the weights, unless loss or gradient are not finite: then the step is skipped.

        Args:
            figures: of this step for the log, beside loss and norm of the gradient.
        """
        self._check(self._is_last_part and not self._parts_open, "step.update() comes after all parts")
        self._check(self.figures is None, "step.update() was called twice")
        self.stage.setup.heartbeat.mark(f"computed the gradient of step {self.stage.step + 1}")
        own, problem = self.stage.updates.take()
        on_gpu = isinstance(problem, Tensor) and problem.device.type == "cuda"  # else nothing is waited for
        self.stage.taken = problem == 0 if on_gpu else not int(problem)
        self.figures = {**own, **figures, PROBLEM: problem}
        if self.stage.average is not None:
            self.stage.follow(self.stage.average, self.stage.trained, self.stage.ema)

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            raise RuntimeError(f"stage {self.stage.name!r}, step {self.stage.step + 1}: {what}.")
