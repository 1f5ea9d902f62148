"""What holds for every detector on features."""

import numpy as np
import pytest

from bigtrain.detectors.classical.gaussian import GaussianMixture, Mahalanobis
from bigtrain.detectors.classical.knfst import KNFST, LocalKNFST
from bigtrain.detectors.classical.logits import MaxLogit, MaxSoftmax
from bigtrain.detectors.classical.nearest import NearestNeighbours
from bigtrain.detectors.classical.one_class import SVDD, OneClassSVM
from bigtrain.detectors.classical.openmax import OpenMax
from bigtrain.detectors.feature_detector import FeatureDetector
from bigtrain.methods.signatures.detector import Signatures

DETECTORS = {
    "knn": NearestNeighbours,
    "ocsvm": OneClassSVM,
    "svdd": SVDD,
    "knfst": KNFST,
    "knfst_rbf": lambda: KNFST("rbf"),
    "knfst_nystroem": lambda: KNFST(landmarks=30),
    "local_knfst": lambda: LocalKNFST(neighbours=30),
    "openmax": lambda: OpenMax(tail=5),
    "signatures": lambda: Signatures(share=0.25),
    "signatures_weighted": lambda: Signatures(share=0.25, overlap="weighted"),
    "signatures_cosine": lambda: Signatures(share=0.25, overlap="cosine"),
    "mahalanobis": Mahalanobis,
    "mixture": GaussianMixture,
    "max_logit": MaxLogit,
    "max_softmax": MaxSoftmax,
}
every_detector = pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)


ON_LOGITS = [DETECTORS[name] for name in ("openmax", "max_logit", "max_softmax")]


@pytest.fixture
def images(make):
    """60 images of 4 classes, which are strong in 3 of 12 features each, and 30 that are strong in none."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(4), 15)
    known_ND = rng.uniform(0, 1, (60, 12)) + 4 * np.tile(np.eye(4), 3)[class_N]
    novel_ND = rng.uniform(0, 1, (30, 12))
    if make in ON_LOGITS:
        known_ND, novel_ND = known_ND[:, :4], novel_ND[:, :4]
    return known_ND, np.array(["ant", "bee", "cat", "dog"])[class_N], novel_ND


@every_detector
def test_novel_scores_higher(make, images):
    """Novel images score higher than the images it was fitted to, in more than 80% of the pairs."""
    known_ND, class_N, novel_ND = images
    detector = make().fit(known_ND, class_N)
    assert isinstance(detector, FeatureDetector) and list(detector.classes_) == ["ant", "bee", "cat", "dog"]
    known_N, novel_N = detector.score(known_ND), detector.score(novel_ND)
    assert known_N.shape == (60,) and known_N.dtype == novel_N.dtype == np.float64
    assert (novel_N[:, None] > known_N).mean() > 0.8


@every_detector
def test_score_independent_of_batch(make, images):
    """A score depends on its image alone, and a second fit gives the same scores."""
    known_ND, class_N, novel_ND = images
    detector = make().fit(known_ND, class_N)
    whole_N = detector.score(novel_ND)
    alone_N = np.concatenate([detector.score(novel_ND[[n]]) for n in range(len(novel_ND))])
    np.testing.assert_allclose(alone_N, whole_N, atol=1e-6)
    np.testing.assert_array_equal(make().fit(known_ND, class_N).score(novel_ND), whole_N)
    assert detector.score(novel_ND[:0]).shape == (0,)


@every_detector
def test_training_order(make, images):
    """The order of the training images does not matter."""
    known_ND, class_N, novel_ND = images
    order_N = np.random.default_rng(1).permutation(60)
    if make is DETECTORS["knfst_nystroem"] or make is DETECTORS["mixture"]:
        pytest.skip("chooses among the training images by their place")
    shuffled = make().fit(known_ND[order_N], class_N[order_N]).score(novel_ND)
    np.testing.assert_allclose(shuffled, make().fit(known_ND, class_N).score(novel_ND), atol=1e-4)


@every_detector
def test_learned_attributes(make, images):
    """Names of learned attributes end in an underscore, and their values are numbers and arrays."""
    known_ND, class_N, _ = images
    given = vars(make())
    learned = {name: value for name, value in vars(make().fit(known_ND, class_N)).items() if name not in given}
    assert learned and all(name.endswith("_") for name in learned)
    assert all(isinstance(value, int | float | np.ndarray) for value in learned.values())


@every_detector
def test_nonfinite_features(make, images):
    """Images whose features are NaN or infinite are counted and refused, when fitting and when scoring."""
    known_ND, class_N, novel_ND = images
    broken_ND = known_ND.copy()
    broken_ND[[3, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="features of 2 of 60 images are NaN or infinite, the first in row 3"):
        make().fit(broken_ND, class_N)
    novel_ND[5] = np.nan
    with pytest.raises(ValueError, match="features of 1 of 30 images are NaN or infinite, the first in row 5"):
        make().fit(known_ND, class_N).score(novel_ND)


@every_detector
def test_mistakes_are_reported(make, images):
    known_ND, class_N, novel_ND = images
    with pytest.raises(ValueError, match="is not fitted"):
        make().score(novel_ND)
    with pytest.raises(ValueError, match="at least one is needed"):
        make().fit(np.zeros((0, 4)), [])
    with pytest.raises(ValueError, match=r"features of 60 images, and classes of shape \(59,\)"):
        make().fit(known_ND, class_N[:-1])
    with pytest.raises(ValueError, match=r"fitted to 1?[24] features an image, and 3 were given"):
        make().fit(known_ND, class_N).score(novel_ND[:, :3])


@every_detector
def test_single_class(make, images):
    """One known class is enough, or the method says that it needs two."""
    known_ND, _, novel_ND = images
    if make in (DETECTORS["openmax"], DETECTORS["knfst_nystroem"]):
        with pytest.raises(ValueError, match="at least 2"):
            make().fit(known_ND[:15])
    else:
        assert np.isfinite(make().fit(known_ND[:15]).score(novel_ND)).all()
