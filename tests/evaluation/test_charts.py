"""The report's charts show the numbers that they are given."""

import re

import numpy as np
import pytest
from sklearn.metrics import auc, roc_auc_score, roc_curve

from bigtrain.evaluation.report.charts import (
    Frame,
    histogram,
    histogram_chart,
    roc_chart,
    roc_points,
    tick_labels,
    ticks,
)


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw scores of known and, one higher, of novel images."""
    rng = np.random.default_rng(seed)
    novel_N = rng.random(count) < 0.4
    return novel_N, rng.normal(size=count) + novel_N


@pytest.mark.parametrize("count", [20, 600, 20_000])
def test_roc_points(count):
    """ROC points start and end where scikit-learn's do, are few, and keep the area under the curve."""
    novel_N, score_N = drawn(count)
    points = roc_points(novel_N, score_N)
    fpr_T, tpr_T, _ = roc_curve(novel_N, score_N)
    assert points[0].tolist() == [fpr_T[0], tpr_T[0]] == [0, 0]
    assert points[-1].tolist() == [fpr_T[-1], tpr_T[-1]] == [1, 1]
    assert len(points) <= 500
    assert (np.diff(points, axis=0) >= 0).all()
    assert auc(*points.T) == pytest.approx(roc_auc_score(novel_N, score_N), abs=2e-3)


def test_histogram_counts_every_score():
    novel_N, score_N = drawn(1000)
    counts = histogram(novel_N, score_N)
    assert counts.known.sum() == (~novel_N).sum()
    assert counts.novel.sum() == novel_N.sum()
    assert (counts.edges[0], counts.edges[-1], counts.open_ended) == (score_N.min(), score_N.max(), False)


def test_histogram_outliers():
    """A few extreme scores do not squeeze the histogram and are counted in its outer bins."""
    novel_N, score_N = drawn(1000)
    score_N[:3] = [-1e6, 1e6, 1e6]
    counts = histogram(novel_N, score_N)
    assert counts.open_ended
    assert -6 < counts.edges[0] < -1 and 2 < counts.edges[-1] < 7
    assert counts.known.sum() + counts.novel.sum() == 1000
    assert counts.known[-1] + counts.novel[-1] >= 2


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.031, 0.012, ["-0.03", "-0.02", "-0.01", "0", "0.01"]),
        (-3.4, 7.9, ["-2", "0", "2", "4", "6"]),
        (0, 2.1e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (980, 1022, ["980", "990", "1000", "1010", "1020"]),
        (0, 1.6e6, ["0", "5e5", "1e6", "1.5e6"]),
    ],
)
def test_tick_labels(low, high, labels):
    """Ticks are round numbers, written with the digits they need."""
    found = tick_labels(ticks(low, high))
    assert [float(label) for label in found] == [float(label) for label in labels]
    assert all(len(label) <= 7 for label in found)


def test_ticks_far_from_zero():
    """Ticks far from zero stay distinct."""
    found = tick_labels(ticks(123456.7, 123456.9))
    assert len(set(found)) == len(found) >= 3


def test_frame_origin():
    """The frame puts the origin at the lower left."""
    frame = Frame(x_range=(0, 2), y_range=(0, 1))
    assert (frame.x(0), frame.y(0)) == (frame.left, frame.height - frame.bottom)
    assert (frame.x(2), frame.y(1)) == (frame.width - frame.right, frame.top)


def test_names_in_a_chart_are_escaped():
    chart = str(roc_chart({"<b>&": np.array([[0.0, 0.0], [1.0, 1.0]])}))
    assert "<b>" not in chart
    assert "&lt;b&gt;&amp;" in chart


def test_histogram_shares():
    """The histogram's bars are shares of their own class."""
    # ten known at 0, one novel at 1: both bars are 100 % high, so their tops lie at the same height
    novel_N = np.array([False] * 10 + [True])
    counts = histogram(novel_N, novel_N.astype(float))
    known, novel = re.findall(
        r'<polygon class="area \w+" points="([^"]*)"', str(histogram_chart(counts, threshold=None))
    )
    tops = [min(float(point.split(",")[1]) for point in points.split()) for points in (known, novel)]
    assert tops[0] == tops[1]


def test_threshold_drawn():
    """The threshold is drawn only where it lies in the range."""
    counts = histogram(*drawn(100))
    assert 'class="threshold"' in str(histogram_chart(counts, threshold=0.5))
    assert 'class="threshold"' not in str(histogram_chart(counts, threshold=50))
    assert 'class="threshold"' not in str(histogram_chart(counts, threshold=None))
