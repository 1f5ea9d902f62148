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
from numpy.typing import NDArray

from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.evaluation.collect import Kept
from bigtrain.files import write_text
from bigtrain.models.network import Network
from bigtrain.training.feature_look import classes_of, figures_of, in_words
from bigtrain.training.run_setup import Setup

if TYPE_CHECKING:
    from bigtrain.methods.defend.network import DenseTuner

ROWS = "guard.jsonl"
LOOKS = 10  # during a run, where --guard-every is 0
HALF = 0.5  # of the rank before: below, features have collapsed


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
        self.setup.accelerator.wait_for_everyone()  # before another rank reads the file
        self.setup.accelerator.print(f"guard at step {step}: {in_words(row)}")

    def _read(self) -> list[dict[str, Any]]:
        path = self.setup.run / ROWS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]


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
