"""Masks of pictures: how they are checked, stored and read. A shard keeps them as PNG, any pixel above 0 is marked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.images import UnreadableError, load_pixels, open_image
from shards.treatment import has_its_end, png


def checked_mask(encoded: bytes, displayed: tuple[int, int], size: tuple[int, int]) -> bytes:
    """The mask's original bytes, or nearest-neighbour resized along with its picture, as PNG."""
    mask = open_image(encoded)
    if mask.mode == "F":
        raise UnreadableError("is of floating-point numbers: save it as PNG")
    if mask.size != displayed:
        raise UnreadableError(
            f"is {mask.size[0]} x {mask.size[1]}, the picture as displayed {displayed[0]} x {displayed[1]}"
        )
    if displayed == size and mask.format == "PNG":
        if not has_its_end(encoded, "PNG"):
            load_pixels(mask)
        return encoded
    load_pixels(mask)
    try:
        return png(mask.resize(size, Image.Resampling.NEAREST))
    except (ValueError, OSError) as error:
        raise UnreadableError(f"cannot be saved as PNG ({error})") from error


def marked_pixels(encoded: bytes) -> NDArray[np.bool_]:
    """Which pixels (H, W) a stored mask marks."""
    mask = open_image(encoded)
    load_pixels(mask)
    values = np.asarray(mask)
    return np.asarray(values.astype(bool) if values.ndim == 2 else values[..., :3].any(axis=2))
