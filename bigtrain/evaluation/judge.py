"""The judge: a detector and the test split to figures, a table of scores and a report, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.pictures import Picture
from bigtrain.data.protocol import Protocol
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.detectors.neighbours import NearestNeighbours
from bigtrain.detectors.saved import ImageDetector
from bigtrain.evaluation.collect import collect
from bigtrain.evaluation.metrics import auroc, closed_set_accuracy, explained, oscr, summary
from bigtrain.evaluation.pictures import Shown, most_telling
from bigtrain.evaluation.report import write_report

Features = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) to (B, D)


@dataclass(frozen=True)
class Scored:
    """Scores of one detector for some images of a shard set."""

    shard_set: ShardSet
    split: str
    sample_N: NDArray[np.int64]
    novel_N: NDArray[np.bool_]
    score_N: NDArray[np.float64]
    detector: str = ""  # its name, where a table has several


def judge(
    folder: Path,
    accelerator: Accelerator,
    detector: ImageDetector,
    *,
    method: str,
    protocol: Protocol,
    test: Stream,
    held_out: Stream | None,
    bank: Stream,
    plain: Mapping[str, Features],
    settings: Mapping[str, Any],
    seed: int,
    quantile: float = 0.95,
    classes: Sequence[str] = (),
    floors: Mapping[str, Features] | None = None,
) -> dict[str, Any]:
    """Score, calibrate on held-out known images, write detector/, scores.parquet and report.html into the run folder.

    Called on all ranks; the first one writes.

    Args:
        method: what the detector's figures are called.
        test: the test split; its figures are computed here, and nothing is chosen by them.
        held_out: known training images that were held out; they give the threshold. None: there are none.
        bank: known training images for the plain figures.
        plain: name -> features; beside the detector, nearest neighbours on each of them.
        settings: of the run, for the report.
        quantile: share of the held-out known images that are to lie at or below the threshold.
        classes: the names of the detector's classes, where it tells which of them a picture shows: then there are
            `closed_set_accuracy` and `oscr` too.
        floors: name -> the scores (B,) of a detector that has learnt nothing, whose scores are errors of the same kind.
            They are plain figures too, and of the first one `explained` and `explained_novel` say by what share the
            detector's error is smaller: on held-out known images and, for comparison, on novel ones.

    Returns:
        The record of results.json; the same on all ranks. Where some test images show no class, which makes them novel,
        `auroc_annotated` is without them.
    """
    neighbours = {n: NearestNeighbours().fit(f) for n, f in collect(accelerator, bank, plain)[1].items()}

    def distance_to_known(name: str, image_B3HW: Tensor) -> Tensor:
        score_B = neighbours[name].score(plain[name](image_B3HW).float().cpu().numpy())
        return torch.from_numpy(score_B).to(accelerator.device)

    def scored_and_classified(image_B3HW: Tensor) -> Tensor:
        found = detector.score_tensor(image_B3HW)
        parts = [found.score_B] + ([found.class_B.to(found.score_B)] if found.class_B is not None and classes else [])
        return torch.stack(parts, dim=1)

    floors = floors or {}
    scorers: dict[str, Features] = {"score": scored_and_classified, **floors}
    known_N, known = (
        collect(accelerator, held_out, scorers) if held_out else (np.zeros(0, np.int64), {"score": np.zeros((0, 1))})
    )
    threshold = detector.calibrate(known["score"][:, 0], quantile)
    others = {f"nearest neighbour on {name}": partial(distance_to_known, name) for name in plain}
    test_N, found = collect(accelerator, test, scorers | others)
    skipped = {
        "train": all_skipped([bank] + ([held_out] if held_out else [])),
        "test": all_skipped([test]),
    }

    answer_NA = found.pop("score")
    scored = Scored(test.shard_set, "test", test_N, ~protocol.is_known(test.shard_set)[test_N], answer_NA[:, 0])
    figures = summary(scored.novel_N, scored.score_N, seed=seed)
    if answer_NA.shape[1] > 1:
        shown = [test.shard_set.classes_of(sample) for sample in test_N]
        is_right_N = np.array([classes[int(a)] in names for a, names in zip(answer_NA[:, 1], shown, strict=True)])
        accuracy = closed_set_accuracy(is_right_N[~scored.novel_N])
        further = {"closed_set_accuracy": accuracy, "oscr": oscr(scored.novel_N, scored.score_N, is_right_N)}
    else:
        further = {}
    shows_any_N = np.array([bool(test.shard_set.classes_of(sample)) for sample in test_N])
    if not shows_any_N.all() and len(set(scored.novel_N[shows_any_N].tolist())) == 2:
        further["auroc_annotated"] = auroc(scored.novel_N[shows_any_N], scored.score_N[shows_any_N])
    comparisons = {name: (score_N, summary(scored.novel_N, score_N, seed=seed)) for name, score_N in found.items()}
    for name in list(floors)[:1]:
        novel_N = scored.novel_N
        further["explained_novel"] = explained(scored.score_N[novel_N], comparisons[name][0][novel_N], seed=seed)
        if len(known_N):
            further["explained"] = explained(known["score"][:, 0], known[name], seed=seed)
    results = {
        "method": method,
        **figures,
        **{name: estimate._asdict() for name, estimate in further.items()},
        "comparisons": {name: its for name, (_, its) in comparisons.items()},
        "threshold": rates(threshold, scored),
        "dataset": test.shard_set.manifest.dataset,
        "known": list(protocol.known),
        "novel": list(protocol.novel),
        "seed": seed,
        "held_out_known": len(known_N),
        "skipped": skipped,  # key -> why it could not be decoded
    }
    if accelerator.is_main_process:
        detector.save(folder / "detector")
        parts = [scored]
        if held_out:
            parts.append(
                Scored(held_out.shard_set, "held_out", known_N, np.zeros(len(known_N), bool), known["score"][:, 0])
            )
        write_scores(folder / "scores.parquet", parts)
        sections = most_telling(scored.novel_N, scored.score_N)
        write_report(
            folder / "report.html",
            title=f"{method}: {', '.join(protocol.known[:3])}{' ...' if len(protocol.known) > 3 else ''}",
            results={**results, "metrics": figures, "detector": method, "threshold": threshold, "settings": settings},
            novel_N=scored.novel_N,
            score_N=scored.score_N,
            comparisons=comparisons,
            pictures={title: pictures(scored, places, detector) for title, places in sections.items()},
        )
    accelerator.wait_for_everyone()
    return results


def all_skipped(streams: Sequence[Stream]) -> dict[str, str]:
    """The pictures of some streams that could not be decoded, on any rank."""
    here = [stream.budget.skipped for stream in streams]
    return {key: why for skipped in gather_object(here) for key, why in skipped.items()}


def write_scores(path: Path, parts: list[Scored]) -> None:
    """Write one row an image: key, split, classes, novel, score, and where there are several the detector; whole or not
    at all."""
    names = [("detector", pa.string())] if any(part.detector for part in parts) else []
    rows = [
        {
            "detector": part.detector,
            "key": part.shard_set.key(sample),
            "split": part.split,
            "classes": part.shard_set.classes_of(sample),
            "novel": bool(novel),
            "score": float(score),
        }
        for part in parts
        for sample, novel, score in zip(part.sample_N, part.novel_N, part.score_N, strict=True)
    ]
    schema = pa.schema(
        [
            *names,
            ("key", pa.string()),
            ("split", pa.string()),
            ("classes", pa.list_(pa.string())),
            ("novel", pa.bool_()),
            ("score", pa.float64()),
        ]
    )
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    temporary.replace(path)


def rates(threshold: float | None, test: Scored) -> dict[str, float] | None:
    """What the threshold, set on held-out known images, gives on the test split: its shares of errors."""
    if threshold is None:
        return None
    flagged_N = test.score_N > threshold
    return {
        "value": threshold,
        "known_flagged": float(flagged_N[~test.novel_N].mean()),
        "novel_missed": float((~flagged_N[test.novel_N]).mean()),
    }


def pictures(test: Scored, places: list[int], detector: ImageDetector) -> list[Shown]:
    """The pictures at some places of the scores, with their maps where the method has them."""
    payloads = test.shard_set.read([int(test.sample_N[place]) for place in places])
    images = [Picture(payload).rgb() for payload in payloads]
    found = detector.score_map(images)
    maps = [None] * len(images) if found is None else list(found)
    return [
        Shown(
            key=test.shard_set.key(test.sample_N[place]),
            classes=test.shard_set.classes_of(test.sample_N[place]),
            novel=bool(test.novel_N[place]),
            score=float(test.score_N[place]),
            image=image,
            score_map_hw=map_hw,
        )
        for place, image, map_hw in zip(places, images, maps, strict=True)
    ]
