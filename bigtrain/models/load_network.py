"""A network with its weights, by name or from a file or folder of any owner.

Every key of a file is accounted for: what is left out or taken for another is said in the network's report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtrain.choices import LOCAL, Backend, is_hub, is_local
from bigtrain.models.architecture import FIXED_SIZE, Architecture, refusal, timm_module
from bigtrain.models.fitting import fitted
from bigtrain.models.hub import downloaded, released_weights
from bigtrain.models.lean_timm import timm
from bigtrain.models.network import ADDED, Network, as_vit, build_trunk
from bigtrain.models.read_weights import read_file
from bigtrain.models.timm_names import ALEXNET, check_source
from bigtrain.models.transformers_names import architecture_of
from bigtrain.models.vit import ViT
from bigtrain.models.weights import load_matching

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGREG_MEAN = AUGREG_STD = (0.5, 0.5, 0.5)

MODEL_ARGS = {"image_size": "img_size", "patch_size": "patch_size", "depth": "depth"}  # ours: timm's
NO_DIFFERENCE = {"num_classes", "dynamic_img_size", "global_pool", "drop_rate", "drop_path_rate"}  # in model_args


class Known(NamedTuple):
    """What a file or folder says of its weights."""

    architecture: Architecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: int = 0  # of attention, where a config says so: no shape would tell


def load_network(
    source: str | Path,
    architecture: Architecture | None = None,
    *,
    pretrained: bool = True,
    needs_vit: bool = False,
    weights_key: str = "",
    image_size: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    drop_path: float = 0.0,
    attention: Backend = "auto",
    device: torch.device | str = "cpu",
) -> Network:
    """Load a network with its weights and the heads that its file has; frozen, in evaluation mode.

    Args:
        source: a timm name such as "vgg16.tv_in1k", "alexnet", a local file, a folder in Hugging Face's form, or a
            model of the hub, "hf-hub:org/name" or "org/name".
        architecture: what a local file's weights belong to (files that bigtrain wrote know it), or a named network
            with other sizes.
        pretrained: False: a name's network with random weights.
        needs_vit: refuse a name of any other network, before its weights are looked for.
        weights_key: which weights of a file that holds several.
        image_size: of the pictures to come, which a network with relative positions is built for.
        mean, std: of the three channels, where they are not those of the architecture or the file.
        attention: backend of a ViT's packed pass.

    Raises:
        ValueError: no such weights or network, or keys and shapes that do not match.
    """
    asked = architecture or Architecture("")
    if is_local(source) or is_hub(source):
        path = Path(source).expanduser() if is_local(source) else downloaded(str(source))
        if asked.model and not asked.image_size:
            asked = replace(asked, image_size=_fixed(asked.model, image_size))
        network = _from_file(path, asked, weights_key, drop_path, attention)
    else:
        if asked.model not in ("", source):
            raise ValueError(f"--arch was given, but {source!r} already names a network: leave it out.")
        if weights_key:
            raise ValueError(f"--weights-key was given, but {source!r} is no file: leave it out.")
        asked = replace(asked, model=str(source), image_size=asked.image_size or _fixed(str(source), image_size))
        network = _from_hub(asked, pretrained, needs_vit, drop_path, attention)
    if needs_vit and not isinstance(network.trunk, ViT):
        raise ValueError(refusal(network.architecture.model))
    network = replace(network, mean=tuple(mean) or network.mean, std=tuple(std) or network.std)
    return network.to(device)


def _fixed(name: str, image_size: int) -> int:
    """The size that a network with relative positions is built for; 0 of others, which take any."""
    is_fixed = timm.is_model(name) and timm_module(name) in FIXED_SIZE
    return image_size if is_fixed else 0


def _from_file(path: Path, asked: Architecture, weights_key: str, drop_path: float, attention: Backend) -> Network:
    check_source(str(path))
    state, about, said = read_file(path, weights_key)
    classes: dict[str, tuple[str, ...]] = {}
    if about:
        try:
            stored = Architecture(**about["architecture"])
            known = Known(stored, tuple(about["mean"]), tuple(about["std"]))
            classes = {name: tuple(names) for name, names in about.get("classes", {}).items()}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has a header that this bigtrain cannot read ({error}).") from error
        check_same(path, stored, asked)
    else:
        known = _known(path, asked)
    architecture = known.architecture
    heads = {}
    for name, names in classes.items():
        weight = state.pop(f"heads.{name}.weight")
        heads[name] = nn.Linear(weight.shape[1], len(names))
        heads[name].load_state_dict({"weight": weight.float(), "bias": state.pop(f"heads.{name}.bias").float()})
    backbone = build_trunk(architecture, drop_path=drop_path)
    if about:
        state = {key.removeprefix("trunk."): value for key, value in state.items()}
        if not any(key.startswith("attn_pool.") for key in state) and getattr(backbone, "attn_pool", None) is not None:
            backbone.attn_pool = None  # type: ignore[assignment]  # files of earlier versions lack it
    else:
        own_heads = getattr(getattr(getattr(backbone, "blocks", [None])[0], "attn", None), "num_heads", known.heads)
        if known.heads and own_heads != known.heads:
            raise ValueError(
                f"{path} has {known.heads} heads of attention, and {architecture.model} {own_heads}: give another "
                "--arch."
            )
        state, fits = fitted(state, backbone, str(path))
        said += fits
    trunk = as_vit(backbone, attention, about.get("decoder_blocks", 0), _projections(state))
    for key, parameter in trunk.named_parameters() if isinstance(trunk, ViT) else ():
        if not key.startswith("backbone."):
            name = ADDED.get(key, key)
            if name not in state:
                raise ValueError(f"{path} lacks {name}, which its decoder blocks need: make it again.")
            parameter.data = state.pop(name).float()
    report = load_matching(backbone, state, str(path), _classifier(architecture.model))
    return Network(trunk, architecture, known.mean, known.std, heads, classes, report + said)


def _known(path: Path, asked: Architecture) -> Known:
    """What --arch, or a folder's config.json in timm's or transformers' form, says of weights that others wrote."""
    config = _json(path / "config.json") if path.is_dir() else {}
    if asked.model:
        architecture = asked
    elif "architecture" in config:
        given = config.get("model_args", {})
        same = {*MODEL_ARGS.values(), *NO_DIFFERENCE, *(["in_chans"] if given.get("in_chans") == 3 else [])}
        changed = set(given) - same
        if changed:
            raise ValueError(
                f"{path} holds a {config['architecture']} with other {', '.join(sorted(changed))} than timm defines, "
                "which bigtrain does not build."
            )
        sizes = {ours: given.get(theirs) for ours, theirs in MODEL_ARGS.items()}
        sizes = {name: value[0] if isinstance(value, list) else value for name, value in sizes.items() if value}
        architecture = Architecture(str(config["architecture"]), **sizes)
    elif config:
        architecture = architecture_of(config, str(path))
    else:
        raise ValueError(
            f"{path} does not say what network it belongs to: name it, as in --arch resnet50 or --arch "
            "vit_base_patch16_224."
        )
    heads = int(config.get("vision_config", config).get("num_attention_heads", 0))
    pixels = config.get("pretrained_cfg", config)  # timm's older folders have no such table
    if path.is_dir() and (path / "preprocessor_config.json").is_file():
        said = _json(path / "preprocessor_config.json")
        pixels = {"mean": said.get("image_mean"), "std": said.get("image_std")}
        if said.get("do_normalize") is False:
            pixels = {"mean": 0.0, "std": 1.0}
    if pixels.get("mean") is not None and pixels.get("std") is not None:
        return Known(architecture, _three(pixels["mean"]), _three(pixels["std"]), heads)
    if path.suffix.lower() == ".npz":
        return Known(architecture, AUGREG_MEAN, AUGREG_STD)
    return Known(architecture, *_normalisation(architecture.model), heads)


