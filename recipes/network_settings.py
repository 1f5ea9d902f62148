"""What the recipes on a network's features or logits share: their data, their network, and how a picture is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import timm.layers
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from torch import Tensor, nn

from bigtrain.data.plan import PADDING, Plan
from bigtrain.data.protocol import Half, Parts, Protocol, check_every_class, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch
from bigtrain.data.views import CentreCrop
from bigtrain.models.backbone import Network, has_batch_norm, load_network
from bigtrain.models.vit import Architecture, ViT
from bigtrain.runtime.config import Limits, RunSettings
from bigtrain.runtime.launch import world_size_of_launch
from bigtrain.runtime.start import Precision, device_type

BatchNorm = Literal["frozen", "trained"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class NetworkConfig:
    train: str = ""
    """Shard set to train on; only its known images are read."""
    test: str = ""
    """Shard set to judge on. Empty: half of the known images of --train, and its novel ones (Perera & Patel 5.2)."""
    known: tuple[str, ...] = ()
    """Known classes. All others are novel."""
    novel: tuple[str, ...] = ()
    """Or the novel classes; all others are known."""
    protocol: Half = ""
    """Or half of the classes are known: the first by name, or a choice by the seed."""
    validation_share: float = 0.1
    """Share of the known training images that is held out, for the threshold."""
    train_limit: int = 0
    """Train on a seeded choice of so many known images; 0: all."""
    test_limit: int = 0
    """Judge on a seeded choice of so many test images; 0: all."""

    network: str = "vgg16.tv_in1k"
    """A timm name, alexnet, or a local .safetensors or .pth."""
    arch: str = ""
    """The network that a local file's weights belong to; bigtrain's own files know theirs."""
    pretrained: bool = True
    """--no-pretrained: a name's network with random weights."""
    image_size: int = 224
    resize: int = 256
    """The whole picture is resized to this side; of it a part of --image-size is seen, in judging its centre."""

    threshold_percentile: float = 95.0
    """The threshold lies at this percentile of the held-out known images' scores."""
    score_batch: int = 64
    """Images a forward pass of each process when scoring."""
    neighbours_bank: int = 10_000
    """At most so many known images serve the two nearest-neighbour figures."""
    seed: int = 0
    precision: Precision = "auto"

    run: RunSettings = field(default_factory=RunSettings)


NETWORK_LIMITS: Limits = {
    "validation_share": (0, 0.9),
    **dict.fromkeys(("train_limit", "test_limit", "seed"), (0, math.inf)),
    **dict.fromkeys(("image_size", "resize", "score_batch", "neighbours_bank"), (1, math.inf)),
}


@dataclass(frozen=True)
class Data:
    """What is read, and as what."""

    train: ShardSet
    test: ShardSet
    protocol: Protocol
    parts: Parts
    view: CentreCrop


def check_settings(config: NetworkConfig) -> None:
    """Refuse what no range of a single setting tells."""
    if not 0 < config.threshold_percentile < 100:
        raise ValueError(
            f"--threshold-percentile is {config.threshold_percentile}; it must lie between 0 and 100, as 95 does."
        )
    if config.resize < config.image_size:
        raise ValueError(
            f"--resize is {config.resize}, smaller than --image-size {config.image_size}: the part that is seen is "
            "cut from the resized picture. Give the same for the whole picture."
        )
    if not config.train or not config.run.out:
        raise ValueError("--train SHARDS and --out FOLDER are needed: what to train on, and where the run goes.")


def read_data(config: NetworkConfig, fewest_classes: int = 1) -> Data:
    """The shard sets, what is known, and which images are for what.

    Raises:
        ValueError: fewer known classes than the method tells apart, a class without images, or nothing to judge on.
    """
    train = ShardSet(config.train)
    test = ShardSet(config.test) if config.test else None
    classes = tuple(dict.fromkeys((*train.classes, *(test.classes if test else ()))))
    protocol = named_or_half(classes, config.known, config.novel, config.protocol, config.seed)
    if len(protocol.known) < fewest_classes:
        raise ValueError(
            f"this method tells known classes apart and needs at least {fewest_classes}; {len(protocol.known)} was "
            f"given ({', '.join(protocol.known)}). Name more with --known; recipes/defend.py takes one."
        )
    parts = split(
        protocol, train, test,
        validation_share=config.validation_share, seed=config.seed,
        train_limit=config.train_limit, test_limit=config.test_limit,
    )  # fmt: skip
    check_every_class(protocol, train, parts.fitted_N)
    return Data(train, test or train, protocol, parts, CentreCrop(config.image_size, config.resize))


def named_or_half(
    classes: Sequence[str], known: Sequence[str], novel: Sequence[str], half: Half, seed: int
) -> Protocol:
    """What is known, by names or by --protocol."""
    if not half:
        return Protocol.of(classes, known=known, novel=novel)
    if known or novel:
        raise ValueError(f"--protocol {half} says what is known: leave --known and --novel out.")
    return Protocol.half(half, classes, seed=seed)


