"""Scores of pictures, with what is known of these: how they are collected, counted and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.protocol import Split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.files import whole_file

UNLABELLED = "unlabelled"  # the split of pictures of which nobody knows whether they are novel


@dataclass(frozen=True)
class Scored:
    """Scores of one detector for some images of a shard set."""

    shard_set: ShardSet
    split: str
    sample_N: NDArray[np.int64]
    novel_N: NDArray[np.bool_]
    score_N: NDArray[np.float64]
    detector: str = ""  # its name, where a table has several


def judged_images(split: Split, seed: int, held_out_known: int, skipped: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of the images behind its figures."""
    return {
        "dataset": split.test.manifest.dataset,
        "known": list(split.protocol.known),
        "novel": list(split.protocol.novel),
        "seed": seed,
        "held_out_known": held_out_known,
        "skipped": skipped,  # key -> why it could not be decoded
    }


def scored_and_classified(detector: ImageDetector, has_classes: bool, image_B3HW: Tensor) -> Tensor:
    """The novelty of uint8 images and, where asked for and known, the class that each shows: (B, 1) or (B, 2)."""
    found = detector.score_tensor(image_B3HW)
    parts = [found.score_B]
    if has_classes and found.class_B is not None:
        parts.append(found.class_B.to(found.score_B))
    return torch.stack(parts, dim=1)


def all_skipped(streams: Sequence[Stream]) -> dict[str, str]:
    """The pictures of some streams that could not be decoded, on any rank."""
    here = [stream.budget.skipped for stream in streams]
    return {key: why for skipped in gather_object(here) for key, why in skipped.items()}


def write_scores(path: Path, parts: list[Scored]) -> None:
    """Write one row an image: key, split, classes, novel, score, and where there are several the detector; whole or not
    at all."""
    rows = [
        {
            "detector": part.detector,
            "key": part.shard_set.key(sample),
            "split": part.split,
            "classes": part.shard_set.classes_of(sample),
            "novel": None if part.split == UNLABELLED else bool(novel),
            "score": float(score),
        }
        for part in parts
        for sample, novel, score in zip(part.sample_N, part.novel_N, part.score_N, strict=True)
    ]
    text = pa.string()
    kinds = {"key": text, "split": text, "classes": pa.list_(text), "novel": pa.bool_(), "score": pa.float64()}
    if any(part.detector for part in parts):
        kinds = {"detector": text, **kinds}
    with whole_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(kinds)), file)
