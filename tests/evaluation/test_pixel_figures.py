"""Figures of pixels: by brute force on small maps, by scikit-learn, by hand."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from bigtrain.evaluation.pixel_figures import PixelCounts, at_size, outline


def some_maps(seed, count=6, side=24):
    """Maps in which defects score higher, a map without a defect, and one with two regions that touch at a corner."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), bool)
    for number in range(1, count):
        for _ in range(int(rng.integers(1, 4))):
            top, left = rng.integers(0, side - 6, 2)
            masks[number, top : top + rng.integers(1, 6), left : left + rng.integers(1, 6)] = True
    masks[1] = False
    masks[1, 2:4, 2:4] = masks[1, 4:6, 4:6] = True
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    return np.round(maps, 1), masks  # with ties


def brute_aupro(maps, masks, limit=0.3):
    regions = []
    for map_HW, mask_HW in zip(maps, masks, strict=True):
        number_HW, count = ndimage.label(mask_HW, np.ones((3, 3)))
        regions += [map_HW[number_HW == number] for number in range(1, count + 1)]
    good = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        points.append(((good >= threshold).mean(), np.mean([(region >= threshold).mean() for region in regions])))
    x, y = np.array(points).T
    grid = np.append(x[x <= limit], limit)
    return np.trapezoid(np.append(y[x <= limit], np.interp(limit, x, y)), grid) / limit


@pytest.mark.parametrize("seed", range(4))
def test_by_brute_force(seed):
    """All four figures equal those of a reference, or of a loop over all thresholds."""
    maps, masks = some_maps(seed)
    counts = PixelCounts()
    for map_HW, mask_HW in zip(maps, masks, strict=True):
        counts.add(map_HW, mask_HW)
    found = counts.figures()
    truth, score = masks.ravel(), maps.ravel()
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
    assert found["ap"] == pytest.approx(average_precision_score(truth, score), abs=1e-9)
    best = max(f1_score(truth, score >= threshold) for threshold in np.unique(score))
    assert found["f1_max"] == pytest.approx(best, abs=1e-9)
    assert found["aupro"] == pytest.approx(brute_aupro(maps, masks), abs=1e-9)


def test_by_hand():
    """Of four pixels the two highest are the defect: perfect. The other way round: nothing is found until all are."""
    mask = np.array([[True, True], [False, False]])
    for map_HW, expected in (
        (np.array([[4.0, 3], [2, 1]]), (1, 1, 1, 1)),
        (np.array([[1.0, 2], [3, 4]]), (0, None, None, 0)),
    ):
        counts = PixelCounts()
        counts.add(map_HW, mask)
        found = counts.figures()
        assert (found["auroc"], found["aupro"]) == (expected[0], expected[3])
    # the lowest score of all flags everything: precision 1/2, recall 1
    assert found["f1_max"] == pytest.approx(2 / 3)
    assert found["ap"] == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)


def test_learnt_nothing():
    """Constant maps: AUROC 1/2, AP the share of defective pixels, AUPRO half of the limit."""
    counts = PixelCounts()
    mask = np.zeros((10, 10), bool)
    mask[:2, :5] = True
    counts.add(np.full((10, 10), 0.3), mask)
    found = counts.figures()
    assert found["auroc"] == pytest.approx(0.5) and found["ap"] == pytest.approx(0.1)
    assert found["aupro"] == pytest.approx(0.15)


def test_counts_add_up():
    """Two processes' counts together are those of one."""
    maps, masks = some_maps(7)
    one, parts = PixelCounts(), [PixelCounts(), PixelCounts()]
    for number, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
        one.add(map_HW, mask_HW)
        parts[number % 2].add(map_HW, mask_HW)
    parts[0].join(parts[1].arrays())
    assert parts[0].figures() == pytest.approx(one.figures())


def test_intervals():
    """The jackknife's interval holds the figure, and narrows with more pictures; one picture says nothing."""
    widths = []
    for count in (1, 20, 80):
        counts = PixelCounts()
        for number, (map_HW, mask_HW) in enumerate(zip(*some_maps(3, count + 1), strict=True)):
            if number:
                counts.add(map_HW, mask_HW, number)
        found = counts.estimates()
        assert all(its.low <= its.value <= its.high for its in found.values())
        widths.append(found["auroc"].high - found["auroc"].low)
    assert widths[0] > widths[1] > widths[2]


def test_near_scores_keep_their_order():
    """Scores are told apart from a two-thousandth on, negative ones and zeros too."""
    values = np.array([-1.0, -0.999, -1e-8, 0.0, 1e-8, 1.0, 1.001], np.float32)
    for low, high in pairwise(values):
        counts = PixelCounts()
        counts.add(np.array([[low, high]]), np.array([[False, True]]))
        assert counts.figures()["auroc"] == 1, (low, high)


def test_bad_maps():
    counts = PixelCounts()
    with pytest.raises(ValueError, match=r"a mask of \(2, 2\) was given for a map of \(3, 3\)"):
        counts.add(np.zeros((3, 3)), np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="no rank"):
        counts.add(np.full((2, 2), np.nan), np.zeros((2, 2), bool))
    assert counts.figures() is None


def test_map_at_picture_size():
    """Between the centres of the patches it is linear; its ends are flat."""
    large = at_size(np.array([[0.0, 1.0]]), 2, 8)
    assert large.shape == (2, 8) and large[0].tolist() == pytest.approx([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])


def test_outline():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    assert outline(mask).sum() == 16 and not outline(mask)[3, 3]
