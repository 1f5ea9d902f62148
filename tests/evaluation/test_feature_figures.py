"""What features are worth: worked by hand, and against scikit-learn."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier

from bigtrain.evaluation import feature_figures as figures
from bigtrain.evaluation.intervals import share_interval

RNG = np.random.default_rng(0)


def test_effective_rank():
    """Equal singular values use all their dimensions, one uses one; a common offset does not matter."""
    corners = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert figures.effective_rank(corners) == pytest.approx(2)
    assert figures.effective_rank(corners + 100) == pytest.approx(2)
    assert figures.effective_rank(np.outer(np.arange(5), [1.0, 2, 3])) == pytest.approx(1)
    assert figures.effective_rank(np.ones((5, 3))) == 0
    stretched = corners * [3, 1]  # singular values 3 sqrt 2 and sqrt 2: p = 3/4, 1/4
    assert figures.effective_rank(stretched) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_spread():
    """Mean ln of the distance to the nearest other: by hand, and lower for a crowd."""
    axes = np.eye(3)
    assert figures.spread(axes) == pytest.approx(np.log(2**0.5))
    crowd = np.ones((50, 3)) + 0.01 * RNG.normal(size=(50, 3))
    assert figures.spread(crowd) < figures.spread(RNG.normal(size=(50, 3))) - 1


def test_pair_agreement():
    """A picture counts if its own second view is nearest; ties, as of constant features, do not."""
    first = np.eye(3)
    assert figures.pair_agreement(first, 2 * first).tolist() == [1, 1, 1]
    assert figures.pair_agreement(first, first[[1, 0, 2]]).tolist() == [0, 0, 1]
    assert figures.pair_agreement(np.ones((4, 3)), np.ones((4, 3))).tolist() == [0, 0, 0, 0]


def test_neighbours_right():
    """Leave-one-out kNN of equal votes is scikit-learn's."""
    class_N = RNG.integers(3, size=60)
    features_ND = RNG.normal(size=(60, 4)) + 1.5 * np.eye(4)[class_N]
    found = figures.neighbours_right(features_ND, class_N, neighbours=1)
    expected = [
        KNeighborsClassifier(1, metric="cosine").fit(np.delete(features_ND, i, 0), np.delete(class_N, i)).predict(
            features_ND[[i]])[0] == class_N[i] for i in range(60)
    ]  # fmt: skip
    assert found.astype(bool).tolist() == expected
    assert 0.4 < found.mean() < 1


def test_probe_right():
    """A linear classifier finds what is linearly there, and nothing in noise."""
    class_N = np.arange(200) % 4
    noise_ND = RNG.normal(size=(200, 8))
    assert figures.probe_right(noise_ND + 4 * np.eye(8)[class_N], class_N).mean() > 0.95
    assert figures.probe_right(noise_ND, class_N).mean() < 0.45


def test_prototype_usage():
    """All K prototypes used alike is 1, a single one 1 / K."""
    assert figures.prototype_usage(np.full((5, 4), 0.25)) == pytest.approx(1)
    assert figures.prototype_usage(np.eye(4)[[0, 0, 0]]) == pytest.approx(0.25)


@pytest.mark.parametrize(("count", "of"), [(0, 10), (3, 10), (10, 10), (57, 400)])
def test_share_interval(count, of):
    """Wilson's interval, as scipy has it."""
    expected = binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert share_interval(count, of) == pytest.approx((expected.low, expected.high), abs=1e-9)
