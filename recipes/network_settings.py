"""What the recipes on a network's features or logits share before torch is imported: their settings and their data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bigtrain.choices import Precision
from bigtrain.data.protocol import Half, Order, Parts, Protocol, check_every_class, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.models.timm_names import check_network_name, check_source
from bigtrain.runtime.settings import Limits, RunSettings


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
    """Or half of the classes are known: the first in --order, or a choice by the seed."""
    order: Order = "name"
    """Of the classes for first-half: by name (CUB-200), or that of the owners' numbered folders (Caltech-256)."""
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


def check_names(config: NetworkConfig) -> None:
    """Refuse a network that timm does not have, or whose file is missing."""
    check_source(config.network)
    if config.arch:
        check_network_name(config.arch)


def read_data(config: NetworkConfig, fewest_classes: int = 1) -> Data:
    """The shard sets, what is known, and which images are for what.

    Raises:
        ValueError: fewer known classes than the method tells apart, a class without images, or nothing to judge on.
    """
    train = ShardSet(config.train)
    test = ShardSet(config.test) if config.test else None
    classes = tuple(dict.fromkeys((*train.classes, *(test.classes if test else ()))))
    protocol = named_or_half(config, classes, train)
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
    return Data(train, test or train, protocol, parts)


def named_or_half(config: NetworkConfig, classes: Sequence[str], train: ShardSet) -> Protocol:
    """What is known, by names or by --protocol."""
    if config.order == "folder" and config.protocol != "first-half":
        raise ValueError("--order folder has an effect with --protocol first-half alone: leave it out.")
    if not config.protocol:
        return Protocol.of(classes, known=config.known, novel=config.novel)
    if config.known or config.novel:
        raise ValueError(f"--protocol {config.protocol} says what is known: leave --known and --novel out.")
    in_order = train.manifest.folder_order if config.order == "folder" else None
    return Protocol.half(config.protocol, classes, seed=config.seed, folder_order=in_order)


def labels_of(classes: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


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
    from bigtrain.models.lean_timm import timm

    info = timm.data.ImageNetInfo("imagenet-21k")
    descriptions = dict(zip(info.label_names(), info.label_descriptions(), strict=True))

    def meanings(name: str) -> set[str]:
        wnid = name.split("-")[0]
        known_as = descriptions[wnid].split(",") if wnid in descriptions else [name]
        return {" ".join(one.lower().replace("_", " ").replace("-", " ").split()) for one in known_as}

    theirs = {b: meanings(b) for b in others}
    return [(a, b) for a in names for own in [meanings(a)] for b in others if a == b or own & theirs[b]]
