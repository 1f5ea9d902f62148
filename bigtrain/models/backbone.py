"""Any timm network, or torchvision's AlexNet, as a trunk: pictures to one feature vector each, of any layer.

A trunk's file is .safetensors and knows its architecture, how pictures are normalised, and the classes of its heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.models.hub import released_weights
from bigtrain.models.lean_timm import timm, torchvision
from bigtrain.models.timm_names import ALEXNET, LOCAL, check_network_name, check_source
from bigtrain.models.vit import Architecture
from bigtrain.models.weights import load_matching, read_tensors, read_weights, resample_positions, save_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """A trunk, its heads (name -> linear classifier), and what they belong to."""

    trunk: nn.Module
    architecture: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: Mapping[str, nn.Linear] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    report: str = ""

    def to(self, device: torch.device) -> Network:
        for part in (self.trunk, *self.heads.values()):
            part.to(device).requires_grad_(False).eval()
        return self


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
    if name.startswith(("vit_", "deit")):
        return architecture.build(drop_path=drop_path)
    if architecture.patch_size or architecture.depth:
        raise ValueError(f"{name} has no --patch-size or --depth to change: they are settings of a vit_*.")
    further: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if _has_fixed_size(name) and architecture.image_size:
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


def _has_fixed_size(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)


def trunk_width(trunk: nn.Module) -> int:
    """D, how many features a picture has at the end of a trunk."""
    return int(getattr(trunk, "head_hidden_size", 0) or getattr(trunk, "num_features", 0) or 4096)


def load_network(
    source: str, architecture: Architecture | None = None, *, pretrained: bool = True, drop_path: float = 0.0
) -> Network:
    """Load a trunk with its weights, and the heads that its file has; in evaluation mode.

    Args:
        source: a timm name such as "vgg16.tv_in1k", "alexnet", or a local file.
        architecture: what a local file's weights belong to; files that bigtrain wrote know it.
        pretrained: False: a name's network with random weights.

    Raises:
        ValueError: no such weights or network, or keys and shapes that do not match.
    """
    if Path(source).suffix in LOCAL:
        network = _from_file(Path(source), architecture, drop_path)
    else:
        if architecture is not None and (architecture.model or source) != source:
            raise ValueError(f"--arch was given beside the network's name {source!r}, which is its own: leave it out.")
        network = _from_hub(architecture or Architecture(source), pretrained, drop_path)
    return network.to(torch.device("cpu"))


def save_network(path: Path, network: Network, dtype: torch.dtype = torch.float32) -> None:
    """Write trunk and heads as one .safetensors; atomically."""
    tensors = {f"trunk.{key}": value for key, value in network.trunk.state_dict().items()}
    for name, head in network.heads.items():
        tensors |= {f"heads.{name}.{key}": value for key, value in head.state_dict().items()}
    about = {
        "architecture": asdict(network.architecture),
        "mean": list(network.mean),
        "std": list(network.std),
        "classes": {name: list(names) for name, names in network.classes.items()},
    }
    kept = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    save_tensors(path, {key: value.detach().contiguous().cpu() for key, value in kept.items()}, about)


def _from_file(path: Path, architecture: Architecture | None, drop_path: float) -> Network:
    check_source(str(path))
    state, about = read_tensors(path) if path.suffix == ".safetensors" else (read_weights(path), {})
    if about:
        try:
            stored = Architecture(**about["architecture"])
            mean, std = tuple(about["mean"]), tuple(about["std"])
            classes = {name: tuple(names) for name, names in about.get("classes", {}).items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has a header that this bigtrain cannot read ({error}).") from error
        if architecture is not None and architecture.model and architecture.model != stored.model:
            raise ValueError(
                f"{path} holds a {stored.model}, and {architecture.model} was asked for: leave --arch out."
            )
        architecture = stored
    elif architecture is None or not architecture.model:
        raise ValueError(f"{path} does not say what network it belongs to: name it, as in --arch resnet50.")
    else:
        (mean, std), classes = _normalisation(architecture.model), {}
    heads = {}
    for name, names in classes.items():
        weight = state.pop(f"heads.{name}.weight")
        heads[name] = nn.Linear(weight.shape[1], len(names))
        heads[name].load_state_dict({"weight": weight.float(), "bias": state.pop(f"heads.{name}.bias").float()})
    state = {key.removeprefix("trunk."): value for key, value in state.items()}
    trunk = build_trunk(architecture, drop_path=drop_path)
    report = load_matching(trunk, resample_positions(state, trunk), str(path), _classifier(architecture.model))
    return Network(trunk, architecture, mean, std, heads, classes, report)


def _from_hub(architecture: Architecture, pretrained: bool, drop_path: float) -> Network:
    name, trunk = architecture.model, build_trunk(architecture, drop_path=drop_path)
    mean, std = _normalisation(name)
    if not pretrained:
        return Network(trunk, architecture, mean, std, report="random weights")
    try:
        loaded = released_weights(name)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"the weights of {name!r} cannot be had ({type(error).__name__}): check the name and the network, give a "
            f"local file ({', '.join(LOCAL)}) with --arch, or begin with random weights (--no-pretrained)."
        ) from error
    report = load_matching(trunk, resample_positions(loaded, trunk), name, _classifier(name))
    return Network(trunk, architecture, mean, std, report=report)


def _classifier(name: str) -> str:
    """What the last layer is called in the weights of this network."""
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return config.classifier if config and isinstance(config.classifier, str) else "classifier.6"


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)


class Layer(nn.Module):
    """A layer of a trunk as one vector a picture: maps are averaged over places, tokens over tokens.

    Args:
        layer: a name as torch gives it, such as "layer4" or "blocks.11" (its last output); "": the trunk's own end.

    Raises:
        ValueError: there is no such layer, with the list.
    """

    def __init__(self, trunk: nn.Module, layer: str = "") -> None:
        super().__init__()
        self.has_channels_last = getattr(trunk, "output_fmt", None) == "NHWC"
        if not layer:
            self.net = trunk
            return
        if layer not in (names := layers_of(trunk)):
            raise ValueError(f"the network has no layer {layer!r}; it has {', '.join(names)}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that training would trace another graph
            extractor = timm.models.create_feature_extractor(trunk.eval(), {layer: "features"})
        self.net = nn.Sequential(extractor, _Only("features"))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        features = self.net(image_B3HW)
        if features.ndim == 4:
            return features.mean(dim=(1, 2) if self.has_channels_last else (2, 3))
        return features.mean(dim=1) if features.ndim == 3 else features


class _Only(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs[self.name]


def layers_of(trunk: nn.Module) -> list[str]:
    """The layers that `Layer` can take, in the order of the network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, nodes = timm.models._features_fx.get_graph_node_names(trunk.eval())
    modules = dict(trunk.named_modules())
    names: dict[str, None] = {}
    for node in nodes[1:]:  # the first is the picture
        parts = node.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        names |= dict.fromkeys(prefix for prefix in prefixes if prefix in modules)
    return list(names)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def network_flops(module: nn.Module, image_size: int) -> int:
    """FLOPs of one picture's forward pass, 2 for a multiply-add, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    parameter = next(module.parameters())
    was_training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, image_size, image_size, device=parameter.device))
    module.train(was_training)
    return counter.get_total_flops()


class Branches(nn.Module):
    """One trunk and a linear head for each data set (Perera & Patel 4.4, fig. 4): two branches with the same weights.

    Args:
        classes: name of a branch -> how many classes its head has. New heads begin at N(0, .01) with bias 0.
        joint: all heads answer for each image, side by side, as one of all classes.
    """

    def __init__(self, trunk: nn.Module, classes: Mapping[str, int], *, joint: bool = False) -> None:
        super().__init__()
        self.trunk, self.joint = trunk, joint
        self.heads = nn.ModuleDict({name: nn.Linear(trunk_width(trunk), count) for name, count in classes.items()})
        for head in self.linear_heads().values():
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits for each branch's own images, which go through the trunk as one batch."""
        sizes = [len(image_B3HW) for image_B3HW in images.values()]
        features = self.trunk(torch.cat(list(images.values()))).split(sizes)
        of_branch = dict(zip(images, features, strict=True))
        if self.joint:
            return {n: torch.cat([h(part_BD) for h in self.heads.values()], dim=1) for n, part_BD in of_branch.items()}
        return {name: self.heads[name](part_BD) for name, part_BD in of_branch.items()}

    def linear_heads(self) -> dict[str, nn.Linear]:
        return {name: head for name, head in self.heads.items() if isinstance(head, nn.Linear)}
