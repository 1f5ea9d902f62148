"""Extreme value signatures by hand, on 3 classes x 5 dimensions."""

import numpy as np
import pytest

from bigtrain.detectors.signatures import Signatures

# means (3, 1, 4, 0, 0), (0, 5, 0, 3, 1), (2, 0, 1, 0, 6); with 2 of 5 dimensions the signatures are 02, 13, 04
KNOWN = np.array([[2.0, 1, 5, 0, 0], [4, 1, 3, 0, 0], [0, 5, 0, 3, 1], [1, 0, 0, 0, 7], [3, 0, 2, 0, 5]])
CLASSES = ["a", "a", "b", "c", "c"]
SEEN = np.array([[9.0, 0, 8, 1, 0], [5, 4, 0, 0, 1], [0, 0, 3, 2, 1], [1, 0, 0, 0, 2]])  # strongest: 02, 01, 23, 04


def test_a_signature_is_the_set_of_the_strongest_mean_activations():
    found = Signatures(share=0.4).fit(KNOWN, CLASSES)
    assert found.mean_CD_.tolist() == [[3, 1, 4, 0, 0], [0, 5, 0, 3, 1], [2, 0, 1, 0, 6]]
    assert (found.signature_CD_ > 0).tolist() == [
        [True, False, True, False, False],
        [False, True, False, True, False],
        [True, False, False, False, True],
    ]


def test_novelty_is_what_the_best_signature_does_not_cover():
    # 02 is all of a; 01 half of a, b and c; 23 half of a and b; 04 all of c
    assert Signatures(share=0.4).fit(KNOWN, CLASSES).score(SEEN).tolist() == pytest.approx([0, 0.5, 0.5, 0])


def test_weighted_by_the_mean_activations():
    # a: 3/7 and 4/7, b: 5/8 and 3/8, c: 2/8 and 6/8
    found = Signatures(share=0.4, overlap="weighted").fit(KNOWN, CLASSES).score(SEEN)
    assert found.tolist() == pytest.approx([0, 1 - 5 / 8, 1 - 4 / 7, 0])


def test_cosine_to_the_binary_signature():
    found = Signatures(share=0.4, overlap="cosine").fit(KNOWN, CLASSES).score(SEEN)
    best = [17 / np.sqrt(2 * 146), 6 / np.sqrt(2 * 42), 3 / np.sqrt(2 * 14), 3 / np.sqrt(2 * 5)]
    assert found.tolist() == pytest.approx([1 - cosine for cosine in best], abs=1e-6)


def test_a_signature_has_the_share_of_the_dimensions_and_one_at_least():
    for width, count in ((4096, 410), (20, 2), (3, 1)):
        fitted = Signatures().fit(np.random.default_rng(0).normal(size=(4, width)), [0, 0, 1, 1])
        assert (fitted.signature_CD_ > 0).sum(axis=1).tolist() == [count, count]


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Signatures(share)
