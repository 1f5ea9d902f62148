"""KNFST: classes collapse to points, scores match the eigenvector definition, and a missing null space is refused."""

import numpy as np
import pytest
from scipy.linalg import eigh, null_space

from bigtrain.detectors.classical import knfst
from bigtrain.detectors.classical.knfst import KNFST, LocalKNFST, null_space_of


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    class_N = np.arange(48) % 4
    return np.abs(rng.normal(size=(48, 20)) + 2 * np.eye(20)[class_N]), class_N, np.abs(rng.normal(size=(15, 20)))


def projected(detector, features_ND):
    return detector._kernel(features_ND, detector.known_ND_) @ detector.to_null_NJ_


@pytest.mark.parametrize("kernel", ["intersection", "rbf"])
def test_classes_collapse(images, kernel):
    """Each training class collapses to a point, and C classes give C - 1 null dimensions."""
    known_ND, class_N, _ = images
    detector = KNFST(kernel).fit(known_ND, class_N)
    assert detector.to_null_NJ_.shape == (48, 3) and detector.point_CJ_.shape == (4, 3)
    np.testing.assert_allclose(projected(detector, known_ND), detector.point_CJ_[class_N], atol=5e-13)
    assert detector.score(known_ND).max() < 5e-13


@pytest.mark.parametrize("kernel", ["intersection", "rbf"])
def test_bodesheim_definition(images, kernel):
    """Scores are Bodesheim 2013, 3.2: centred kernel's eigenvectors, null space of within-class scatter."""
    known_ND, class_N, seen_ND = images
    detector = KNFST(kernel).fit(known_ND, class_N)
    n = len(known_ND)
    kernel_NN, kernel_MN = detector._kernel(known_ND, known_ND), detector._kernel(seen_ND, known_ND)
    centring = np.eye(n) - 1 / n
    value_N, vector_NN = eigh(centring @ kernel_NN @ centring)
    kept = value_N > 1e-12
    basis_NR = centring @ vector_NN[:, kept] / np.sqrt(value_N[kept])
    within = np.eye(n) - (class_N[:, None] == class_N) / np.bincount(class_N)[class_N]
    h_RN = basis_NR.T @ kernel_NN @ within
    directions_NJ = basis_NR @ null_space(h_RN @ h_RN.T, rcond=1e-10)
    assert directions_NJ.shape[1] == 3
    points_CJ = np.stack([(kernel_NN @ directions_NJ)[class_N == c].mean(axis=0) for c in range(4)])
    gaps = (kernel_MN @ directions_NJ)[:, None] - points_CJ
    np.testing.assert_allclose(detector.score(seen_ND), np.linalg.norm(gaps, axis=2).min(axis=1), rtol=1e-6)


def test_intersection_kernel(images):
    """The default kernel is the intersection of histograms that sum to one."""
    known_ND, _, seen_ND = images
    left, right = seen_ND / seen_ND.sum(axis=1, keepdims=True), known_ND / known_ND.sum(axis=1, keepdims=True)
    by_hand = np.minimum(left[:, None], right).sum(axis=2)
    np.testing.assert_allclose(KNFST()._kernel(seen_ND, known_ND), by_hand, atol=1e-14)


def test_one_class_by_hand():
    """A single class is separated from the origin, with the scores worked out by hand."""
    # orthogonal histograms: K = I, so f(x) = k(x)' 1, the class lies at 1 and the direction's length is sqrt(2)
    detector = KNFST().fit(np.eye(3)[:2])
    # known: 1; third histogram: 0; half of each: 1/2 + 1/2
    found = detector.score(np.array([[1.0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]]))
    np.testing.assert_allclose(found, np.array([0, 1, 0, 0.5]) / np.sqrt(2), atol=1e-12)


