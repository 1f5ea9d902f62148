"""One update: backward, clip, step; a loss or gradient that is not finite on any rank skips it on all."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bigtrain.runtime import zero

NO_LOSS = "the loss is not finite"
NO_GRADIENT = "the gradient is not finite"
PROBLEMS = ("", NO_LOSS, NO_GRADIENT)


class Taken(NamedTuple):
    """What came of an update: figures of the step, and which of PROBLEMS kept it from changing the weights."""

    figures: dict[str, Tensor | float]
    problem: Tensor | int


class Update:
    """Updates of one prepared module: `backward` for each part of a step, then `take`.

    With a fused optimizer nothing waits for the device: its kernel looks at a flag there, and leaves weights, moments
    and step count as they are where loss or gradient are not finite. Elsewhere this process looks, before the weights
    change. All ranks see the same losses, and gradients that were averaged over the ranks, so all skip alike.
    DeepSpeed couples norm and update in its own step, which looks at the norm and skips on all ranks.

    Args:
        module, optimizer: as prepared; under DeepSpeed the engine and its optimizer.
        clip: largest norm of the gradient; 0: not clipped. Under DeepSpeed its own settings hold it.
        precision: fp16 scales the loss; a step that overflows while the scale is still above 1 is part of its search.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float = 0.0,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        self.accelerator, self.module, self.optimizer, self.clip = accelerator, module, optimizer, clip
        self.engine: Any = module if zero.is_used(accelerator) else None
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if precision == "fp16" else None
        by_hand = self.engine or self.scaler
        self.skips_on_device = not by_hand and all(group.get("fused") for group in optimizer.param_groups)
        if self.skips_on_device and isinstance(optimizer, torch.optim.SGD):
            begin_momentum(optimizer)
        self.loss: Tensor | float = 0.0
        self.gradient_norm: Tensor | float = 0.0
        self._problem, self._begun = 0, False

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add one part's gradient. `loss` is this rank's; `last`: no further part follows in this step."""
        loss_of_rank = self.accelerator.gather(loss.detach()[None])
        self.loss = self.loss + loss_of_rank.mean()
        if not self.skips_on_device and not self._problem and not bool(loss_of_rank.isfinite().all()):
            self._problem = PROBLEMS.index(NO_LOSS)
        if self.engine:
            if self._problem and self._begun and last:
                loss = loss * torch.nan  # its own step then throws away what was gathered so far
            elif self._problem:
                return
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss)
        elif not self._problem:
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        self._begun = True

    def take(self) -> Taken:
        """Change the weights, unless something is not finite; the figures are the mean loss over ranks and the norm of
        the gradient."""
        problem: Tensor | int = self._problem
        if self.engine:
            if self._begun:
                self.engine.step()
                self.gradient_norm = self.engine.get_global_grad_norm() or 0.0
                if self.engine.optimizer.overflow:
                    problem = problem or PROBLEMS.index(NO_GRADIENT)
        elif not problem:
            problem = self._take_on_device() if self.skips_on_device else self._take()
        if not self.engine:
            self.optimizer.zero_grad()
        taken = Taken({"loss": self.loss, "gradient_norm": self.gradient_norm}, problem)
        self.loss, self.gradient_norm, self._problem, self._begun = 0.0, 0.0, 0, False
        return taken

    def _norm(self) -> list[Tensor]:
        """Measure the gradient; what it was measured of."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([p.grad for p in trained])
        return trained

    def _take_on_device(self) -> Tensor:
        """The problem, of which this process knows nothing yet."""
        trained = self._norm()
        assert isinstance(self.loss, Tensor) and isinstance(self.gradient_norm, Tensor)
        if self.clip:
            nn.utils.clip_grads_with_norm_(trained, self.clip, self.gradient_norm)
        problem = torch.where(
            self.loss.isfinite(),
            (~self.gradient_norm.isfinite()) * PROBLEMS.index(NO_GRADIENT),
            PROBLEMS.index(NO_LOSS),
        )
        optimizer: Any = self.optimizer
        optimizer.found_inf = (problem > 0).float()  # as torch.amp.GradScaler tells a fused optimizer
        optimizer.step()
        return problem

    def _take(self) -> int:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        trained, problem = self._norm(), 0
        assert isinstance(self.gradient_norm, Tensor)
        if not bool(self.gradient_norm.isfinite()):
            problem = PROBLEMS.index(NO_GRADIENT)
        else:
            if self.clip:
                nn.utils.clip_grads_with_norm_(trained, self.clip, self.gradient_norm)
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        return problem

    def searches_scale(self, problem: str) -> bool:
        """Whether a step was skipped in fp16's search for a scale, which is no sign of trouble."""
        return problem == NO_GRADIENT and self.scaler is not None and self.scaler.get_scale() > 1


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Let momentum begin as zeros: fused kernels would leave it unset where they skip the very first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
