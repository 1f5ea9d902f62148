"""Watches the features while a network is tuned without labels, keeps the best state, and stops a collapse.

Looked at are held-out pictures: before, every so many steps, and at the end. Files in the run folder:

    guard.jsonl         a row for each look; a restart continues it
    best-000123.safetensors    the network as it was at a look that was the best so far; the best of them stays
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.evaluation import feature_figures as figures
from bigtrain.evaluation.collect import Kept, collect
from bigtrain.files import write_text
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT
from bigtrain.training.run_setup import Setup

if TYPE_CHECKING:
    from bigtrain.methods.defend.network import DenseTuner

ROWS = "guard.jsonl"
LOOKS = 10  # during a run, where --guard-every is 0
HALF = 0.5  # of the rank before: below, features have collapsed
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


class Guard:
    """Looks at held-out pictures through a network that is being tuned. All methods are called on all ranks.

    Args:
        config: with GuardMixin, DenseTuningMixin and `score_batch`.
        shard_set, sample_N: the held-out pictures.
        given: the network before tuning.
    """

    def __init__(
        self, config: Any, setup: Setup, shard_set: ShardSet, sample_N: NDArray[np.int64], given: Network
    ) -> None:
        self.config, self.setup, self.given = config, setup, given
        self.pictures = Kept(setup.in_order(shard_set, sample_N, Resized(config.image_size), config.score_batch))
        self.class_of = classes_of(shard_set, sample_N)
        self.rows: list[dict[str, Any]] = self._read()
        self.problem = collapse(self.rows[0], self.rows[-1], config.guard_fall) if self.rows else ""

    def begin(self, step: int) -> None:
        """Look at the given network, unless an earlier start has; forget looks behind the step that is resumed."""
        self.rows, self.problem = [row for row in self.rows if row["step"] <= step], ""
        if not self.rows:
            self._note(0, self.given, None)

    def __call__(self, step: int, steps: int, tuned: Callable[[], DenseTuner]) -> bool:
        """After each step: look if it is time; False if the features have collapsed."""
        every = self.config.guard_every or max(1, steps // LOOKS)
        if step % every and step != steps:
            return True
        tuner = tuned()
        self._note(step, replace(self.given, trunk=tuner.vit), tuner)
        self.problem = collapse(self.rows[0], self.rows[-1], self.config.guard_fall)
        return not self.problem

    def best(self) -> dict[str, Any]:
        """The row of the best look; the latest of those that are equal."""
        return max(self.rows, key=lambda row: (quality(row), row["step"]))

    def best_file(self, step: int) -> Path:
        return self.setup.run / f"best-{step:06}.safetensors"

    def end(self) -> None:
        """Remove what was the best once and is no more."""
        if self.setup.accelerator.is_main_process:
            for row in self.rows:
                if row["step"] != self.best()["step"]:
                    self.best_file(row["step"]).unlink(missing_ok=True)

    def _note(self, step: int, network: Network, tuner: DenseTuner | None) -> None:
        before = max((quality(row) for row in self.rows), default=-1.0)
        temperature = self.config.temperature
        row = {"step": step, **figures_of(self.setup, self.pictures, self.class_of, network, tuner, temperature)}
        self.rows.append(row)
        if self.setup.accelerator.is_main_process:
            if quality(row) >= before:
                network.save(self.best_file(step))
            write_text(self.setup.run / ROWS, "".join(json.dumps(each) + "\n" for each in self.rows))
        self.setup.accelerator.print(f"guard at step {step}: {in_words(row)}")

    def _read(self) -> list[dict[str, Any]]:
        path = self.setup.run / ROWS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]


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


def quality(row: Mapping[str, Any]) -> float:
    """What looks are compared by: kNN accuracy where there are labels, else how many pairs find each other."""
    return float(row["knn" if "knn" in row else "pair_agreement"]["value"])


def collapse(before: Mapping[str, Any], now: Mapping[str, Any], fall: float) -> str:
    """Why features have collapsed since the first look; "" if they have not.

    Args:
        fall: how much of a share of pictures may be lost.
    """
    if now["spread"] is None:
        return "the features are NaN or infinite"
    if now["rank"] < HALF * before["rank"]:
        return f"the rank of the features fell from {before['rank']:.1f} to {now['rank']:.1f}"
    for name, words in (
        ("pair_agreement", "pictures that find their other view"),
        ("knn", "pictures that kNN tells right"),
    ):
        if name in before and before[name]["value"] - now[name]["value"] > fall:
            return f"{words} fell from {100 * before[name]['value']:.1f} to {100 * now[name]['value']:.1f} %"
    return ""


def in_words(row: Mapping[str, Any]) -> str:
    parts = [f"rank {row['rank']:.1f}", f"pairs {100 * row['pair_agreement']['value']:.1f} %"]
    if "prototype_usage" in row:
        parts.append(f"prototypes in use {100 * row['prototype_usage']:.0f} %")
    if "knn" in row:
        parts.append(f"kNN {100 * row['knn']['value']:.1f} %, linear probe {100 * row['linear_probe']['value']:.1f} %")
    return ", ".join(parts)
