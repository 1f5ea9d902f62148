"""The report beyond its figures: classes, the threshold's promises, p-values, the course of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from bigtrain.detectors.calibration import Calibration
from bigtrain.evaluation.intervals import Bools, Floats, resampled_counts, share_interval
from bigtrain.evaluation.metrics import auroc
from bigtrain.evaluation.report.charts import band_chart, course_chart

RESAMPLES = 200  # for a band
GRID = np.linspace(0, 1, 101)
MOST_CLASSES = 200  # of the table
MOST_POINTS = 400  # of a training curve


def bands(novel_N: Bools, score_N: Floats, *, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % bands of the ROC and the precision-recall curve, by a stratified bootstrap over images: two (P, 3), of x,
    low and high. x: share of known flagged; share of novel found."""
    roc_RP, precision_RP = [], []
    for known_RG, novel_RG in resampled_counts(novel_N, score_N, seed, RESAMPLES):
        for known_G, its_novel_G in zip(known_RG.cumsum(axis=1), novel_RG.cumsum(axis=1), strict=True):
            fpr_G, tpr_G = known_G / known_G[-1], its_novel_G / its_novel_G[-1]
            roc_RP.append(np.interp(GRID, np.append(0, fpr_G), np.append(0, tpr_G)))
            first_P = np.searchsorted(tpr_G, GRID - 1e-12).clip(max=len(tpr_G) - 1)
            precision_RP.append(its_novel_G[first_P] / np.maximum(its_novel_G[first_P] + known_G[first_P], 1))
    return tuple(  # type: ignore[return-value]
        np.stack([GRID, *np.quantile(np.stack(values), [0.025, 0.975], axis=0)], axis=1)
        for values in (roc_RP, precision_RP)
    )


def precision_points(novel_N: Bools, score_N: Floats, *, most: int = 500) -> NDArray[np.float64]:
    """(share of novel found, precision) at each score, from the highest, thinned to `most` points: (P, 2)."""
    order_N = np.argsort(-score_N, kind="stable")
    is_last_N = np.append(np.diff(score_N[order_N]) != 0, True)  # of equal scores
    found_N, flagged_N = novel_N[order_N].cumsum(), np.arange(1, len(score_N) + 1)
    points = np.stack([found_N / found_N[-1], found_N / flagged_N], axis=1)[is_last_N]
    kept = np.unique(np.linspace(0, len(points) - 1, most).astype(int))
    return points[kept]


def class_rows(
    classes_N: Sequence[Sequence[str]], novel_N: Bools, score_N: Floats, threshold: float | None
) -> list[list[str]]:
    """For each class: kind, pictures, AUROC against the other kind, the share that the threshold gets wrong; the worst
    first. A picture counts for each class that it shows."""
    places: dict[str, list[int]] = {}
    for place, names in enumerate(classes_N):
        for name in names or ("no class",):
            places.setdefault(name, []).append(place)
    rows: list[tuple[float, list[str]]] = []
    for name, its in places.items():
        for is_novel in (False, True):
            own_M = np.array([place for place in its if novel_N[place] == is_novel], int)
            if not len(own_M):
                continue
            other_N = np.flatnonzero(novel_N != is_novel)
            both_N = np.concatenate([own_M, other_N])
            value = apart(novel_N[both_N], score_N[both_N])
            cells = [name, "novel" if is_novel else "known", str(len(own_M)), f"{100 * value:.1f}"]
            if threshold is not None:
                wrong = int(((score_N[own_M] > threshold) != is_novel).sum())
                low, high = (100 * end for end in share_interval(wrong, len(own_M)))
                what = "missed" if is_novel else "false alarms"
                cells.append(f"{100 * wrong / len(own_M):.1f} % {what} ({low:.1f} to {high:.1f})")
            rows.append((value, cells))
    rows.sort(key=lambda row: (row[0], row[1]))
    return [cells for _, cells in rows[:MOST_CLASSES]]


def apart(novel_N: Bools, score_N: Floats) -> float:
    """AUROC; 1/2 where all scores are equal."""
    return 0.5 if score_N.min() == score_N.max() else auroc(novel_N, score_N).value


