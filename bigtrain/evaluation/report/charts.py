"""The report's two charts as inline SVG: the ROC curves, and the histogram of scores.

Colours come from the page's CSS (`series-0` is the detector, `series-1` .. the comparisons; `known`, `novel`), so that
the charts follow its light and dark theme. Every text goes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from bigtrain.evaluation.intervals import Bools
from bigtrain.evaluation.metrics import Floats

SERIES = 6  # colours and dashes in the page's CSS; more comparisons start again from the first


@dataclass(frozen=True)
class Frame:
    """A plot area inside an SVG of `width` x `height`, and the data range that it shows."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 440
    height: int = 380
    left: int = 60
    right: int = 24
    top: int = 12
    bottom: int = 50

    def x(self, value: float) -> float:
        """Return the SVG x of a value on the horizontal axis."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Return the SVG y of a value on the vertical axis."""
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def points(self, points_P2: Floats) -> str:
        """Return points as an SVG list of coordinates."""
        return " ".join(f"{self.x(x):.2f},{self.y(y):.2f}" for x, y in points_P2)


class Histogram(NamedTuple):
    """Counts of known and novel scores in shared bins."""

    edges: Floats
    known: NDArray[np.int64]
    novel: NDArray[np.int64]
    open_ended: bool  # the first and last bin also count what lies beyond


def roc_points(novel_N: Bools, score_N: Floats, *, most: int = 500) -> Floats:
    """Return at most `most` points (share of known flagged, share of novel found) of the ROC curve, both ends kept.

    Points are thinned evenly along the curve, by fpr + tpr, which grows from 0 to 2.
    """
    fpr_T, tpr_T, _ = roc_curve(novel_N, score_N)
    points = np.stack([fpr_T, tpr_T], axis=1)
    if len(points) <= most:
        return points
    kept = np.unique(np.searchsorted(points.sum(axis=1), np.linspace(0, 2, most) - 1e-9).clip(max=len(points) - 1))
    kept[0], kept[-1] = 0, len(points) - 1
    return points[kept]


def histogram(novel_N: Bools, score_N: Floats) -> Histogram:
    """Count known and novel scores in 12 to 40 shared bins.

    Where a few extreme scores would squeeze all the others into one corner, the range is that of the middle 98 % with
    a margin, and the outer bins also count what lies beyond: every score is counted.
    """
    low, high = float(score_N.min()), float(score_N.max())
    middle_low, middle_high = np.quantile(score_N, [0.01, 0.99])
    margin = 0.25 * (middle_high - middle_low)
    open_ended = bool(margin > 0 and high - low > 3 * (middle_high - middle_low))
    if open_ended:
        low, high = max(low, float(middle_low - margin)), min(high, float(middle_high + margin))
    bins = int(np.clip(math.sqrt(len(score_N)), 12, 40))
    edges = np.linspace(low, high, bins + 1)
    clipped_N = score_N.clip(low, high)
    known, novel = (np.histogram(clipped_N[mask_N], bins=edges)[0] for mask_N in (~novel_N, novel_N))
    return Histogram(edges, known, novel, open_ended)


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Return round numbers within low .. high: steps of 1, 2 or 5 times a power of ten, roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Write ticks with as many digits as tell them apart, and no more: 0, 0.05, 0.1 and not 0.05000000000000001."""
    if not values:
        return []
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    largest = max(abs(value) for value in values)
    if largest >= 1e5 or largest < 1e-3:
        digits = max(0, math.floor(math.log10(largest or 1)) - math.floor(math.log10(step) + 1e-9))
        return [
            "0" if value == 0 else f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e") for value in values
        ]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:.{decimals}f}" if value else "0" for value in values]


def axes(frame: Frame, *, x_label: str, y_label: str, percent: tuple[bool, bool]) -> Markup:
    """Draw grid lines, ticks and the labels of both axes; `percent` says of x and y whether 1 is written as 100 %."""
    parts = []
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for is_x, (low, high), is_percent in zip((True, False), (frame.x_range, frame.y_range), percent, strict=True):
        values = ticks(low, high)
        labels = tick_labels([100 * value for value in values] if is_percent else values)
        for value, label in zip(values, labels, strict=True):
            x, y = frame.x(value), frame.y(value)
            x1, y1, x2, y2 = (x, frame.top, x, bottom) if is_x else (frame.left, y, right, y)
            label_x, label_y = (x, bottom + 17.0) if is_x else (frame.left - 7.0, y + 4)
            parts.append(
                Markup(
                    '<line class="grid" x1="{:.2f}" y1="{:.2f}" x2="{:.2f}" y2="{:.2f}"/>'
                    '<text class="{}" x="{:.2f}" y="{:.2f}">{}</text>'
                ).format(
                    *(x1, y1, x2, y2),
                    *("x-tick" if is_x else "y-tick", label_x, label_y, label + (" %" if is_percent else "")),
                )
            )
    middle_x, middle_y = (frame.left + right) / 2, (frame.top + bottom) / 2
    parts.append(
        Markup(
            '<text class="label" x="{0:.2f}" y="{1}">{2}</text>'
            '<text class="label" transform="translate(13 {3:.2f}) rotate(-90)">{4}</text>'
        ).format(middle_x, frame.height - 8, x_label, middle_y, y_label)
    )
    return Markup("").join(parts)


def svg(frame: Frame, content: Markup, *, description: str) -> Markup:
    """Wrap a chart's content, with a description for those who cannot see it."""
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        frame.width, frame.height, description, content
    )


