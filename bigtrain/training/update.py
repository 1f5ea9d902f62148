"""One update: backward, clip, step; a loss or gradient that is not finite on any rank skips it on all."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bigtrain.runtime import zero

NO_LOSS = "the loss is not finite"
NO_GRADIENT = "the gradient is not finite"


class Update:
    """Updates of one prepared module: `backward` for each part of a step, then `take`.

    The ranks agree that the loss is finite before each backward pass, and that the gradient's norm is after the last,
    before the weights change. DeepSpeed couples norm and update in its own step, which looks at the norm before it
    touches the weights, and skips on all ranks.

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
        self.loss: Tensor | float = 0.0
        self.gradient_norm: Tensor | float = 0.0
        self._problem, self._begun = "", False

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add one part's gradient. `loss` is this rank's; `last`: no further part follows in this step."""
        loss_of_rank = self.accelerator.gather(loss.detach()[None])
        self.loss = self.loss + loss_of_rank.mean()
        if not self._problem and not bool(loss_of_rank.isfinite().all()):
            self._problem = NO_LOSS
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

    def take(self) -> tuple[dict[str, Tensor | float], str]:
        """Change the weights, unless something is not finite.

        Returns:
            The step's figures (the mean loss over ranks, the norm of the gradient), and why it was skipped, if it was.
        """
        if self.engine:
            if self._begun:
                self.engine.step()
                self.gradient_norm = self.engine.get_global_grad_norm() or 0.0
                if self.engine.optimizer.overflow:
                    self._problem = self._problem or NO_GRADIENT
        elif not self._problem:
            self._take()
        if not self.engine:
            self.optimizer.zero_grad()
        figures, problem = {"loss": self.loss, "gradient_norm": self.gradient_norm}, self._problem
        self.loss, self.gradient_norm, self._problem, self._begun = 0.0, 0.0, "", False
        return figures, problem

    def _take(self) -> None:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = nn.utils.get_total_norm([p.grad for p in trained])
        if not bool(self.gradient_norm.isfinite()):
            self._problem = NO_GRADIENT
        else:
            if self.clip:
                nn.utils.clip_grads_with_norm_(trained, self.clip, self.gradient_norm)
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
        if self.scaler:
            self.scaler.update()

    def searches_scale(self, problem: str) -> bool:
        """Whether a step was skipped in fp16's search for a scale, which is no sign of trouble."""
        return problem == NO_GRADIENT and self.scaler is not None and self.scaler.get_scale() > 1
