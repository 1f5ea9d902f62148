"""Visible patches by their numbers: shapes that are known beforehand, so that no device has to be asked for them.

Both directions are gathers, forwards and backwards, which add up in a fixed order on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """Which n of N patches are seen, equally many in each image."""

    visible_BN: Tensor  # bool
    kept_Bn: Tensor  # their numbers, ascending
    rank_BN: Tensor  # the place of each among these; of a hidden patch, any

    def of_images(self, images: int) -> Visible:
        """The same patches in each of so many images: (K, N) to (K B, N), the images of one mask together."""
        return Visible(*(each[:, None].expand(-1, images, -1).flatten(0, 1) for each in self))


def visible_numbers(visible_BN: Tensor, count: int | None = None) -> Visible:
    """The numbers of the visible patches.

    Args:
        visible_BN: bool.
        count: n; None: it is looked up, for which the device is waited for.
    """
    if count is None:
        count = int(visible_BN[:1].sum())
    kept_Bn = (~visible_BN).byte().argsort(dim=1, stable=True)[:, :count]
    return Visible(visible_BN, kept_Bn, (visible_BN.cumsum(dim=1) - 1).clamp(min=0, max=max(count - 1, 0)))


def take(tokens_BND: Tensor, where: Visible) -> Tensor:
    """The tokens of the visible patches: (B, n, D)."""
    return _Take.apply(tokens_BND, *where)


def put(tokens_BnD: Tensor, others_BND: Tensor, where: Visible) -> Tensor:
    """The tokens of visible patches at their places, and `others` at the hidden ones: (B, N, D)."""
    return _Put.apply(tokens_BnD, others_BND, *where)


def _at(tokens_BND: Tensor, number_Bn: Tensor) -> Tensor:
    return tokens_BND.gather(1, number_Bn[:, :, None].expand(-1, -1, tokens_BND.shape[-1]))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_BND: Tensor, visible_BN: Tensor, kept_Bn: Tensor, rank_BN: Tensor) -> Tensor:
        ctx.save_for_backward(visible_BN, rank_BN)
        return _at(tokens_BND, kept_Bn)

    @staticmethod
    def backward(ctx: Any, gradient_BnD: Tensor) -> tuple[Tensor | None, ...]:
        """(B, n, D) to (B, N, D): nothing reaches the hidden ones."""
        visible_BN, rank_BN = ctx.saved_tensors
        return torch.where(visible_BN[:, :, None], _at(gradient_BnD, rank_BN), 0), None, None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_BnD: Tensor, others_BND: Tensor, visible_BN: Tensor, kept_Bn: Tensor, rank_BN: Tensor
    ) -> Tensor:
        ctx.save_for_backward(visible_BN, kept_Bn)
        return torch.where(visible_BN[:, :, None], _at(tokens_BnD, rank_BN), others_BND)

    @staticmethod
    def backward(ctx: Any, gradient_BND: Tensor) -> tuple[Tensor | None, ...]:
        """(B, N, D) to (B, n, D) of the visible ones and (B, N, D) of the others."""
        visible_BN, kept_Bn = ctx.saved_tensors
        return _at(gradient_BND, kept_Bn), gradient_BND.masked_fill(visible_BN[:, :, None], 0), None, None, None
