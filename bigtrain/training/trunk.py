"""Training any trunk: batch norm, dropout, recomputation, class labels of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigtrain.choices import BatchNorm, Chosen
from bigtrain.data.later import on_device
from bigtrain.data.plan import PADDING, Plan
from bigtrain.data.protocol import only_label
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch
from bigtrain.detectors.feature_detector import FeatureDetector
from bigtrain.detectors.network_detector import NetworkDetector, Scoring
from bigtrain.models.architecture import asked_for
from bigtrain.models.lean_timm import timm
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network, dropouts_of_fc, has_batch_norm
from bigtrain.models.sanity import check_sees
from bigtrain.models.vit import ViT
from bigtrain.runtime.launch import world_size_of_launch
from bigtrain.runtime.precision import device_type
from bigtrain.runtime.settings import RunSettings

M = TypeVar("M", bound=nn.Module)


def read_network(config: Any) -> Network:
    """The network that --network names, at --image-size, by a recipe's settings (NetworkMixin and RunMixin)."""
    torch.manual_seed(config.seed)
    architecture = asked_for(config.network, config.arch, config.image_size)
    network = load_network(
        config.network, architecture, pretrained=config.pretrained, weights_key=config.weights_key, mean=config.mean,
        std=config.std,
    )  # fmt: skip
    check_sees(network, config.image_size)
    return network


def network_detector(
    network: Network, detector: FeatureDetector, config: Any, precision: Chosen, *, layer: str = "", head: str = ""
) -> NetworkDetector:
    """A detector on a layer or a head of a network, by a recipe's settings (NetworkMixin and JudgeMixin)."""
    scoring = Scoring(
        image_size=config.image_size, resize=config.resize, precision=precision, batch=config.score_batch,
        layer=layer, head=head,
    )  # fmt: skip
    return NetworkDetector(network, detector, scoring)


def check_training(trunk: nn.Module, batch_norm: BatchNorm, settings: RunSettings) -> None:
    """Refuse what this network cannot be trained with, before anything is written."""
    if settings.recompute and not isinstance(trunk, ViT) and not hasattr(trunk, "set_grad_checkpointing"):
        raise ValueError("--recompute is not available for this network, which is torchvision's: leave it out.")
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


def prepare_trunk(trunk: nn.Module, settings: RunSettings, dropout: float) -> None:
    """Activation checkpointing where it was asked for; the dropout rate at fc6 and fc7, if the network has them."""
    if isinstance(trunk, ViT):
        trunk.recompute = settings.recompute
    elif settings.recompute:
        trunk.set_grad_checkpointing(True)  # type: ignore[operator]
    for layer in dropouts_of_fc(trunk):
        layer.p = dropout


def without_padding(plan: Plan, trunk: nn.Module, batch_norm: BatchNorm) -> Plan:
    """The plan for a network whose batch norms learn: of full batches alone."""
    return replace(plan, drop_last=batch_norm == "trained" and has_batch_norm(trunk))


def prepare_batch_norm(module: M, kind: BatchNorm) -> M:
    """Batch norm's statistics and scale frozen, or statistics learned over the batches of all processes."""
    if kind == "frozen":
        return timm.layers.freeze_batch_norm_2d(module)
    return timm.layers.convert_sync_batchnorm(module) if world_size_of_launch() > 1 else module


def with_batch_norm(module: M) -> M:
    """Turn frozen batch norms back into ordinary ones, which any code can load."""
    return timm.layers.unfreeze_batch_norm_2d(module)


def class_numbers(shard_set: ShardSet, batch: Batch, label_of: dict[str, int]) -> Tensor:
    """The class of each image of a batch, (B,); 0 for padding, whose weight is 0."""
    labels = [0 if s == PADDING else only_label(shard_set, s, label_of) for s in batch.sample_B.tolist()]
    return on_device(labels, batch.weight_B.device)