def threshold_rows(
    calibration: Calibration, threshold: float | None, quantile: float | None, novel_N: Bools, score_N: Floats
) -> list[list[str]]:
    """What was wanted of the threshold, what so many held-out pictures promise, and what it gave on the test split."""
    if threshold is None:
        return []
    rows = []
    if quantile is not None:
        rows.append(["wanted: known pictures flagged", f"{100 * (1 - quantile):.3g} %"])
    promised = calibration.threshold(threshold)
    if promised.low is not None and promised.high is not None:
        rows.append(
            [
                f"promised by {len(calibration)} held-out pictures (95 % interval)",
                f"{100 * promised.low:.2g} to {100 * promised.high:.2g} %",
            ]
        )
    for is_novel, what in ((False, "given: known test pictures flagged"), (True, "given: novel test pictures missed")):
        of_kind = score_N[novel_N == is_novel]
        wrong = int(((of_kind > threshold) != is_novel).sum())
        low, high = (100 * end for end in share_interval(wrong, len(of_kind)))
        rows.append([what, f"{wrong} of {len(of_kind)}: {100 * wrong / len(of_kind):.1f} % ({low:.1f} to {high:.1f})"])
    return rows


def p_value_chart(calibration: Calibration, novel_N: Bools, score_N: Floats) -> Markup | None:
    """How often known test pictures have a p-value of at most a, against a: on or below the diagonal where they come as
    the held-out ones did. The band is what so many pictures leave open."""
    if not len(calibration):
        return None
    p_M = np.sort(calibration.p_values(score_N[~novel_N]))
    share_P = np.searchsorted(p_M, GRID, side="right") / len(p_M)
    points = np.stack([GRID, share_P], axis=1)
    ends = np.array([share_interval(round(share * len(p_M)), len(p_M)) for share in share_P])
    return band_chart(
        {"known test pictures": points}, np.column_stack([GRID, ends.clip(0, 1)]), has_diagonal=True,
        x_label="p-value a", y_label="share of known with p ≤ a", described="Calibration of p-values",
    )  # fmt: skip


def course(log: Path) -> list[tuple[str, Markup, str]]:
    """For each stage of log.jsonl its name, a chart of the loss, and how long it waited for data."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(entry, dict) and isinstance(entry.get("loss"), float | int):
            stages.setdefault(str(entry.get("stage", "")), []).append(entry)
    found = []
    for name, entries in stages.items():
        points = np.array([[float(entry["step"]), float(entry["loss"])] for entry in entries])
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) < 2:
            continue
        kept = np.unique(np.linspace(0, len(points) - 1, MOST_POINTS).astype(int))
        waits = [float(entry["data_wait_percent"]) for entry in entries if "data_wait_percent" in entry]
        rates = [float(entry["images_per_s"]) for entry in entries if "images_per_s" in entry]
        said = f"{np.mean(waits):.0f} % of the time waiting for data" if waits else ""
        said += f"{', ' if said else ''}{np.median(rates):.3g} images/s" if rates else ""
        found.append(
            (name, course_chart(points[kept], x_label="step", y_label="loss", described=f"Loss of {name}"), said)
        )
    return found


def by_class(classes_N: Sequence[Sequence[str]], score_N: Floats, *, classes: int = 12) -> dict[str, list[int]]:
    """For each of the first classes the places of its two most and its two least novel pictures, by score."""
    names = sorted({name for its in classes_N for name in its})[:classes]
    found = {}
    for name in names:
        own = np.array([place for place, its in enumerate(classes_N) if name in its])
        rising = own[np.argsort(score_N[own], kind="stable")]
        found[name] = list(dict.fromkeys([*rising[::-1][:2].tolist(), *rising[:2][::-1].tolist()]))
    return found


PIXELS = {"auroc": "pixel AUROC", "ap": "pixel AP", "f1_max": "F1-max", "aupro": "AUPRO"}


def pixel_rows(pixels: Mapping[str, Any] | None) -> list[list[str]]:
    """Figures of the maps against masks."""
    if not pixels:
        return []

    def cell(its: Mapping[str, float]) -> str:
        return f"{100 * its['value']:.1f} ({100 * its['low']:.1f} to {100 * its['high']:.1f})"

    beside = pixels.get("floor")
    rows = [
        [heading, cell(pixels[name]) + (f"\nignoring the picture: {cell(beside[name])}" if beside else "")]
        for name, heading in PIXELS.items()
    ]
    rows[-1][0] += f", up to {100 * pixels['fpr_limit']:g} % of good pixels"
    rows.append(
        ["by chance: AUROC, AP, AUPRO", f"50.0, {100 * pixels['prevalence']:.1f}, {50 * pixels['fpr_limit']:.1f}"]
    )
    return [*rows, ["pictures, regions of defects", f"{pixels['images']}, {pixels['regions']}"]]