def test_two_classes_by_hand():
    """Two classes of one image each score as worked out by hand."""
    # phi_1, phi_2 orthonormal: one direction, (phi_1 - phi_2)/sqrt(2); the classes lie at +- 1/sqrt(2)
    detector = KNFST().fit(np.eye(3)[:2], ["a", "b"])
    found = detector.score(np.array([[1.0, 0, 0], [0, 0, 1], [1, 0, 1]]))
    np.testing.assert_allclose(found, np.array([0, 1, 0.5]) / np.sqrt(2), atol=1e-12)


@pytest.mark.parametrize("neighbours", [48, 1000])
def test_local_all_neighbours(images, neighbours):
    """Local KNFST with all images as neighbours is KNFST."""
    known_ND, class_N, seen_ND = images
    whole = KNFST().fit(known_ND, class_N).score(seen_ND)
    np.testing.assert_allclose(LocalKNFST(neighbours=neighbours).fit(known_ND, class_N).score(seen_ND), whole)


def test_local_nearest(images):
    """Local KNFST is KNFST fitted to the nearest images alone."""
    known_ND, class_N, seen_ND = images
    local = LocalKNFST(neighbours=12).fit(known_ND, class_N)
    for row in range(3):
        near = np.argsort(-local._kernel(seen_ND[[row]], known_ND)[0])[:12]
        alone = KNFST().fit(known_ND[near], class_N[near]).score(seen_ND[[row]])
        np.testing.assert_allclose(local.score(seen_ND)[row], alone[0])


def test_landmarks(images):
    """With all images as landmarks the space is exact; with half of them the scores correlate with it."""
    known_ND, class_N, seen_ND = images
    exact = KNFST("rbf").fit(known_ND, class_N).score(seen_ND)
    np.testing.assert_allclose(KNFST("rbf", landmarks=48).fit(known_ND, class_N).score(seen_ND), exact, rtol=1e-6)
    half = KNFST("rbf", landmarks=24).fit(known_ND, class_N)
    assert half.known_ND_.shape == (24, 20) and half.to_null_NJ_.shape == (24, 3)
    assert np.corrcoef(half.score(seen_ND), exact)[0, 1] > 0.5


def test_image_in_two_classes(images):
    """A picture in two classes ties them into one point, and leaves the others apart."""
    known_ND, class_N, _ = images
    twice_ND, twice_N = np.concatenate([known_ND, known_ND[:1]]), np.append(class_N, 1)  # an image of class 0
    detector = KNFST().fit(twice_ND, twice_N)
    assert detector.to_null_NJ_.shape[1] == 2  # one dimension less
    np.testing.assert_allclose(detector.point_CJ_[0], detector.point_CJ_[1], atol=1e-6)
    assert np.linalg.norm(detector.point_CJ_[0] - detector.point_CJ_[2]) > 0.1
    assert detector.score(twice_ND).max() < 1e-5


def test_no_null_space():
    """Classes that cannot be told apart have no null space and are refused."""
    with pytest.raises(ValueError, match="no null space"):
        null_space_of(np.ones((4, 4)), np.array([0, 0, 1, 1]))


def test_negative_features(images):
    """Negative features are not histograms; the error names the kernel to use instead."""
    known_ND, class_N, _ = images
    with pytest.raises(ValueError, match=r"48 of 48 images have negative features.*kernel='rbf'"):
        KNFST().fit(known_ND - 9, class_N)


def test_too_many_images(images, monkeypatch):
    """More images than memory allows are refused: KNFST names landmarks, local KNFST the size and limit."""
    known_ND, class_N, _ = images
    monkeypatch.setattr(knfst, "MAX_IMAGES", 40)
    monkeypatch.setattr(knfst, "MAX_LOCAL_IMAGES", 47)
    with pytest.raises(ValueError, match="give landmarks"):
        KNFST().fit(known_ND, class_N)
    with pytest.raises(ValueError, match="local KNFST on 48 images holds 0 GB: give at most 47"):
        LocalKNFST().fit(known_ND, class_N)