def read_network(config: NetworkConfig) -> Network:
    """The network that --network names, at --image-size."""
    is_named = config.arch or ("." in config.network and config.network.rpartition(".")[2] in ("pth", "pt", "npz"))
    architecture = Architecture(config.arch, config.image_size) if is_named else None
    if architecture is None and not config.network.endswith(".safetensors"):
        architecture = Architecture(config.network, config.image_size)
    torch.manual_seed(config.seed)
    network = load_network(config.network, architecture, pretrained=config.pretrained)
    try:
        with torch.no_grad():
            network.trunk(torch.zeros(1, 3, config.image_size, config.image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{network.architecture.model} does not take pictures of {config.image_size} pixels ({error}): give a "
            "larger --image-size, or the one it was trained with."
        ) from error
    return network


def set_recompute(trunk: nn.Module, settings: RunSettings) -> None:
    """timm's activation checkpointing, where it was asked for."""
    if isinstance(trunk, ViT):
        trunk.recompute = settings.recompute
    elif settings.recompute:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]


def check_training(trunk: nn.Module, batch_norm: BatchNorm, settings: RunSettings) -> None:
    """Refuse what this network cannot be trained with, before anything is written."""
    if settings.recompute and not isinstance(trunk, ViT) and not hasattr(trunk, "set_grad_checkpointing"):
        raise ValueError("--recompute is not to be had for this network, which is torchvision's: leave it out.")
    if batch_norm == "frozen" or not has_batch_norm(trunk):
        return
    if settings.accumulate > 1:
        raise ValueError(
            "--accumulate would change what batch norm learns, which is the statistics of each part: leave it out, use "
            "--batch-norm frozen, or a network without batch norm."
        )
    if world_size_of_launch() > 1 and device_type() != "cuda":
        raise ValueError(
            "batch norm's statistics cannot be shared among processes without GPUs, and each would learn its own: use "
            "one process, --batch-norm frozen, or a network without batch norm (such as resnet50_gn)."
        )


def without_padding(plan: Plan, trunk: nn.Module, batch_norm: BatchNorm) -> Plan:
    """The plan for a network whose batch norms learn: of full batches alone."""
    return replace(plan, drop_last=batch_norm == "trained" and has_batch_norm(trunk))


def prepare_batch_norm(module: M, kind: BatchNorm) -> M:
    """Batch norm's statistics and scale frozen, or statistics learned over the batches of all processes."""
    if kind == "frozen":
        return timm.layers.freeze_batch_norm_2d(module)
    return timm.layers.convert_sync_batchnorm(module) if world_size_of_launch() > 1 else module


def with_batch_norm(module: M) -> M:
    """The network that anybody's code builds, from one whose batch norms were frozen."""
    return timm.layers.unfreeze_batch_norm_2d(module)


def labels_of(classes: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def class_numbers(shard_set: ShardSet, batch: Batch, label_of: dict[str, int]) -> Tensor:
    """The class of each image of a batch; 0 in the places of padding, which weigh nothing."""
    labels = [0 if s == PADDING else only_label(shard_set, s, label_of) for s in batch.sample_B.tolist()]
    return torch.tensor(labels).to(batch.weight_B.device, non_blocking=True)


def only_label(shard_set: ShardSet, sample: int, label_of: dict[str, int]) -> int:
    """The number of the one class among `label_of` that an image shows."""
    labels = [label_of[name] for name in shard_set.classes_of(sample) if name in label_of]
    if len(labels) != 1:
        raise ValueError(
            f"{shard_set.url}: image {shard_set.key(sample)} shows {len(labels)} of the classes to tell apart "
            f"({', '.join(shard_set.classes_of(sample))}); a classifier needs exactly one: use single objects."
        )
    return labels[0]


def check_single_labels(shard_set: ShardSet, sample_N: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Refuse images that show none or several of the classes, before anything is trained."""
    label_of = labels_of(classes)
    for sample in sample_N.tolist():
        only_label(shard_set, sample, label_of)


def shared_classes(names: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes that mean the same, by name or, where one is a synset (n02085620), by ImageNet's name of it."""
    info = ImageNetInfo("imagenet-21k")
    descriptions = dict(zip(info.label_names(), info.label_descriptions(), strict=True))

    def meanings(name: str) -> set[str]:
        wnid = name.split("-")[0]
        known_as = descriptions[wnid].split(",") if wnid in descriptions else [name]
        return {" ".join(one.lower().replace("_", " ").replace("-", " ").split()) for one in known_as}

    theirs = {b: meanings(b) for b in others}
    return [(a, b) for a in names for own in [meanings(a)] for b in others if a == b or own & theirs[b]]
