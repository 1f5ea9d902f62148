"""What is made of one picture: the resized image, crops with their boxes, training crops; all keyed by the sample's
seed.

Views are uint8 and channels first; they are normalised on the device (`to_float`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Views = dict[str, NDArray[np.generic]]


class Transform(Interface):
    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views: ...

    def blank(self) -> Views:
        """Views of the same shapes for a place without a picture."""


@dataclass(frozen=True)
class Resized:
    """`image`: the whole picture resized to size x size, without a centre crop."""

    size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        return {"image": _resize(image, self.size)}

    def blank(self) -> Views:
        return {"image": np.zeros((3, self.size, self.size), np.uint8)}


@dataclass(frozen=True)
class MultiCrop:
    """The views of dense tuning (DEFEND 3.1): the whole picture, and crops of it, with their boxes.

    Gives `image` (3, size, size), `crops` (V, 3, crop_size, crop_size) and `boxes` (V, 4): (top, left, bottom, right)
    of each crop in pixels of `image`; with `global_crops` also `global_crops` (G, 3, size, size) and `global_boxes` (G,
    4).
    """

    size: int
    crop_size: int
    crops: int
    crop_scale: tuple[float, float] = (0.1, 0.3)
    global_crops: int = 0
    global_scale: tuple[float, float] = (0.3, 1.0)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        views: Views = {"image": _resize(image, self.size)}
        views["crops"], views["boxes"] = self._cut(image, rng, self.crops, self.crop_size, self.crop_scale)
        if self.global_crops:
            cut = self._cut(image, rng, self.global_crops, self.size, self.global_scale)
            views["global_crops"], views["global_boxes"] = cut
        return views

    def _cut(
        self, image: Image.Image, rng: np.random.Generator, count: int, size: int, scale: tuple[float, float]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        # drawn in the resized image's pixels, where patches are; cut from the picture itself, which is sharper
        boxes = [random_box(self.size, self.size, rng, scale) for _ in range(count)]
        to_picture = np.array([image.height, image.width] * 2) / self.size
        crops = [_resize(image, size, box=tuple(np.array(box) * to_picture)) for box in boxes]
        return np.stack(crops), np.array(boxes, np.float32)

    def blank(self) -> Views:
        views = self(Image.new("RGB", (self.size, self.size)), np.random.default_rng(0))
        return {name: view if name.endswith("boxes") else np.zeros_like(view) for name, view in views.items()}


@dataclass(frozen=True)
class RandomResizedCrop:
    """`image`: a random crop, resized to size x size and mirrored half of the time; for supervised training."""

    size: int
    scale: tuple[float, float] = (0.25, 1.0)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        view = _resize(image, self.size, box=random_box(image.height, image.width, rng, self.scale))
        return {"image": np.ascontiguousarray(view[..., ::-1]) if rng.random() < 0.5 else view}

    def blank(self) -> Views:
        return {"image": np.zeros((3, self.size, self.size), np.uint8)}


def random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[float, float, float, float]:
    """A box of a random share of the area and of a random shape: (top, left, bottom, right), floats."""
    area = height * width * rng.uniform(*scale)
    shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    h, w = min(math.sqrt(area / shape), height), min(math.sqrt(area * shape), width)
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
    return top, left, top + h, left + w


def to_float(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (..., 3, H, W) to float32: (x / 255 - mean) / std for each channel."""
    mean_311 = torch.tensor(mean, device=view.device).view(3, 1, 1)
    std_311 = torch.tensor(std, device=view.device).view(3, 1, 1)
    return (view.float() / 255 - mean_311) / std_311


def _resize(image: Image.Image, size: int, box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    """A box (top, left, bottom, right) of a picture, bicubic with anti-aliasing, as uint8 (3, size, size)."""
    pillow_box = None
    if box is not None:
        top, left, bottom, right = box
        pillow_box = (left, top, min(right, image.width), min(bottom, image.height))
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=pillow_box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
