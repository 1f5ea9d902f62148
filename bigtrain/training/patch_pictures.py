"""Pictures of what a ViT's patch features hold: principal components as colours, attention, nearest patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.models.network import Network

Floats = NDArray[np.float64]
PATCH_SIDE = 12  # pixels of a patch in a picture of components
COLOURS = 3
WINDOW_SIDE = 96  # pixels of a patch amid its neighbours


class Seen(NamedTuple):
    """What a network gives for some pictures: P of them, N = h w patches each."""

    tokens_PND: Floats
    attention_PN: Floats
    grid: tuple[int, int]


@torch.no_grad()
def seen_by(network: Network, images_P3HW: Tensor) -> Seen:
    """Patch tokens and the attention of `ViT.guide` for uint8 pictures."""
    vit = network.vit
    (encoded,) = vit(network.normalise(images_P3HW.to(network.device)), with_attention=True)
    assert encoded.attention_BN is not None
    height, width = (side // vit.patch_size for side in images_P3HW.shape[-2:])
    return Seen(encoded.tokens_BND.double().cpu().numpy(), encoded.attention_BN.double().cpu().numpy(), (height, width))


def component_pictures(seen: Seen) -> list[Image.Image]:
    """The first three principal components of all patches together as red, green and blue, a picture each.

    Each component from its 1st to its 99th percentile; its sign so that its largest loading is positive.
    """
    tokens_TD = seen.tokens_PND.reshape(-1, seen.tokens_PND.shape[-1])
    centred_TD = tokens_TD - tokens_TD.mean(axis=0)
    _, vectors_DD = np.linalg.eigh(centred_TD.T @ centred_TD)
    vectors_D3 = vectors_DD[:, ::-1][:, :COLOURS]
    vectors_D3 = vectors_D3 * np.sign(vectors_D3[np.abs(vectors_D3).argmax(axis=0), np.arange(COLOURS)])
    values_T3 = centred_TD @ vectors_D3
    low_3, high_3 = np.quantile(values_T3, [0.01, 0.99], axis=0)
    shade_T3 = (255 * (values_T3 - low_3) / np.maximum(high_3 - low_3, 1e-12)).clip(0, 255).round().astype(np.uint8)
    height, width = seen.grid
    pictures = shade_T3.reshape(-1, height, width, COLOURS)
    size = (width * PATCH_SIDE, height * PATCH_SIDE)
    return [Image.fromarray(picture).resize(size, Image.Resampling.NEAREST) for picture in pictures]


def telling_patch(seen: Seen, picture: int) -> int:
    """The patch of a picture that is attended to most."""
    return int(seen.attention_PN[picture].argmax())


def nearest_patches(seen: Seen, picture: int, patch: int, count: int) -> list[tuple[int, int, float]]:
    """The `count` other pictures with the nearest patches, the nearest first: picture, its patch, cosine."""
    unit_PND = seen.tokens_PND / np.maximum(np.linalg.norm(seen.tokens_PND, axis=-1, keepdims=True), 1e-12)
    cosine_PN = unit_PND @ unit_PND[picture, patch]
    best_P = cosine_PN.argmax(axis=1)
    value_P = cosine_PN.max(axis=1)
    value_P[picture] = -np.inf
    order = np.argsort(-value_P, kind="stable")[: min(count, len(value_P) - 1)]
    return [(int(other), int(best_P[other]), float(value_P[other])) for other in order]


def around_patch(image: Image.Image, grid: tuple[int, int], patch: int, reach: int = 1) -> Image.Image:
    """A patch of a picture amid its neighbours; at the border the window is moved inside."""
    side = 2 * reach + 1
    row, column = (
        min(max(0, place - reach), max(0, length - side))
        for place, length in zip(divmod(patch, grid[1]), grid, strict=True)
    )
    tall, wide = image.height / grid[0], image.width / grid[1]
    box = (column * wide, row * tall, min(image.width, (column + side) * wide), min(image.height, (row + side) * tall))
    return image.resize((WINDOW_SIDE, WINDOW_SIDE), Image.Resampling.BICUBIC, box=box)


def as_pictures(images_P3HW: Tensor) -> Sequence[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images_P3HW]
