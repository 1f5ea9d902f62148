"""Scores keep the order of what they compute where values are close; every detector fits odd features or says why."""

import numpy as np
import pytest

from bigtrain.detectors.catalogue import ON_FEATURES, detector_class
from bigtrain.detectors.classical.gaussian import GaussianMixture, Mahalanobis
from bigtrain.detectors.classical.knfst import KNFST, LocalKNFST
from bigtrain.detectors.classical.logits import MaxSoftmax
from bigtrain.detectors.classical.nearest import NearestNeighbours
from bigtrain.methods.signatures.detector import Signatures

RNG = np.random.default_rng(0)


def rising(scores):
    return bool((np.diff(scores) > 0).all())


def test_sure_networks_do_not_tie():
    """Softmax of logits far apart: 1e-16 and less is still more or less."""
    logits_ND = np.array([[gap, 0.0, -1.0] for gap in (200.0, 100.0, 50.0, 40.0, 10.0)])
    scores = MaxSoftmax().fit(logits_ND, [0, 0, 1, 1, 2]).score(logits_ND)
    assert rising(scores) and (scores > 0).all()
    assert scores[-1] == pytest.approx(np.log1p(np.exp(-10) + np.exp(-11)), rel=1e-12)


def test_near_neighbours_do_not_tie():
    """Distances of 1e-9 beside features of 1000 are distances."""
    known_ND = 1000 + RNG.normal(size=(20, 8))
    moved_ND = known_ND[:1] + np.array([[d] + [0] * 7 for d in (0, 1e-9, 2e-9, 1e-6)])
    scores = NearestNeighbours(1).fit(known_ND).score(moved_ND)
    assert rising(scores) and scores[0] == 0
    assert scores[2] == pytest.approx(4e-18, rel=0.1)


def test_far_means_do_not_cancel():
    """A mixture far from the origin scores as the same one at the origin."""
    features_ND, test_ND = RNG.normal(size=(60, 4)), RNG.normal(size=(9, 4))
    near = GaussianMixture(1).fit(features_ND)
    far = GaussianMixture(1).fit(features_ND + 1e7)
    np.testing.assert_allclose(far.score(test_ND + 1e7), near.score(test_ND), rtol=1e-5)


def test_small_angles_do_not_tie():
    """Directions 1e-6 apart from a signature are told apart, in order."""
    known_ND = np.eye(8)[:1] + np.zeros((3, 1))
    angles = np.array([1e-6, 2e-6, 4e-6, 1e-3])
    test_ND = np.cos(angles)[:, None] * np.eye(8)[0] + np.sin(angles)[:, None] * np.eye(8)[5]
    scores = Signatures(0.1, "cosine").fit(known_ND).score(test_ND)
    assert rising(scores)
    np.testing.assert_allclose(scores, angles**2 / 2, rtol=0.1)


ODD = {
    "copies": (np.repeat(np.abs(RNG.normal(size=(12, 6))), 2, axis=0), np.arange(24) // 2 % 3),
    "constant": (np.ones((12, 6)), np.arange(12) % 3),
    "one a class": (np.abs(RNG.normal(size=(3, 6))), np.arange(3)),
    "dead features": (np.abs(RNG.normal(size=(30, 6))) * [1, 1, 1, 0, 0, 0], np.arange(30) % 3),
    "more dimensions": (np.abs(RNG.normal(size=(6, 40))), np.arange(6) % 3),
    "one image": (np.abs(RNG.normal(size=(1, 6))), np.zeros(1, int)),
}


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("odd", ODD)
def test_odd_features(name, odd):
    """Copies, constants, one image a class: a detector gives finite scores, or says in a sentence what is missing."""
    features_ND, class_N = ODD[odd]
    kind = detector_class(name)
    try:
        scores = kind().fit(features_ND, class_N).score(features_ND + 0.5)
    except np.linalg.LinAlgError:
        raise
    except ValueError as error:
        assert len(str(error).split()) > 6 and "shape" not in str(error)
        return
    assert np.isfinite(scores).all() and scores.shape == (len(features_ND),)


@pytest.mark.parametrize("kind", [KNFST, LocalKNFST])
@pytest.mark.parametrize("classes", [1, 3])
def test_equal_pictures_collapse(kind, classes):
    """With copies in a class every known image still lies on its class's point, and others do not."""
    features_ND = np.abs(RNG.normal(size=(40, 30)))
    twice_ND, class_N = np.concatenate([features_ND, features_ND[:9]]), np.arange(49) % 40 % classes
    detector = kind("rbf").fit(twice_ND, class_N)
    assert detector.score(twice_ND).max() < 1e-8
    assert detector.score(features_ND + np.abs(RNG.normal(size=(40, 30)))).min() > 1e-3


def test_no_covariance():
    """Mahalanobis without any spread inside of the classes says so."""
    with pytest.raises(ValueError, match="no covariance: give more images"):
        Mahalanobis().fit(np.eye(3), [0, 1, 2])
