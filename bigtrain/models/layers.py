"""What the inner layers of any network give: unpooled maps, or one vector an image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.models.lean_timm import timm


def extractor(trunk: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A module that gives the outputs of some layers by name.

    Raises:
        ValueError: there is no such layer, with the list.
    """
    names = layers_of(trunk)
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(f"the network has no layer {unknown[0]!r}; it has {', '.join(names)}.")
    with warnings.catch_warnings(action="ignore"):  # that training would trace another graph
        return timm.models.create_feature_extractor(trunk.eval(), list(layers))


class FeatureMaps(nn.Module):
    """Unpooled maps of some layers of a CNN or ViT: for each a float (B, D, h, w), channels first.

    A ViT's prefix tokens ([CLS], registers) are left out; its patch tokens are laid on their grid.

    Args:
        layers: names as torch gives them, such as "layer2" or "blocks.11" (`layers_of` lists them).
    """

    def __init__(self, trunk: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers, self.net = tuple(layers), extractor(trunk, layers)
        self.prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0))
        self.has_channels_last = getattr(trunk, "output_fmt", None) == "NHWC"
        patch_embed: Any = getattr(trunk, "patch_embed", None)
        self.patch_size: tuple[int, int] | None = getattr(patch_embed, "patch_size", None)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        outputs = self.net(image_B3HW)
        return [self._as_map(outputs[layer], layer, image_B3HW.shape[-2:]) for layer in self.layers]

    def _as_map(self, output: Tensor, layer: str, size: torch.Size) -> Tensor:
        if output.ndim == 4:
            return output.permute(0, 3, 1, 2) if self.has_channels_last else output
        if output.ndim == 3 and self.patch_size:
            grid = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
            return output[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        raise ValueError(f"layer {layer!r} gives {tuple(output.shape)}, which is no map: take an earlier layer.")


class PooledLayer(nn.Module):
    """A layer of a trunk as one vector an image: maps are averaged over places, tokens over tokens.

    Args:
        layer: a name as torch gives it, such as "layer4" or "blocks.11" (its last output); "": the trunk's own end.
    """

    def __init__(self, trunk: nn.Module, layer: str = "") -> None:
        super().__init__()
        self.layer, self.has_channels_last = layer, getattr(trunk, "output_fmt", None) == "NHWC"
        self.net = extractor(trunk, [layer]) if layer else trunk

    def forward(self, image_B3HW: Tensor) -> Tensor:
        outputs: Tensor | Mapping[str, Tensor] = self.net(image_B3HW)
        features = outputs if isinstance(outputs, Tensor) else outputs[self.layer]
        if features.ndim == 4:
            return features.mean(dim=(1, 2) if self.has_channels_last else (2, 3))
        return features.mean(dim=1) if features.ndim == 3 else features


def layers_of(trunk: nn.Module) -> list[str]:
    """The layers that `FeatureMaps` and `PooledLayer` can take, in the order of the network."""
    with warnings.catch_warnings(action="ignore"):
        _, nodes = timm.models._features_fx.get_graph_node_names(trunk.eval())
    modules = dict(trunk.named_modules())
    names: dict[str, None] = {}
    for node in nodes[1:]:  # the first is the picture
        parts = node.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        names |= dict.fromkeys(prefix for prefix in prefixes if prefix in modules)
    return list(names)
