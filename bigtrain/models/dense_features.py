"""A map of features and one vector a picture, of any network: what distillation compares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.vit import ViT


class DenseFeatures(NamedTuple):
    map_BDhw: Tensor
    pooled_BD: Tensor  # of a CNN as wide as its classifier's input, which may not be the map's width


def dense_features(trunk: nn.Module, image_B3HW: Tensor) -> DenseFeatures:
    """Of a ViT its patch tokens on their grid, and [CLS] or else their mean; of other networks the last map, and what
    their classifier would see.

    Args:
        image_B3HW: normalised.

    Raises:
        ValueError: the network has no map of features, such as VGG behind its last convolution.
    """
    if isinstance(trunk, ViT):
        (encoded,) = trunk(image_B3HW)
        height, width = (side // trunk.patch_size for side in image_B3HW.shape[-2:])
        map_BDhw = encoded.tokens_BND.transpose(1, 2).unflatten(2, (height, width))
        pooled_BD = encoded.tokens_BND.mean(dim=1) if encoded.class_BD is None else encoded.class_BD
        return DenseFeatures(map_BDhw, pooled_BD)
    net: Any = trunk
    if not hasattr(net, "forward_features"):
        raise ValueError(f"{type(net).__name__} is no network of timm: take another.")
    map_BDhw = net.forward_features(image_B3HW)
    if map_BDhw.ndim != 4:
        raise ValueError(f"{type(net).__name__} gives no map of features: take a CNN, or a ViT of timm.")
    pooled_BD = net.forward_head(map_BDhw, pre_logits=True)
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        map_BDhw = map_BDhw.permute(0, 3, 1, 2)
    return DenseFeatures(map_BDhw, pooled_BD)


@torch.no_grad()
def dense_grid(trunk: nn.Module, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a network's map for images of some size; the widths of its map and its pooled features."""
    map_BDhw, pooled_BD = dense_features(trunk.eval(), torch.zeros(1, 3, image_size, image_size))
    return (map_BDhw.shape[-2], map_BDhw.shape[-1]), (map_BDhw.shape[1], pooled_BD.shape[1])


def freeze_unused(trunk: nn.Module, image_size: int) -> list[str]:
    """Freeze what no dense feature depends on, such as a pooling layer of a ViT; its names.

    DDP wants a gradient for every weight that learns.
    """
    trunk.eval().requires_grad_(True)
    features = dense_features(trunk, torch.rand(1, 3, image_size, image_size))
    (features.map_BDhw.float().square().sum() + features.pooled_BD.float().square().sum()).backward()
    unused = [name for name, parameter in trunk.named_parameters() if parameter.grad is None]
    for name, parameter in trunk.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in unused)
    return unused


def on_grid(map_BDhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map resampled to another grid, bilinearly: (B, D, h', w')."""
    if tuple(map_BDhw.shape[-2:]) == grid:
        return map_BDhw
    return F.interpolate(map_BDhw, grid, mode="bilinear", antialias=True)
