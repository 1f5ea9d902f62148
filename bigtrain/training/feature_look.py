"""A look at what a network's features are worth on some pictures: what a tuning and a distillation are watched by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.shard_set import ShardSet
from bigtrain.evaluation import feature_figures as figures
from bigtrain.evaluation.collect import Kept, collect
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT
from bigtrain.training.run_setup import Setup

if TYPE_CHECKING:
    from bigtrain.methods.defend.network import DenseTuner

TOKENS = 4  # patch tokens of a picture whose rank is taken


def second_view(image_B3HW: Tensor) -> Tensor:
    """Another view of pictures: the lower right four fifths, mirrored and grey. uint8 to uint8, of the same size."""
    height, width = image_B3HW.shape[-2:]
    part = image_B3HW[..., height // 5 :, width // 5 :].flip(-1).float()
    grey = part.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(grey, (height, width), mode="bilinear", antialias=True).round().byte()


def first_view(image_B3HW: Tensor) -> Tensor:
    """The upper left four fifths of pictures, at their size."""
    height, width = image_B3HW.shape[-2:]
    part = image_B3HW[..., : height - height // 5, : width - width // 5].float()
    return torch.nn.functional.interpolate(part, (height, width), mode="bilinear", antialias=True).round().byte()


@torch.no_grad()
def pooled_tokens(network: Network, autocast: torch.autocast, image_B3HW: Tensor) -> Tensor:
    """The mean of a network's patch tokens, float32 (B, D); of a network that has none, its pooled features."""
    image_B3HW = network.normalise(image_B3HW)
    with autocast:
        if isinstance(network.trunk, ViT):
            return network.trunk(image_B3HW)[0].tokens_BND.float().mean(dim=1)
        return network.pooled()(image_B3HW).float()


def classes_of(shard_set: ShardSet, sample_N: NDArray[np.int64]) -> dict[int, int]:
    """The class of each image, by number; nothing where not every image shows exactly one."""
    classes = [shard_set.classes_of(sample) for sample in sample_N.tolist()]
    names = sorted({name for found in classes for name in found})
    if len(names) < 2 or any(len(found) != 1 for found in classes):
        return {}
    return {sample: names.index(name) for sample, (name,) in zip(sample_N.tolist(), classes, strict=True)}


def figures_of(
    setup: Setup,
    pictures: Kept,
    class_of: Mapping[int, int],
    network: Network,
    tuner: DenseTuner | None = None,
    temperature: float = 0.1,
) -> dict[str, Any]:
    """The figures of a network on held-out pictures; the same on all ranks.

    Args:
        class_of: the class of each picture by its number; empty: there are none.
        tuner: around the network, whose prototypes are looked at.
    """
    autocast = setup.autocast()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": lambda image_B3HW: pooled_tokens(network, autocast, image_B3HW),
        "first": lambda image_B3HW: pooled_tokens(network, autocast, first_view(image_B3HW)),
        "second": lambda image_B3HW: pooled_tokens(network, autocast, second_view(image_B3HW)),
    }
    if isinstance(network.trunk, ViT):
        functions["tokens"] = lambda image_B3HW: some_tokens(network, autocast, image_B3HW)
    if tuner is not None:
        functions["assigned"] = lambda image_B3HW: assigned(tuner, network, autocast, image_B3HW, temperature)
    sample_N, found = collect(setup.accelerator, pictures, functions)
    if not all(np.isfinite(each).all() for each in found.values()):
        nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
        of_labels = {"knn": nothing, "linear_probe": nothing} if class_of else {}
        return {"images": len(sample_N), "rank": 0.0, "spread": None, "pair_agreement": nothing, **of_labels}
    row: dict[str, Any] = {
        "images": len(sample_N),
        "rank": figures.effective_rank(found["whole"]),
        "spread": figures.spread(found["whole"]),
        "pair_agreement": figures.share(figures.pair_agreement(found["first"], found["second"])),
    }
    if "tokens" in found:
        row["token_rank"] = figures.effective_rank(np.concatenate(np.split(found["tokens"], TOKENS, axis=1)))
    if "assigned" in found:
        row["prototype_usage"] = figures.prototype_usage(found["assigned"])
    if class_of:
        class_N = np.array([class_of[sample] for sample in sample_N.tolist()])
        row["knn"] = figures.share(figures.neighbours_right(found["whole"], class_N))
        row["linear_probe"] = figures.share(figures.probe_right(found["whole"], class_N))
    return row


@torch.no_grad()
def some_tokens(network: Network, autocast: torch.autocast, image_B3HW: Tensor) -> Tensor:
    """A few patch tokens of each picture, evenly chosen: (B, TOKENS D)."""
    with autocast:
        tokens_BND = network.vit(network.normalise(image_B3HW))[0].tokens_BND.float()
    places = torch.linspace(0, tokens_BND.shape[1] - 1, TOKENS).round().long()
    return tokens_BND[:, places].flatten(1)


@torch.no_grad()
def assigned(
    tuner: DenseTuner, network: Network, autocast: torch.autocast, image_B3HW: Tensor, temperature: float
) -> Tensor:
    """How much of each picture is assigned to each prototype: (B, K)."""
    with autocast:
        _, (cosines_BNK,) = tuner(network.normalise(image_B3HW))
    return (cosines_BNK.float() / temperature).softmax(dim=-1).mean(dim=1)


def in_words(row: Mapping[str, Any]) -> str:
    parts = [f"rank {row['rank']:.1f}", f"pairs {100 * row['pair_agreement']['value']:.1f} %"]
    if "prototype_usage" in row:
        parts.append(f"prototypes in use {100 * row['prototype_usage']:.0f} %")
    if "knn" in row:
        parts.append(f"kNN {100 * row['knn']['value']:.1f} %, linear probe {100 * row['linear_probe']['value']:.1f} %")
    return ", ".join(parts)
