"""Bicubic resizing of 8-bit pixels with anti-aliasing: PyTorch's kernel, or the same integers without PyTorch.

Its kernel works in integers: weights of 16 bits, first along the rows, then along the columns, rounded to 8 bits in
between. Sums of such products are exact in float32, so that matrix products, here or in an exported graph, give the
same bits.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

SUPPORT = 2.0  # pixels to each side that a cubic reaches, before scaling


def resized(pixels_HW3: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A picture resized to (3, height, width)."""
    if pixels_HW3.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1))
    return by_torch(pixels_HW3, height, width) if has_torch() else by_matrices(pixels_HW3, height, width)


@cache
def has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except (ImportError, ValueError):
        return False


def by_torch(pixels_HW3: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    import torch
    import torch.nn.functional as F

    image_3HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1)
    return F.interpolate(image_3HW[None], (height, width), mode="bicubic", antialias=True)[0].contiguous().numpy()


def by_matrices(pixels_HW3: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    pixels_3HW = pixels_HW3.transpose(2, 0, 1).astype(np.float64)
    if pixels_HW3.shape[1] != width:
        weight_xW, bits = weights(pixels_HW3.shape[1], width)
        pixels_3HW = rounded(pixels_3HW @ weight_xW.T, bits)
    if pixels_HW3.shape[0] != height:
        weight_yH, bits = weights(pixels_HW3.shape[0], height)
        pixels_3HW = rounded(weight_yH @ pixels_3HW, bits)
    return pixels_3HW.astype(np.uint8)


def rounded(sum_3yx: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    return np.floor((sum_3yx + 2 ** (bits - 1)) * 0.5**bits).clip(0, 255)


@lru_cache(maxsize=64)
def weights(before: int, after: int) -> tuple[NDArray[np.float64], int]:
    """The matrix (after, before) that resizes one axis: whole numbers, of which 2 ** bits are 1; and `bits`."""
    scale = before / after
    stretch = max(scale, 1.0)
    weight_AB = np.zeros((after, before))
    for place in range(after):
        centre = scale * (place + 0.5)
        first = max(int(centre - SUPPORT * stretch + 0.5), 0)
        last = min(int(centre + SUPPORT * stretch + 0.5), before)
        value = cubic((np.arange(first, last) - centre + 0.5) / stretch)
        weight_AB[place, first:last] = value / value.sum()
    bits = next((bits for bits in range(22) if int(0.5 + weight_AB.max() * 2 ** (bits + 1)) >= 2**15), 22)
    return np.trunc(weight_AB * 2**bits + np.copysign(0.5, weight_AB)), bits


def cubic(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
