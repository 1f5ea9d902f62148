"""Mahalanobis distance and mixtures against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as Reference

from bigtrain.detectors.classical.gaussian import GaussianMixture, Mahalanobis


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    class_N = np.arange(60) % 3
    mixing = rng.normal(size=(6, 6))
    return rng.normal(size=(60, 6)) @ mixing + 4 * np.eye(6)[class_N], class_N, rng.normal(size=(20, 6)) * 3


def test_mahalanobis_definition(images):
    """Mahalanobis is the squared distance to the nearest class mean under one shared covariance."""
    known_ND, class_N, seen_ND = images
    means = [known_ND[class_N == c].mean(axis=0) for c in range(3)]
    precision = LedoitWolf(assume_centered=True).fit(known_ND - np.array(means)[class_N]).get_precision()
    by_hand = [min(mahalanobis(x, mean, precision) ** 2 for mean in means) for x in seen_ND]
    np.testing.assert_allclose(Mahalanobis().fit(known_ND, class_N).score(seen_ND), by_hand)


def test_mahalanobis_few_images():
    """With fewer images than features, Mahalanobis scores are still finite."""
    rng = np.random.default_rng(0)
    detector = Mahalanobis().fit(rng.normal(size=(10, 50)), np.arange(10) % 2)
    assert np.isfinite(detector.score(rng.normal(size=(5, 50)))).all()


def test_mixture_sklearn(images):
    """A mixture scores the negative log-density that scikit-learn computes."""
    known_ND, class_N, seen_ND = images
    found = GaussianMixture(seed=3).fit(known_ND, class_N).score(seen_ND)
    reference = Reference(3, covariance_type="diag", reg_covar=1e-3 * known_ND.var(), random_state=3, max_iter=500)
    np.testing.assert_allclose(found, -reference.fit(known_ND).score_samples(seen_ND))


def test_mixture_dead_feature(images):
    """A feature that is zero in all training images does not make the density infinite."""
    known_ND, class_N, seen_ND = images
    known_ND[:, 2] = 0
    assert np.isfinite(GaussianMixture().fit(known_ND, class_N).score(seen_ND)).all()


def test_mixture_too_many_components():
    """More mixture components than images are refused."""
    with pytest.raises(ValueError, match="ask for fewer components"):
        GaussianMixture(components=5).fit(np.eye(3))
