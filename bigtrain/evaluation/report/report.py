"""One self-contained HTML page that shows whether to trust a detector: figures, curves, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from numpy.typing import ArrayLike

from bigtrain.detectors.calibration import Calibration
from bigtrain.evaluation.intervals import Bools
from bigtrain.evaluation.metrics import IN_REPORT, Floats, checked
from bigtrain.evaluation.report.charts import SERIES, band_chart, histogram, histogram_chart, roc_chart, roc_points
from bigtrain.evaluation.report.overlays import (
    HEAT,
    Scale,
    Shown,
    overlay,
    page_image,
    picture_fields,
    rgb,
    shared_scale,
)
from bigtrain.evaluation.report.sections import (
    bands,
    class_rows,
    course,
    p_value_chart,
    pixel_rows,
    precision_points,
    threshold_rows,
)
from bigtrain.files import write_text
from bigtrain.pages import template

EXPLAINED = ("explained", "explained_novel")
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    path: Path,
    *,
    title: str,
    results: Mapping[str, Any],
    novel_N: ArrayLike,
    score_N: ArrayLike,
    comparisons: Mapping[str, tuple[ArrayLike, Mapping[str, Any]]],
    pictures: Mapping[str, Sequence[Shown]],
    calibration: Calibration = Calibration(),  # noqa: B008  # it is frozen
    classes_N: Sequence[Sequence[str]] = (),
    log: Path | None = None,
) -> None:
    """Write the report to `path`, whole or not at all.

    Args:
        results: "metrics" (the detector's `metrics.summary`), and where they are known "detector" (its name),
            "dataset", "known" and "novel" (class names), "seed", "threshold" (scores above it are flagged), "explained"
            and "explained_novel" (`metrics.explained` of held-out known and of novel images), "settings".
        novel_N, score_N: whether an image is novel, and the detector's score of it, raw, higher = more novel.
        comparisons: what the detector must beat, name -> (its scores of the same images, their summary).
        pictures: section title -> pictures, in the order in which they are shown; see `overlays.most_telling`.
        calibration: the held-out scores, for what the threshold and the p-values promise.
        classes_N: what each image shows, for the table by class; empty: not told.
        log: log.jsonl of the run, for the course of its training.
    """
    detector = str(results.get("detector", "detector"))
    if detector in comparisons:
        raise ValueError(f"a comparison is called {detector!r} like the detector: the table needs distinct names")
    novel, score = checked(novel_N, score_N)
    summaries = {detector: results["metrics"]} | {name: found for name, (_, found) in comparisons.items()}
    scores = {detector: score} | {name: checked(novel, its_N)[1] for name, (its_N, _) in comparisons.items()}
    threshold = results.get("threshold")
    scale = shared_scale(picture for section in pictures.values() for picture in section)
    auroc = {name: found["auroc"]["value"] for name, found in summaries.items()}
    roc_band, precision_band = bands(novel, score, seed=int(results.get("seed", 0)))
    page = template(TEMPLATE).render(
        title=title,
        protocol=protocol_line(results, novel),
        rows=table_rows(summaries),
        figures=IN_REPORT,
        prevalence={name: results["metrics"][name].get("prevalence") for name in IN_REPORT},
        bootstrap=results["metrics"].get("bootstrap"),
        by_chance=summaries[detector]["auroc"]["low"] <= 0.5 <= summaries[detector]["auroc"]["high"],
        better=[name for name in comparisons if auroc[name] >= auroc[detector]],
        roc=roc_chart({name: roc_points(novel, its_N) for name, its_N in scores.items()}, roc_band),
        precision=precision_chart(novel, scores, precision_band),
        **beyond(results, novel, score, calibration, classes_N, log),
        legend=[(number % SERIES, name, auroc[name]) for number, name in enumerate(scores)],
        histogram=histogram_chart(histogram(novel, score), threshold=threshold),
        histogram_counts=histogram(novel, score),
        **{name: {end: percent(its) for end, its in results.get(name, {}).items()} for name in EXPLAINED},
        threshold=threshold,
        threshold_rates=rates_at(threshold, novel, score),
        sections={name: [card(picture, scale, threshold) for picture in section] for name, section in pictures.items()},
        scale=scale,
        heat=HEAT,
        settings=flattened(results.get("settings", {})),
    )
    write_text(path, page)


def precision_chart(novel_N: Bools, scores: Mapping[str, Floats], band_P3: Floats) -> Markup:
    curves = {name: precision_points(novel_N, its_N) for name, its_N in scores.items()}
    return band_chart(
        curves, band_P3, x_label="novel found (recall)", y_label="novel among flagged (precision)",
        described="Precision-recall curves",
    )  # fmt: skip


def beyond(
    results: Mapping[str, Any],
    novel_N: Bools,
    score_N: Floats,
    calibration: Calibration,
    classes_N: Sequence[Sequence[str]],
    log: Path | None,
) -> dict[str, Any]:
    """What the page has beyond figures and curves; see `sections`."""
    threshold, quantile = results.get("threshold"), results.get("threshold_quantile")
    return {
        "class_rows": class_rows(classes_N, novel_N, score_N, threshold),
        "threshold_rows": threshold_rows(calibration, threshold, quantile, novel_N, score_N),
        "pixel_rows": pixel_rows(results.get("pixels")),
        "p_values": p_value_chart(calibration, novel_N, score_N),
        "course": course(log) if log else [],
    }


def protocol_line(results: Mapping[str, Any], novel_N: Bools) -> list[tuple[str, str]]:
    """Return what was judged as (name, text): dataset, known and novel classes with counts, seed; as far as given."""
    line = [("dataset", str(results["dataset"]))] if "dataset" in results else []
    for kind, count in (("known", int((~novel_N).sum())), ("novel", int(novel_N.sum()))):
        classes = ", ".join(str(name) for name in results.get(kind, ()))
        images = f"{count:,} image{'' if count == 1 else 's'}".replace(",", " ")
        line.append((kind, f"{classes} ({images})" if classes else images))
    if "seed" in results:
        line.append(("seed", str(results["seed"])))
    return line


def table_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return one row a method, each cell with value and interval in percent, and whether it is the column's best."""
    rows = []
    for method, found in summaries.items():
        cells = []
        for name, figure in IN_REPORT.items():
            values = [other[name]["value"] for other in summaries.values()]
            best = len(values) > 1 and found[name]["value"] == (max(values) if figure.more_is_better else min(values))
            cells.append(
                {"heading": figure.heading, "arrow": "↑" if figure.more_is_better else "↓", "best": best}
                | {end: percent(found[name][end]) for end in ("value", "low", "high")}
            )
        rows.append((method, cells))
    return rows


def percent(share: float) -> str:
    """Write a share in percent, with as many digits as a person compares; never round up to a perfect 100."""
    written = f"{100 * share:.1f}"
    return "99.9" if written == "100.0" and share < 1 else written


def rates_at(threshold: float | None, novel_N: Bools, score_N: Floats) -> tuple[str, str] | None:
    """Return the shares of known and of novel flagged at the threshold, in percent."""
    if threshold is None:
        return None
    flagged_N = score_N > threshold
    return percent(float(flagged_N[~novel_N].mean())), percent(float(flagged_N[novel_N].mean()))


def card(picture: Shown, scale: Scale | None, threshold: float | None) -> dict[str, Any]:
    """Return what the page shows of a picture; `error` where the threshold puts it on the wrong side."""
    image = rgb(picture.image)
    with_map = None
    if picture.score_map_hw is not None and scale is not None:
        with_map = page_image(overlay(image, picture.score_map_hw, scale, picture.mask_HW))
    error = ""
    if threshold is not None and picture.novel != (picture.score > threshold):
        error = "missed" if picture.novel else "false alarm"
    return picture_fields(image, picture.key, picture.classes) | {
        "novel": picture.novel,
        "score": f"{picture.score:.4g}",
        "error": error,
        "overlay": with_map,
    }


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, value as JSON, text as it is)."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows
