"""A network with its weights: any timm network, or torchvision's AlexNet, by name or from a file.

It knows how its input is normalised, which classes its heads tell apart, its layers and its FLOPs. A ViT of timm whose
blocks map tokens to tokens is a `ViT`, whose pass takes masks; every other trunk is timm's or torchvision's own module.

File: one .safetensors with the keys trunk.*, heads.NAME.*, mask_token, and a header with the rest. Files of earlier
versions, whose trunk has no prefix, load as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.choices import Backend
from bigtrain.models.architecture import Architecture, check_tag, is_vit_name, refusal
from bigtrain.models.families import family_of
from bigtrain.models.flops import counted_flops, trained_flops, vit_forward_flops
from bigtrain.models.layers import FeatureMaps, PooledLayer
from bigtrain.models.lean_timm import timm, torchvision
from bigtrain.models.timm_names import ALEXNET, check_network_name
from bigtrain.models.vit import ViT
from bigtrain.models.weights import save_tensors

ADDED = {"mask_token_D": "mask_token"}  # what a `ViT` adds to timm's network, and its name in a file where it differs


@dataclass(frozen=True)
class Network:
    """A trunk, its heads (name -> linear classifier), and what belongs to them."""

    trunk: nn.Module
    architecture: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: Mapping[str, nn.Linear] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    report: str = ""  # A line on what was loaded.

    @property
    def vit(self) -> ViT:
        """The trunk as a ViT, whose pass takes masks.

        Raises:
            ValueError: it is another kind of network.
        """
        if not isinstance(self.trunk, ViT):
            raise ValueError(refusal(self.architecture.model))
        return self.trunk

    @property
    def image_size(self) -> int | None:
        """The side of the images that a ViT was made for; None of other networks, which take any."""
        return self.trunk.grid_size[0] * self.trunk.patch_size if isinstance(self.trunk, ViT) else None

    @property
    def backbone(self) -> nn.Module:
        """timm's or torchvision's own module: float images to the features (B, D) that a classifier would see."""
        return self.trunk.backbone if isinstance(self.trunk, ViT) else self.trunk

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    @property
    def described(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"{self.architecture.model}, {self.report}; pixels normalised by mean {mean}, std {std}"

    def head_of(self, classes: Sequence[str]) -> str:
        """The head that tells exactly these classes apart; "" where there is none."""
        return next((name for name, names in self.classes.items() if set(names) == set(classes)), "")

    def to(self, device: torch.device | str) -> Network:
        """Frozen, in evaluation mode, on a device."""
        for module in (self.trunk, *self.heads.values()):
            module.to(device).requires_grad_(False).eval()
        return self

    def with_backbone(self, backbone: nn.Module, **further: Any) -> Network:
        """The same network with another backbone of its kind, such as one that was trained on."""
        attention: Backend = self.trunk.attention_backend if isinstance(self.trunk, ViT) else "auto"
        return replace(self, trunk=as_vit(backbone, attention), **further)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 images (..., 3, H, W) as the trunk takes them, float32."""
        return normalised(image, self.mean, self.std)

    def pooled(self, layer: str = "") -> PooledLayer:
        """One vector for each normalised image, from any layer; "": the trunk's end."""
        return PooledLayer(self.backbone, layer)

    def maps(self, layers: Sequence[str]) -> FeatureMaps:
        """Unpooled maps (B, D, h, w) of normalised images, one for each layer."""
        return FeatureMaps(self.backbone, layers)

    def flops(self, image_size: int) -> int:
        """FLOPs of one image's forward pass, 2 for a multiply-add."""
        if isinstance(self.trunk, ViT):
            return vit_forward_flops(self.trunk, image_size)
        return counted_flops(self.trunk, image_size)

    def training_flops(self, image_size: int) -> int:
        """FLOPs of one image's forward and backward pass: of a ViT by what of it learns, else three forward passes."""
        return trained_flops(self.trunk, image_size) if isinstance(self.trunk, ViT) else 3 * self.flops(image_size)

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write everything as one .safetensors file, atomically."""
        tensors = {f"trunk.{key}": value for key, value in self.backbone.state_dict().items()}
        for name, head in self.heads.items():
            tensors |= {f"heads.{name}.{key}": value for key, value in head.state_dict().items()}
        about: dict[str, Any] = {
            "architecture": asdict(self.architecture),
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": {name: list(names) for name, names in self.classes.items()},
        }
        if isinstance(self.trunk, ViT):
            added = {key: value for key, value in self.trunk.state_dict().items() if not key.startswith("backbone.")}
            tensors |= {ADDED.get(key, key): value for key, value in added.items()}
            about["decoder_blocks"] = self.trunk.decoder_blocks
        kept = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        save_tensors(path, {key: value.detach().contiguous().cpu() for key, value in kept.items()}, about)


def as_vit(backbone: Any, attention: Backend, decoder_blocks: int = 0, projections: Sequence[Tensor] = ()) -> nn.Module:
    """A ViT with what its file adds; any other network as it is."""
    if family_of(backbone) is None:
        return backbone
    width = len(projections[0]) if projections else 0
    return ViT(
        backbone, attention=attention, decoder_blocks=decoder_blocks, projected_blocks=len(projections),
        projected_width=width,
    ).eval()  # fmt: skip


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) to float32: (x / 255 - mean) / std for each channel."""
    mean_311, std_311 = (of_channels(tuple(values), image.device) for values in (mean, std))
    return image.to(torch.float32, copy=True).div_(255).sub_(mean_311).div_(std_311)  # in place: half of the time


@lru_cache(maxsize=32)  # a copy to the device that would be waited for in each step
def of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number a channel, (3, 1, 1)."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def build_trunk(architecture: Architecture, *, drop_path: float = 0.0) -> nn.Module:
    """The network without its classifier, with random weights: (B, 3, H, W) to (B, D), what its classifier would see.

    Raises:
        ValueError: timm has no such network, or it does not take these settings.
    """
    name = architecture.model
    if name == ALEXNET:
        net = torchvision.models.alexnet()
        net.classifier[-1] = nn.Identity()
        return net
    check_network_name(name)
    check_tag(name)
    if is_vit_name(name):
        return architecture.build(drop_path=drop_path)
    if architecture.patch_size or architecture.depth:
        raise ValueError(f"{name} has no --patch-size or --depth to change: they are settings of a vit_*.")
    further: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) and architecture.image_size:
        further["img_size"] = architecture.image_size
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **further)
    except TypeError as error:
        raise ValueError(f"{name} does not take what was asked of it ({error}): leave --drop-path at 0.") from error


def dropouts_of_fc(trunk: nn.Module) -> list[nn.Dropout]:
    """The dropouts at fc6 and fc7 of VGG and AlexNet; none in other networks. timm builds VGG with a rate of 0, where
    its authors trained with .5 (Simonyan & Zisserman 2015, 3.1)."""
    if isinstance(trunk, timm.models.VGG):
        return [trunk.pre_logits.drop, trunk.head.drop]
    if isinstance(trunk, torchvision.models.AlexNet):
        return [module for module in trunk.classifier if isinstance(module, nn.Dropout)]
    return []


def trunk_width(trunk: nn.Module) -> int:
    """D, how many features a picture has at the end of a trunk."""
    return int(getattr(trunk, "head_hidden_size", 0) or getattr(trunk, "num_features", 0) or 4096)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
