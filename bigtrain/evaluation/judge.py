"""The judge: a detector and the test split to figures, a table of scores and a report, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.data.decode import Picture
from bigtrain.data.protocol import Split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.detectors.classical.nearest import NearestNeighbours
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.evaluation.collect import collect, mean_over
from bigtrain.evaluation.metrics import Estimate, auroc, closed_set_accuracy, explained, oscr, summary
from bigtrain.evaluation.pixel_figures import FPR_LIMIT, PixelCounts, mask_of, masks_of, pixel_counts
from bigtrain.evaluation.report.model_card import NEAR, write_card
from bigtrain.evaluation.report.overlays import Shown, most_telling
from bigtrain.evaluation.report.report import write_report
from bigtrain.evaluation.report.sections import by_class
from bigtrain.evaluation.scored import Scored, all_skipped, judged_images, scored_and_classified, write_scores
from bigtrain.models.timm_names import licence_of_weights

Features = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) to (B, D)


def judge(
    folder: Path,
    accelerator: Accelerator,
    detector: ImageDetector,
    split: Split,
    read: Callable[[ShardSet, NDArray[np.int64]], Stream],
    *,
    method: str,
    plain: Mapping[str, Features],
    bank_N: NDArray[np.int64],
    settings: Mapping[str, Any],
    seed: int,
    quantile: float = 0.95,
    classes: Sequence[str] = (),
    floors: Mapping[str, ImageDetector] | None = None,
) -> dict[str, Any]:
    """Score, calibrate on held-out known images, write detector/, scores.parquet and report.html into the run folder.

    Called on all ranks; the first one writes.

    Args:
        split: figures are computed on its test images, which decide nothing; the held-out known ones
            give the threshold, where there are any.
        read: this rank's share of some samples, in the order of the index.
        method: what the detector's figures are called.
        plain: name -> features; nearest neighbours on each of them stand beside the detector.
        bank_N: known training images for these.
        settings: of the run, for the report.
        quantile: share of the held-out known images that are to lie at or below the threshold.
        classes: the names of the detector's classes, where it tells which of them an image shows: then there are
            `closed_set_accuracy` and `oscr` too.
        floors: name -> a detector that predicts (`ImageDetector.target`); the score of one that ignores the image and
            always predicts the mean target stands beside it. Of the first one `explained` and `explained_novel` say by
            what share the detector's error is smaller: on held-out known images and, for comparison, on novel ones.

    Returns:
        The record of results.json; the same on all ranks. Where some test images show no class, which makes them novel,
        `auroc_annotated` is without them.
    """
    bank = read(split.train, bank_N)
    others = {f"nearest neighbour on {name}": f for name, f in nearest_scorers(accelerator, bank, plain).items()}
    means = {name: mean_over(accelerator, read(split.train, bank_N), d.target) for name, d in (floors or {}).items()}
    constants = {name: partial((floors or {})[name].constant_score, constant=mean) for name, mean in means.items()}
    scorers: dict[str, Features] = {"score": partial(scored_and_classified, detector, bool(classes)), **constants}
    held_out = read(split.train, split.held_out_N) if len(split.held_out_N) else None
    known_N, known = (
        collect(accelerator, held_out, scorers) if held_out else (np.zeros(0, np.int64), {"score": np.zeros((0, 1))})
    )
    threshold = detector.calibrate(known["score"][:, 0], quantile)
    test = read(split.test, split.test_N)
    test_N, found = collect(accelerator, test, scorers | others)
    skipped = {"train": all_skipped([bank] + ([held_out] if held_out else [])), "test": all_skipped([test])}

    answer_NA = found.pop("score")
    scored = Scored(split.test, "test", test_N, ~split.protocol.is_known(split.test)[test_N], answer_NA[:, 0])
    known_scored = Scored(split.train, "held_out", known_N, np.zeros(len(known_N), bool), known["score"][:, 0])
    figures = summary(scored.novel_N, scored.score_N, seed=seed)
    comparisons = {name: (score_N, summary(scored.novel_N, score_N, seed=seed)) for name, score_N in found.items()}
    further = further_figures(scored, answer_NA, classes)
    if constants:
        first, novel_N = next(iter(constants)), scored.novel_N
        further["explained_novel"] = explained(scored.score_N[novel_N], found[first][novel_N], seed=seed)
        if len(known_N):
            further["explained"] = explained(known_scored.score_N, known[first], seed=seed)
    results = {
        "method": method,
        **figures,
        **{name: estimate._asdict() for name, estimate in further.items()},
        "comparisons": {name: its for name, (_, its) in comparisons.items()},
        "threshold": threshold_rates(threshold, scored),
        **judged_images(split, seed, len(known_N), skipped),
    }
    masks = masks_of(split.test) if detector.map_side is not None else {}
    floor = next((partial((floors or {})[name].constant_map, constant=mean) for name, mean in means.items()), None)
    if pixels := pixel_record(accelerator, detector, split, test_N, masks, floor):
        results["pixels"] = pixels
    if accelerator.is_main_process:
        detector.save(folder / "detector")
        near = near_threshold(scored, threshold)
        write_own_card(folder / "detector", method, results, settings, split, figures=figures, near=near)
        write_scores(folder / "scores.parquet", [scored, known_scored] if held_out else [scored])
        for_report = {**results, "metrics": figures, "detector": method, "threshold": threshold, "settings": settings}
        for_report["threshold_quantile"] = quantile
        classes_N = [split.test.classes_of(int(sample)) for sample in scored.sample_N]
        telling = most_telling(scored.novel_N, scored.score_N)
        telling |= {f"Of class {name}": places for name, places in by_class(classes_N, scored.score_N).items()}
        every = iter(shown(scored, [place for places in telling.values() for place in places], detector, masks))
        pictures = [list(islice(every, len(places))) for places in telling.values()]  # one pass for the maps of all
        write_report(
            folder / "report.html",
            title=f"{method}: {', '.join(results['known'][:3])}{' ...' if len(results['known']) > 3 else ''}",
            results=for_report,
            novel_N=scored.novel_N,
            score_N=scored.score_N,
            comparisons=comparisons,
            pictures=dict(zip(telling, pictures, strict=True)),
            calibration=detector.calibration,
            classes_N=classes_N,
            log=folder / "log.jsonl",
        )
    accelerator.wait_for_everyone()
    return results


def write_own_card(
    folder: Path,
    method: str,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    split: Split,
    *,
    figures: Mapping[str, Any] | None = None,
    near: Sequence[tuple[float, Image.Image]] = (),
) -> None:
    """The card of a saved detector; see `write_card`."""
    licences = licences_of(split, settings)
    write_card(folder, method=method, results=results, settings=settings, figures=figures, licences=licences, near=near)


def licences_of(split: Split, settings: Mapping[str, Any]) -> dict[str, str]:
    """Of the data and of the weights, as far as their owners tell."""
    return {
        "data": split.train.manifest.licence,
        "weights": licence_of_weights(str(settings.get("teacher") or settings.get("network") or "")),
    }


def near_threshold(scored: Scored, threshold: float | None) -> list[tuple[float, Image.Image]]:
    """The pictures whose scores lie around a threshold, with these, by score."""
    if threshold is None or not len(scored.score_N):
        return []
    rising = np.argsort(scored.score_N, kind="stable")
    middle = int(np.searchsorted(scored.score_N[rising], threshold, side="right"))
    places = rising[max(middle - NEAR, 0) : middle + NEAR].tolist()
    return [(each.score, each.image) for each in shown(scored, places)]


def nearest_scorers(accelerator: Accelerator, bank: Stream, plain: Mapping[str, Features]) -> dict[str, Features]:
    """For each kind of features, the distance of an image to its nearest neighbours among the bank's."""
    neighbours = {name: NearestNeighbours().fit(f) for name, f in collect(accelerator, bank, plain)[1].items()}

    def distance_to_known(name: str, image_B3HW: Tensor) -> Tensor:
        score_B = neighbours[name].score(plain[name](image_B3HW).float().cpu().numpy())
        return torch.from_numpy(score_B).to(accelerator.device)

    return {name: partial(distance_to_known, name) for name in plain}


