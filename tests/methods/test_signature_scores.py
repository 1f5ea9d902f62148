"""Novelty from patches, and the overlap of features with signatures, by hand."""

import pytest
import torch

from bigtrain.methods.defend.equations import picture_score
from bigtrain.methods.signatures.equations import signature_cosine_novelty, signature_novelty, strongest


def test_picture_score_by_hand():
    """The mean of the patches, their quantile (linear between them), and the mean of the attended half."""
    map_BN = torch.tensor([[4.0, 0.0, 2.0, 1.0], [1.0, 1.0, 1.0, 5.0]])
    attention_BN = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.3, 0.3, 0.4]])
    assert picture_score(map_BN).tolist() == [1.75, 2.0]
    assert picture_score(map_BN, "quantile", quantile=0.25).tolist() == [0.75, 1.0]
    assert picture_score(map_BN, "quantile", quantile=0.5).tolist() == [1.5, 1.0]
    assert picture_score(map_BN, "attended", attention_BN=attention_BN).tolist() == [1.5, 3.0]


def test_strongest_by_hand():
    """The two largest of each row are marked with a float32 1, in whatever precision the features are."""
    features_BD = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -3.0, -2.0]]).bfloat16()
    found_BD = strongest(features_BD, 2)
    assert found_BD.dtype == torch.float32 and found_BD.tolist() == [[1, 0, 1], [1, 0, 1]]


def test_signature_novelty_by_hand():
    """1 less the best signature's weight on the two strongest features: all, half, and a quarter of it."""
    signature_CD = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0.75, 0.25, 0]])
    features_BD = torch.tensor([[9.0, 8, 0, 0, 0], [9, 0, 0, 0, 8], [0, 0, 0, 8, 9]])
    assert signature_novelty(features_BD, signature_CD, 2).tolist() == [0, 0.5, 0.75]


def test_signature_cosine_by_hand():
    """1 less the larger cosine: of [3, 4] with [5, 0] it is 3 / 5, with [0, 2] it is 4 / 5."""
    signature_CD = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert signature_cosine_novelty(torch.tensor([[3.0, 4.0], [0.0, 7.0]]), signature_CD).tolist() == pytest.approx(
        [0.2, 0], abs=1e-6
    )
