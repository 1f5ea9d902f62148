"""Optimiser, schedules as functions of the step, and one update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], **options: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices, which decay, and vectors (biases, norms, tokens), which do not."""
    trained = [p for _, p in named_parameters if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim > 1]
    vectors = [p for p in trained if p.squeeze().ndim <= 1]
    return [{"params": matrices, "decays": True, **options}, {"params": vectors, "decays": False, **options}]


def warmup_cosine(step: int, *, total: int, warmup: int = 0, end: float = 0.0) -> float:
    """A factor for the learning rate: linear from 0 over `warmup` steps, then half a cosine from 1 to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    return cosine(step - warmup, total=total - warmup, start=1.0, end=end)


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def set_schedule(optimizer: torch.optim.Optimizer, *, lr_factor: float, weight_decay: float) -> None:
    """Set each group's learning rate to `base_lr` times a factor, and its weight decay where it decays."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def update(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, clip: float = 0.0
) -> Tensor:
    """Backward, clip, step. A loss that is not finite on any rank stops the run on all, before it reaches the weights.

    Returns:
        The loss, mean over the ranks.
    """
    loss_of_rank = accelerator.gather(loss.detach()[None])
    if not bool(loss_of_rank.isfinite().all()):
        raise FloatingPointError("the loss is not finite: lower the learning rate, or train with --precision fp32.")
    optimizer.zero_grad()
    accelerator.backward(loss)
    if clip:
        accelerator.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return loss_of_rank.mean()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Move an exponential moving average of a network's weights one step: m a + (1 - m) w."""
    for a, w in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(w, 1 - momentum)