def further_figures(test: Scored, answer_NA: NDArray[np.float64], classes: Sequence[str]) -> dict[str, Estimate]:
    """Figures that not every run has: of predicted classes, and without images that show none."""
    found: dict[str, Estimate] = {}
    if answer_NA.shape[1] > 1:
        found |= class_figures(test, [classes[int(answer)] for answer in answer_NA[:, 1]])
    shows_any_N = np.array([bool(test.shard_set.classes_of(sample)) for sample in test.sample_N])
    if not shows_any_N.all() and len(set(test.novel_N[shows_any_N].tolist())) == 2:
        found["auroc_annotated"] = auroc(test.novel_N[shows_any_N], test.score_N[shows_any_N])
    return found


def class_figures(test: Scored, answers: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy and OSCR of the classes that a detector says the images show."""
    shown_N = [test.shard_set.classes_of(int(sample)) for sample in test.sample_N]
    is_right_N = np.array([answer in names for answer, names in zip(answers, shown_N, strict=True)])
    accuracy = closed_set_accuracy(is_right_N[~test.novel_N])
    return {"closed_set_accuracy": accuracy, "oscr": oscr(test.novel_N, test.score_N, is_right_N)}


def threshold_rates(threshold: float | None, test: Scored) -> dict[str, float] | None:
    """What the threshold, set on held-out known images, gives on the test split: its shares of errors."""
    if threshold is None:
        return None
    flagged_N = test.score_N > threshold
    return {
        "value": threshold,
        "known_flagged": float(flagged_N[~test.novel_N].mean()),
        "novel_missed": float((~flagged_N[test.novel_N]).mean()),
    }


def pixel_record(
    accelerator: Accelerator,
    detector: ImageDetector,
    split: Split,
    test_N: NDArray[np.int64],
    masks: dict[str, bytes],
    floor: Features | None = None,
) -> dict[str, Any] | None:
    """The figures of the maps' pixels, for results.json; None where there are no masks. The processes share the
    pictures.

    Args:
        floor: the maps (B, h, w) of a predictor that ignores the image, for its figures beside these.
    """
    if not masks:
        return None
    own_N = test_N[accelerator.process_index :: accelerator.num_processes]

    def counted(score_map: Callable[[list[bytes]], Any]) -> PixelCounts:
        known = frozenset(split.protocol.known)
        counts = pixel_counts(score_map, detector.scoring.batch, split.test, own_N, masks, known)
        if accelerator.num_processes == 1:
            return counts
        arrays = torch.from_numpy(counts.arrays()).to(accelerator.device)
        together = PixelCounts()
        together.join(accelerator.reduce(arrays, "sum").cpu().numpy())
        return together

    counts = counted(detector.score_map)
    if (found := counts.estimates()) is None:
        return None
    beside = counted(partial(detector.maps_by, floor)).estimates() if floor else None
    about = {
        "images": counts.images,
        "regions": int(counts.regions_G.sum()),
        "fpr_limit": FPR_LIMIT,
        "prevalence": counts.prevalence,
        "floor": None if beside is None else {name: estimate._asdict() for name, estimate in beside.items()},
    }
    return {name: estimate._asdict() for name, estimate in found.items()} | about


def shown(
    test: Scored, places: list[int], detector: ImageDetector | None = None, masks: Mapping[str, bytes] | None = None
) -> list[Shown]:
    """The pictures at some places of the scores, with their maps where the method has them, and masks."""
    payloads = test.shard_set.read([int(test.sample_N[place]) for place in places])
    images = [Picture(payload).rgb() for payload in payloads]
    found = detector.score_map(images) if detector else None
    maps = [None] * len(images) if found is None else list(found)
    return [
        Shown(
            key=test.shard_set.key(test.sample_N[place]),
            classes=test.shard_set.classes_of(test.sample_N[place]),
            novel=bool(test.novel_N[place]),
            score=float(test.score_N[place]),
            image=image,
            score_map_hw=map_hw,
            mask_HW=None if encoded is None else mask_of(encoded),
        )
        for place, image, map_hw in zip(places, images, maps, strict=True)
        for encoded in [(masks or {}).get(test.shard_set.key(test.sample_N[place]))]
    ]
