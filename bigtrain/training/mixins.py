"""Settings that several recipes share, as dataclasses to inherit from; the range of each is at its field."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigtrain.choices import Precision, setting
from bigtrain.data.protocol import Half, Order
from bigtrain.models.timm_names import check_network_name, check_source
from bigtrain.runtime.settings import RunSettings


@dataclass(frozen=True)
class RunMixin:
    seed: int = setting(0, 0)
    precision: Precision = "auto"  # auto: bf16 on CUDA (fp16 where the GPU lacks it), fp32 on CPUs.
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class DataMixin:
    train: str = ""  # Shard set to train on; only its known images are read.
    test: str = ""
    """Shard set to judge on. Empty: half of the known images of --train, and its novel ones (Perera & Patel 5.2), or
    nothing where --train has normal pictures alone."""
    known: tuple[str, ...] = ()  # Known classes; an image with any object of them is known. All others are novel.
    novel: tuple[str, ...] = ()  # Or the novel classes; all others are known.
    unlabelled: tuple[str, ...] = ()
    """Classes whose pictures are of unknown kind: they are scored and shown, and enter no figure."""
    protocol: Half = ""  # Or half of the classes are known: the first in --order, or a choice by the seed.
    order: Order = "name"
    """Order of the classes for first-half: by name (CUB-200), or by the data set's numbered folders (Caltech-256)."""
    validation_share: float = setting(0.1, 0, 0.9)
    """Share of the known training images that is held out, for the threshold."""
    train_limit: int = setting(0, 0)  # Train on a seeded choice of this many known images; 0: all.
    test_limit: int = setting(0, 0)  # Judge on a seeded choice of this many test images; 0: all.


@dataclass(frozen=True)
class WeightsMixin:
    weights_key: str = ""  # Which weights of a local file that holds several, as in model_ema or student.backbone.
    mean: tuple[float, ...] = ()
    """Of the three channels of pixels from 0 to 1, if they are not normalised as the network's architecture or file
    says; with --std."""
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class NetworkMixin(WeightsMixin):
    network: str = "vgg16.tv_in1k"
    """A timm name, alexnet, a local file of weights, a folder in Hugging Face's form, or hf-hub:ORG/NAME."""
    arch: str = ""  # The network that a local file's weights belong to; bigtrain's own files record theirs.
    pretrained: bool = True  # --no-pretrained: a name's network with random weights.
    image_size: int = setting(224, 1)
    resize: int = setting(256, 1)
    """The whole picture is resized to this side; the network sees a crop of --image-size, the centre when judging."""


@dataclass(frozen=True)
class OptimMixin:
    clip: float = setting(0.0, 0)  # Largest norm of the gradient; 0: not clipped.
    lr_batch: int = setting(0, 0)
    """The learning rate is meant for this global batch, and scaled linearly to the given one; 0: not scaled."""


@dataclass(frozen=True)
class JudgeMixin:
    threshold_percentile: float = setting(95.0, 0.01, 99.99)
    """The threshold lies at this percentile of the held-out known images' scores."""
    score_batch: int = setting(64, 1)  # Images of a forward pass of each process when scoring.
    neighbours_bank: int = setting(10_000, 1)
    """At most this many known images are used for the nearest-neighbour figures."""


def check_pixels(config: WeightsMixin) -> None:
    """Refuse a normalisation that is incomplete or impossible."""
    if (config.mean or config.std) and not len(config.mean) == len(config.std) == 3:
        raise ValueError(
            f"--mean has {len(config.mean)} and --std {len(config.std)} numbers: give three of each, or neither."
        )
    if any(value <= 0 for value in config.std) or any(not 0 <= value <= 1 for value in config.mean):
        raise ValueError(
            f"--mean {' '.join(map(str, config.mean))} and --std {' '.join(map(str, config.std))} are not of pixels "
            "from 0 to 1: give three of each as the network was trained with, such as --mean .5 .5 .5 --std .5 .5 .5."
        )


def check_network(config: NetworkMixin) -> None:
    """Refuse a network that timm does not have, or whose file is missing, and sizes that contradict each other."""
    check_pixels(config)
    if config.resize < config.image_size:
        raise ValueError(
            f"--resize is {config.resize}, smaller than --image-size {config.image_size}: the network sees a "
            "crop of the resized picture. Give both the same value to show it whole."
        )
    check_source(config.network)
    if config.arch:
        check_network_name(config.arch)
