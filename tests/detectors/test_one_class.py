"""One-class SVM against scikit-learn, SVDD against its own definition."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import OneClassSVM as Reference

from bigtrain.detectors.classical.one_class import SVDD, OneClassSVM


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 5)) + 3 * (np.arange(40) % 2)[:, None], np.arange(40) % 2, rng.normal(size=(20, 5)) * 3


def test_ocsvm_per_class(images):
    """There is one SVM for each class, as scikit-learn fits it, and the best of them gives the score."""
    known_ND, class_N, seen_ND = images
    gamma = 1 / (5 * known_ND.var())
    each = []
    for number in (0, 1):
        own_MD = known_ND[class_N == number]
        reference = Reference(gamma=gamma, nu=0.2, tol=1e-6).fit(own_MD)
        each.append(reference.decision_function(seen_ND) / (0.2 * len(own_MD)))
    found = OneClassSVM(nu=0.2).fit(known_ND, class_N).score(seen_ND)
    np.testing.assert_allclose(found, -np.max(each, axis=0), atol=1e-8)


def test_svdd_ocsvm_affine(images):
    """SVDD is an affine function, twice the score, of the one-class SVM fitted to all classes together."""
    known_ND, class_N, seen_ND = images
    plane = OneClassSVM(nu=0.3).fit(known_ND).score(seen_ND)
    sphere = SVDD(nu=0.3).fit(known_ND, class_N).score(seen_ND)
    np.testing.assert_allclose(sphere, 2 * plane, atol=1e-9)


def test_svdd_is_the_smallest_sphere(images):
    """Tax & Duin's dual, solved as it stands: max sum_i a_i k_ii - a' K a, 0 <= a <= C, sum a = 1."""
    known_ND, _, seen_ND = images
    nu, n = 0.3, len(known_ND)
    gamma = 1 / (5 * known_ND.var())
    kernel = rbf_kernel(known_ND, gamma=gamma)
    found = minimize(
        lambda a: a @ kernel @ a, np.full(n, 1 / n), jac=lambda a: 2 * kernel @ a, method="SLSQP",
        bounds=[(0, 1 / (nu * n))] * n, constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x  # fmt: skip

    def squared_distance(points):
        return 1 - 2 * rbf_kernel(points, known_ND, gamma=gamma) @ found + found @ kernel @ found

    on_edge = (found > 1e-4) & (found < 1 / (nu * n) - 1e-4)
    radius = squared_distance(known_ND[on_edge]).mean()
    np.testing.assert_allclose(SVDD(nu).fit(known_ND).score(seen_ND), squared_distance(seen_ND) - radius, atol=1e-4)


def test_nu_share_outside():
    """About the share nu of the known images lies outside."""
    known_ND = np.random.default_rng(0).normal(size=(300, 3))
    for method in (OneClassSVM, SVDD):
        assert (method(nu=0.2).fit(known_ND).score(known_ND) > 1e-6).mean() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("nu", [0, 1.5])
def test_nu_out_of_range_is_refused(nu):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        OneClassSVM(nu)
