"""Extreme value signatures by hand, on 3 classes x 5 dimensions."""

import numpy as np
import pytest

from bigtrain.methods.signatures.detector import Signatures

# means (3, 1, 4, 0, 0), (0, 5, 0, 3, 1), (2, 0, 1, 0, 6); with 2 of 5 dimensions the signatures are 02, 13, 04
KNOWN = np.array([[2.0, 1, 5, 0, 0], [4, 1, 3, 0, 0], [0, 5, 0, 3, 1], [1, 0, 0, 0, 7], [3, 0, 2, 0, 5]])
CLASSES = ["a", "a", "b", "c", "c"]
SEEN = np.array([[9.0, 0, 8, 1, 0], [5, 4, 0, 0, 1], [0, 0, 3, 2, 1], [1, 0, 0, 0, 2]])  # strongest: 02, 01, 23, 04


def test_signature_strongest_means():
    """A signature is the set of the strongest mean activations of its class."""
    found = Signatures(share=0.4).fit(KNOWN, CLASSES)
    assert found.mean_CD_.tolist() == [[3, 1, 4, 0, 0], [0, 5, 0, 3, 1], [2, 0, 1, 0, 6]]
    assert (found.signature_CD_ > 0).tolist() == [
        [True, False, True, False, False],
        [False, True, False, True, False],
        [True, False, False, False, True],
    ]


def test_novelty_uncovered():
    """Novelty is the share of an image's strongest activations that the best signature does not cover."""
    # 02 is all of a; 01 half of a, b and c; 23 half of a and b; 04 all of c
    assert Signatures(share=0.4).fit(KNOWN, CLASSES).score(SEEN).tolist() == pytest.approx([0, 0.5, 0.5, 0])


def test_weighted_overlap():
    """The weighted overlap weighs each dimension of a signature by its mean activation."""
    # a: 3/7 and 4/7, b: 5/8 and 3/8, c: 2/8 and 6/8
    found = Signatures(share=0.4, overlap="weighted").fit(KNOWN, CLASSES).score(SEEN)
    assert found.tolist() == pytest.approx([0, 1 - 5 / 8, 1 - 4 / 7, 0])


def test_cosine_to_the_binary_signature():
    found = Signatures(share=0.4, overlap="cosine").fit(KNOWN, CLASSES).score(SEEN)
    best = [17 / np.sqrt(2 * 146), 6 / np.sqrt(2 * 42), 3 / np.sqrt(2 * 14), 3 / np.sqrt(2 * 5)]
    assert found.tolist() == pytest.approx([1 - cosine for cosine in best], abs=1e-6)


def test_signature_size():
    """A signature has the given share of the dimensions, and at least one."""
    for width, count in ((4096, 410), (20, 2), (3, 1)):
        fitted = Signatures().fit(np.random.default_rng(0).normal(size=(4, width)), [0, 0, 1, 1])
        assert (fitted.signature_CD_ > 0).sum(axis=1).tolist() == [count, count]


@pytest.mark.parametrize("share", [0, 1])
def test_share_range(share):
    """A share that is not between 0 and 1 is refused."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        Signatures(share)
