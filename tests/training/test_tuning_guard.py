"""What stops a tuning, and the two views that pictures are told apart by."""

import numpy as np
import pytest
import torch

from bigtrain.training.feature_look import first_view, second_view
from bigtrain.training.patch_pictures import Seen, component_pictures, nearest_patches
from bigtrain.training.tuning_guard import collapse


def row(rank=10.0, pairs=0.5, knn=None, spread=-1.0):
    return {"rank": rank, "spread": spread, "pair_agreement": {"value": pairs}} | (
        {} if knn is None else {"knn": {"value": knn}}
    )


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (row(), ""),
        (row(rank=5.1, pairs=0.41), ""),
        (row(rank=4.9), "the rank of the features fell from 10.0 to 4.9"),
        (row(pairs=0.39), "pictures that find their other view fell from 50.0 to 39.0 %"),
        (row(knn=0.55), "pictures that kNN tells right fell from 70.0 to 55.0 %"),
        (row(rank=0, spread=None), "the features are NaN or infinite"),
    ],
)
def test_collapse(now, why):
    """A fall beyond the threshold has a reason, anything less has none."""
    found = collapse(row(knn=0.7), {"knn": {"value": 0.7}, **now}, 0.1)
    assert found.startswith(why) and bool(found) == bool(why)


def test_views():
    """The first view is the upper left, the second the mirrored, grey lower right; both keep size and type."""
    image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    image[:, 0, :2] = 200  # the two upper rows are red
    first, second = first_view(image), second_view(image)
    assert first.shape == second.shape == image.shape and first.dtype == second.dtype == torch.uint8
    assert first[0, 0, 0].min() > 150 and not first[0, 1].any()
    assert not second.any()  # the two upper rows are cut off
    image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    image[:, 2, :, 8:] = 90
    second = second_view(image)
    assert torch.equal(second[:, 0], second[:, 1]) and second[0, 0, 5, 0] == 30 and second[0, 0, 5, 9] == 0


def test_components():
    """Patches of two kinds have two colours, whatever else the features hold."""
    tokens_PND = np.zeros((2, 4, 6))
    tokens_PND[:, ::2, 0] = 5
    tokens_PND += 1e-3 * np.random.default_rng(0).normal(size=tokens_PND.shape)
    pictures = component_pictures(Seen(tokens_PND, np.ones((2, 4)), (2, 2)))
    assert [picture.size for picture in pictures] == [(24, 24)] * 2
    red = np.asarray(pictures[0])[..., 0]
    assert abs(int(red[0, 0]) - int(red[0, 23])) > 200 and red[0, 0] == red[23, 0]


def test_nearest_patches():
    """The nearest patch of each other picture, the nearest picture first."""
    tokens_PND = np.array([[[1.0, 0], [0, 1]], [[0.0, 1], [1, 1]], [[1, 0.1], [0, -1]]])
    found = nearest_patches(Seen(tokens_PND, np.ones((3, 2)), (1, 2)), 0, 0, 5)
    assert [(picture, patch) for picture, patch, _ in found] == [(2, 0), (1, 1)]
    assert found[1][2] == pytest.approx(2**-0.5)
