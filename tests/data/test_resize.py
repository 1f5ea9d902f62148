"""Resizing without PyTorch gives the very bits of PyTorch's kernel."""

import numpy as np
import pytest

from bigtrain.data.resize import by_matrices, by_torch, resized


@pytest.mark.parametrize("seed", range(6))
def test_same_bits(seed):
    """Of noise and of hard edges, smaller and larger, down to a pixel, each side by itself."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 700, 2)
    for levels in (256, 2):
        pixels = (rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))).astype(np.uint8)
        for size in ((1, 1), (32, 32), tuple(rng.integers(1, 300, 2)), (height, 40), (40, width)):
            assert np.array_equal(by_torch(pixels, *size), by_matrices(pixels, *size)), (pixels.shape, size)


def test_same_size():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(resized(pixels, 2, 4), pixels.transpose(2, 0, 1))