def roc_chart(curves: Mapping[str, Floats], band_P3: Floats | None = None) -> Markup:
    """Draw ROC curves by name, the first of them (the detector) on top, with its band."""
    return band_chart(
        curves, band_P3, has_diagonal=True, x_label="known flagged (false positives)",
        y_label="novel found (true positives)", described="ROC curves",
    )  # fmt: skip


def curve_chart(curves: Mapping[str, Floats], *, x_label: str) -> Markup:
    """Draw shares over steps by name, each named at its end."""
    last = max(float(points_P2[-1, 0]) for points_P2 in curves.values())
    frame = Frame(x_range=(0, max(1.0, last)), y_range=(0, 1), width=560, height=360, right=150)
    lines = []
    for number, (name, points_P2) in enumerate(curves.items()):
        x, y = frame.x(points_P2[-1, 0]) + 6, frame.y(points_P2[-1, 1]) + 4
        lines.append(
            Markup(
                '<polyline class="curve series-{0}" points="{1}"><title>{2}</title></polyline>'
                '<text class="curve-name" x="{3:.2f}" y="{4:.2f}">{2}</text>'
            ).format(number % SERIES, frame.points(points_P2), name, x, y)
        )
    grid = axes(frame, x_label=x_label, y_label="share of pictures", percent=(False, True))
    return svg(frame, grid + Markup("").join(lines), description="Course of " + ", ".join(curves))


def histogram_chart(counts: Histogram, *, threshold: float | None) -> Markup:
    """Draw the share of known and of novel images in each bin, and the threshold if it lies in the range."""
    share_of_known, share_of_novel = counts.known / counts.known.sum(), counts.novel / counts.novel.sum()
    highest = 1.05 * float(max(share_of_known.max(), share_of_novel.max()))
    low, high = float(counts.edges[0]), float(counts.edges[-1])
    frame = Frame(x_range=(low, high), y_range=(0, highest), height=430)
    areas = []
    for name, share in (("known", share_of_known), ("novel", share_of_novel)):
        steps_P2 = np.stack([np.repeat(counts.edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]])], axis=1)
        areas.append(
            Markup('<polygon class="area {0}" points="{1}"><title>{0}</title></polygon>').format(
                name, frame.points(steps_P2)
            )
        )
    if threshold is not None and low <= threshold <= high:
        areas.append(
            Markup(
                '<line class="threshold" x1="{0:.2f}" y1="{1}" x2="{0:.2f}" y2="{2}"><title>threshold</title></line>'
            ).format(frame.x(threshold), frame.top, frame.height - frame.bottom)
        )
    grid = axes(frame, x_label="novelty score", y_label="share of known, of novel", percent=(False, True))
    description = "Histogram of novelty scores, known and novel images apart"
    return svg(frame, grid + Markup("").join(areas), description=description)


def band_chart(
    curves: Mapping[str, Floats],
    band_P3: Floats | None,
    *,
    x_label: str,
    y_label: str,
    described: str,
    has_diagonal: bool = False,
) -> Markup:
    """Draw curves of shares by name, the first on top, and the band of the first: (P, 3), of x, low and high."""
    frame = Frame(x_range=(0, 1), y_range=(0, 1), height=430)
    parts = []
    if band_P3 is not None:
        around = np.concatenate([band_P3[:, [0, 1]], band_P3[::-1][:, [0, 2]]])
        parts.append(Markup('<polygon class="band" points="{}"/>').format(frame.points(around)))
    if has_diagonal:
        parts.append(
            Markup('<line class="chance" x1="{:.2f}" y1="{:.2f}" x2="{:.2f}" y2="{:.2f}"/>').format(
                frame.x(0), frame.y(0), frame.x(1), frame.y(1)
            )
        )
    for number, (name, points_P2) in reversed(list(enumerate(curves.items()))):
        parts.append(
            Markup('<polyline class="curve series-{}" points="{}"><title>{}</title></polyline>').format(
                number % SERIES, frame.points(points_P2), name
            )
        )
    grid = axes(frame, x_label=x_label, y_label=y_label, percent=(True, True))
    return svg(frame, grid + Markup("").join(parts), description=f"{described}: {', '.join(curves)}")


def course_chart(points_P2: Floats, *, x_label: str, y_label: str, described: str) -> Markup:
    """Draw one value over steps."""
    low, high = float(points_P2[:, 1].min()), float(points_P2[:, 1].max())
    margin = 0.05 * (high - low) or 0.5
    frame = Frame(
        x_range=(0, max(1.0, float(points_P2[-1, 0]))), y_range=(low - margin, high + margin), width=560, height=260
    )
    line = Markup('<polyline class="curve series-0" points="{}"/>').format(frame.points(points_P2))
    return svg(
        frame, axes(frame, x_label=x_label, y_label=y_label, percent=(False, False)) + line, description=described
    )
