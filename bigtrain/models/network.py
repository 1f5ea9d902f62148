"""A network with its weights: any timm network, or torchvision's AlexNet, by name or from a file.

It knows how its input is normalised, which classes its heads tell apart, its layers and its FLOPs. A plain vit_* is a
`ViT`, whose pass is packed and masked; every other trunk is timm's or torchvision's own module.

File: one .safetensors with the keys trunk.*, heads.NAME.*, mask_token, and a header with the rest. Files of earlier
versions, whose trunk has no prefix, load as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.choices import LOCAL, Backend
from bigtrain.models.flops import counted_flops, trained_flops, vit_forward_flops
from bigtrain.models.hub import released_weights
from bigtrain.models.layers import FeatureMaps, PooledLayer
from bigtrain.models.lean_timm import timm, torchvision
from bigtrain.models.timm_names import ALEXNET, check_network_name, check_source
from bigtrain.models.vit import NO_PLAIN_VIT, Architecture, ViT, check_tag, is_plain_vit, is_vit_name
from bigtrain.models.weights import load_matching, read_file, resample_positions, save_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGREG_MEAN = AUGREG_STD = (0.5, 0.5, 0.5)
MASK_TOKEN = "mask_token"  # of a ViT that completes hidden patches


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
        """The trunk as a ViT with a packed pass.

        Raises:
            ValueError: it is another kind of network.
        """
        if not isinstance(self.trunk, ViT):
            raise ValueError(NO_PLAIN_VIT.format(self.architecture.model))
        return self.trunk

    @property
    def image_size(self) -> int | None:
        """The side of the images that a ViT was made for; None of other networks, which take any."""
        return self.vit.backbone.patch_embed.img_size[0] if isinstance(self.trunk, ViT) else None

    @property
    def backbone(self) -> nn.Module:
        """timm's or torchvision's own module: float images to the features (B, D) that a classifier would see."""
        return self.trunk.backbone if isinstance(self.trunk, ViT) else self.trunk

    @property
    def device(self) -> torch.device:
        return next(self.trunk.parameters()).device

    @property
    def described(self) -> str:
        return f"{self.architecture.model}, {self.report}"

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
        return replace(self, trunk=_packed(backbone, attention), **further)

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
        if isinstance(self.trunk, ViT) and self.trunk.mask_token_D is not None:
            about["decoder_blocks"], tensors[MASK_TOKEN] = self.trunk.decoder_blocks, self.trunk.mask_token_D
        kept = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        save_tensors(path, {key: value.detach().contiguous().cpu() for key, value in kept.items()}, about)


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) to float32: (x / 255 - mean) / std for each channel."""
    mean_311 = torch.tensor(mean, device=image.device).view(3, 1, 1)
    std_311 = torch.tensor(std, device=image.device).view(3, 1, 1)
    return (image.float() / 255 - mean_311) / std_311


def load_network(
    source: str | Path,
    architecture: Architecture | None = None,
    *,
    pretrained: bool = True,
    plain_vit: bool = False,
    drop_path: float = 0.0,
    attention: Backend = "auto",
    device: torch.device | str = "cpu",
) -> Network:
    """Load a network with its weights and the heads that its file has; frozen, in evaluation mode.

    Args:
        source: a timm name such as "vgg16.tv_in1k", "alexnet", or a local file.
        architecture: what a local file's weights belong to (files that bigtrain wrote know it), or a named network
            with other sizes.
        pretrained: False: a name's network with random weights.
        plain_vit: refuse a name of any other network, before its weights are looked for.
        attention: backend of a ViT's packed pass.

    Raises:
        ValueError: no such weights or network, or keys and shapes that do not match.
    """
    if Path(source).suffix in LOCAL:
        network = _from_file(Path(source), architecture, drop_path, attention)
    else:
        if architecture is not None and (architecture.model or source) != source:
            raise ValueError(f"--arch was given, but {source!r} already names a network: leave it out.")
        network = _from_hub(architecture or Architecture(str(source)), pretrained, plain_vit, drop_path, attention)
    return network.to(device)


def _from_file(path: Path, architecture: Architecture | None, drop_path: float, attention: Backend) -> Network:
    check_source(str(path))
    state, about, said = read_file(path)
    classes: dict[str, tuple[str, ...]] = {}
    if about:
        try:
            stored = Architecture(**about["architecture"])
            mean, std = tuple(about["mean"]), tuple(about["std"])
            classes = {name: tuple(names) for name, names in about.get("classes", {}).items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has a header that this bigtrain cannot read ({error}).") from error
        check_same(path, stored, architecture)
        architecture = stored
    elif architecture is None or not architecture.model:
        raise ValueError(
            f"{path} does not say what network it belongs to: name it, as in --arch resnet50 or --arch "
            "vit_base_patch16_224."
        )
    elif path.suffix == ".npz":
        mean, std = AUGREG_MEAN, AUGREG_STD
    else:
        mean, std = _normalisation(architecture.model)
    heads = {}
    for name, names in classes.items():
        weight = state.pop(f"heads.{name}.weight")
        heads[name] = nn.Linear(weight.shape[1], len(names))
        heads[name].load_state_dict({"weight": weight.float(), "bias": state.pop(f"heads.{name}.bias").float()})
    state = {key.removeprefix("trunk."): value for key, value in state.items()}
    backbone = build_trunk(architecture, drop_path=drop_path)
    trunk = _packed(backbone, attention, about.get("decoder_blocks", 0))
    mask_token = trunk.mask_token_D if isinstance(trunk, ViT) else None
    if mask_token is not None:
        if MASK_TOKEN not in state:
            raise ValueError(f"{path} lacks the mask token that its decoder blocks need: make it again.")
        mask_token.data = state.pop(MASK_TOKEN).float()
    report = load_matching(backbone, resample_positions(state, backbone), str(path), _classifier(architecture.model))
    return Network(trunk, architecture, mean, std, heads, classes, report + said)


def check_same(path: Path, stored: Architecture, asked: Architecture | None) -> None:
    """Refuse a file of another network than was asked for; its image size may differ."""
    for name in ("model", "patch_size", "depth"):
        value = getattr(asked, name, None)
        if value and value != getattr(stored, name):
            what = name.replace("_", " ")
            raise ValueError(
                f"{path} holds a network of {what} {getattr(stored, name)}, and {what} {value} was asked for: leave "
                "--arch out."
            )


def _from_hub(
    architecture: Architecture, pretrained: bool, plain_vit: bool, drop_path: float, attention: Backend
) -> Network:
    name, backbone = architecture.model, build_trunk(architecture, drop_path=drop_path)
    mean, std = _normalisation(name)
    trunk, report = _packed(backbone, attention), "random weights"
    if plain_vit and not isinstance(trunk, ViT):
        raise ValueError(NO_PLAIN_VIT.format(name))
    if pretrained:
        try:
            loaded = released_weights(name)
        except Exception as error:  # of many kinds
            raise ValueError(
                f"the weights of {name!r} cannot be downloaded ({type(error).__name__}): check the name and the "
                f"connection, give a local file ({', '.join(LOCAL)}) with --arch, train one with recipes/pretrain.py, "
                "or begin with random weights (--no-pretrained)."
            ) from error
        report = load_matching(backbone, resample_positions(loaded, backbone), name, _classifier(name))
    return Network(trunk, architecture, mean, std, report=report)


def _packed(backbone: Any, attention: Backend, decoder_blocks: int = 0) -> nn.Module:
    if is_plain_vit(backbone):
        return ViT(backbone, attention=attention, decoder_blocks=decoder_blocks).eval()
    return backbone


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
        return architecture.build(drop_path=drop_path, plain=False)
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


def _classifier(name: str) -> str:
    """What the last layer is called in the weights of this network."""
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return config.classifier if config and isinstance(config.classifier, str) else "classifier.6"


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