def _three(value: Any) -> tuple[float, ...]:
    """A number for each channel, of a list or of one number."""
    return tuple(float(each) for each in value) if isinstance(value, list) else (float(value),) * 3


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds no table of settings.")
    return held


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
    architecture: Architecture, pretrained: bool, needs_vit: bool, drop_path: float, attention: Backend
) -> Network:
    name, backbone = architecture.model, build_trunk(architecture, drop_path=drop_path)
    mean, std = _normalisation(name)
    trunk, report = as_vit(backbone, attention), "random weights"
    if needs_vit and not isinstance(trunk, ViT):
        raise ValueError(refusal(name))
    if pretrained:
        try:
            loaded = released_weights(name)
        except Exception as error:  # of many kinds
            raise ValueError(
                f"the weights of {name!r} cannot be downloaded ({type(error).__name__}): check the name and the "
                f"connection, give a local file ({', '.join(LOCAL)}) with --arch, train one with recipes/pretrain.py, "
                "or begin with random weights (--no-pretrained)."
            ) from error
        state, said = fitted(loaded, backbone, name)
        report = load_matching(backbone, state, name, _classifier(name)) + said
    return Network(trunk, architecture, mean, std, report=report)


def _projections(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for key, value in state.items() if key.startswith("projections.") and key.endswith(".weight")]


def _classifier(name: str) -> str:
    """What the last layer is called in the weights of this network."""
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return config.classifier if config and isinstance(config.classifier, str) else "classifier.6"


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    config = None if name == ALEXNET else timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)
