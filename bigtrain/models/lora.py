"""Low-rank adaptation (Hu et al. 2022): a frozen W and a small update beside it, merged into W at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W + (alpha / r) B A, eq. 3 of Hu et al. 2022; B begins at 0, so that the network begins as it was given.

    Args:
        out, width: of W, (out, width).
        rank: r.
        alpha: scale of the update; with alpha = 2 r, as is usual, the factor is 2.
    """

    def __init__(self, out: int, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down_RD = nn.Parameter(torch.empty(rank, width))
        self.up_OR = nn.Parameter(torch.zeros(out, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down_RD, a=math.sqrt(5))

    def forward(self, weight_OD: Tensor) -> Tensor:
        return weight_OD + self.scale * (self.up_OR @ self.down_RD).to(weight_OD.dtype)


def check_rank(blocks: nn.Module, rank: int) -> None:
    """Refuse a rank that is not below the smallest side of a layer."""
    layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    smallest = min(min(layer.weight.shape) for layer in layers)
    if rank >= smallest:
        raise ValueError(
            f"--lora-rank is {rank}, and the tuned layers are {smallest} wide: use 1 to {smallest - 1}, such as 16, or "
            "0 to tune them whole."
        )


def add_low_rank(blocks: nn.Module, rank: int) -> None:
    """Freeze some blocks but for a low-rank update of each of their linear layers."""
    check_rank(blocks, rank)
    blocks.requires_grad_(False)
    for layer in [module for module in blocks.modules() if isinstance(module, nn.Linear)]:
        out, width = layer.weight.shape
        update = LowRank(out, width, rank, 2 * rank).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", update)


def merge_low_rank(module: nn.Module) -> None:
    """Add the updates to the weights, so that the network is an ordinary one again."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
