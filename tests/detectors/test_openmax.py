"""OpenMax by hand, its distributions against scipy's."""

import logging

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import weibull_min

from bigtrain.detectors.classical.openmax import OpenMax, distance


def test_three_classes_by_hand():
    detector = OpenMax(tail=2, alpha=2)
    detector.classes_, detector.width_ = np.arange(3), 3
    detector.mean_CC_ = np.array([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]])
    detector.weibull_C3_ = np.array([[1.0, 1, 0]] * 3)  # F(d) = 1 - exp(-d)
    # x = (3, 1, 0), of length sqrt(10), to classes 0 and 1: euclidean / 200 + 1 - cosine
    d0 = np.sqrt(2) / 200 + 1 - 3 / np.sqrt(10)
    d1 = np.sqrt(18) / 200 + 1 - 1 / np.sqrt(10)
    w0, w1 = 1 - np.exp(-d0), (1 - np.exp(-d1)) / 2  # ranks 0 and 1 of alpha = 2; the third keeps its logit
    unknown, known = 3 * w0 + 1 * w1, np.array([3 * (1 - w0), 1 * (1 - w1), 0])
    (found,) = detector.score([[3.0, 1, 0]])
    assert found == pytest.approx(unknown - np.log(np.exp(known).sum()))
    # the log-odds of OpenMax's first class, the unknown one
    share = softmax([unknown, *known])[0]
    assert found == pytest.approx(np.log(share / (1 - share)))


def test_weibull_scipy():
    """The Weibull fits are SciPy's, on the tail of each class's correctly classified images."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(3), 40)
    logits_NC = rng.normal(size=(120, 3)) + 1.5 * np.eye(3)[class_N]
    detector = OpenMax(tail=15).fit(logits_NC, class_N)
    for number in range(3):
        own = logits_NC[(class_N == number) & (logits_NC.argmax(axis=1) == number)]
        assert len(own) < 40
        np.testing.assert_allclose(detector.mean_CC_[number], own.mean(axis=0))
        tail = np.sort(distance(own, own.mean(axis=0)))[-15:]
        shape, _, scale = weibull_min.fit(tail - tail.min() + 1, floc=0)
        np.testing.assert_allclose(detector.weibull_C3_[number], [shape, scale, 1 - tail.min()])


def test_scores_do_not_saturate():
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(3), 40)
    detector = OpenMax().fit(rng.normal(size=(120, 3)) + 100 * np.eye(3)[class_N], class_N)
    found = detector.score(np.array([[90.0, 0, 0], [1000, 900, 900], [2000, 1900, 1900]]))
    assert np.isfinite(found).all() and len(set(found)) == 3


def test_class_never_right(caplog):
    """A class that the network never gets right is logged in a warning."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(3), 10)
    logits_NC = rng.normal(size=(30, 3)) + 5 * np.eye(3)[[0] * 10 + [1] * 10 + [1] * 10]
    with caplog.at_level(logging.WARNING):
        OpenMax().fit(logits_NC, np.array(["a", "b", "c"])[class_N])
    assert "0 image(s) of class c classified correctly" in caplog.text


def test_not_logits():
    """Features that are not logits, one for each known class, are refused."""
    with pytest.raises(ValueError, match="one for each of the 2 known classes, and rows of 7"):
        OpenMax().fit(np.eye(7), [0, 0, 0, 1, 1, 1, 1])
