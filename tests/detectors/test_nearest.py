"""Nearest neighbours by hand and against scikit-learn, and the features that they compare."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors as Reference

from bigtrain.detectors.classical.nearest import NearestNeighbours, pixel_features, token_features


def test_score_by_hand():
    """The score is the sum of the two smallest squared distances, by hand, in float64."""
    known_ND = np.array([[0.0, 0], [3, 4], [0, 1], [10, 0]])
    scores = NearestNeighbours().fit(known_ND).score(np.array([[0.0, 0], [0, 5], [10, 0]]))
    assert scores.tolist() == pytest.approx([0 + 1, (9 + 1) + 16, 0 + (49 + 16)])
    assert scores.dtype == np.float64


@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_scores_sklearn(neighbours):
    """Scores are the sums of scikit-learn's squared neighbour distances."""
    rng = np.random.default_rng(0)
    known_ND, seen_ND = rng.normal(size=(50, 8)), rng.normal(size=(20, 8))
    distance_NK = Reference(n_neighbors=neighbours, algorithm="kd_tree").fit(known_ND).kneighbors(seen_ND)[0]
    found = NearestNeighbours(neighbours).fit(known_ND).score(seen_ND)
    np.testing.assert_allclose(found, (distance_NK**2).sum(axis=1))


def test_one_or_no_image():
    """One known image is enough; fitting to no images is an error."""
    assert NearestNeighbours(2).fit(np.array([[1.0]])).score(np.array([[4.0]])).tolist() == [9]
    with pytest.raises(ValueError, match="at least one is needed"):
        NearestNeighbours().fit(np.zeros((0, 3)))


def test_far_is_novel():
    """What is like the fitted images scores as near, and what is far from them as novel."""
    rng = np.random.default_rng(0)
    index = NearestNeighbours().fit(rng.normal(size=(100, 4)))
    assert index.score(rng.normal(size=(50, 4)) + 9).min() > index.score(rng.normal(size=(50, 4))).max()


def test_pixel_features():
    """Pixel features are the picture resized to 32 x 32 pixels, scaled to 0 to 1."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(pixel_features(images), images.flatten(1).float() / 255)
    large = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    small = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.BILINEAR), np.float32) / 255
    found = pixel_features(torch.from_numpy(large).permute(2, 0, 1)[None])
    torch.testing.assert_close(found[0].view(3, 32, 32), torch.from_numpy(small).permute(2, 0, 1), atol=4e-3, rtol=0)


def test_token_features():
    """Token features are the mean direction of the patch tokens, as a unit vector."""
    tokens_BND = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[0.0, -2.0], [0.0, -8.0]]])
    expected_BD = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]])
    torch.testing.assert_close(token_features(tokens_BND), expected_BD)
