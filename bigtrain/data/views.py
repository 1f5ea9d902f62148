"""What is made of one picture: the resized image, crops with their boxes, training crops; all keyed by the sample's
seed.

Views are uint8 and channels first; the network normalises them on its device. Crops lie on whole pixels of the picture,
and the returned boxes are exactly those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol as Interface
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.decode import Box, Picture

Views = dict[str, NDArray[np.generic]]
V = TypeVar("V")


class Transform(Interface):
    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views: ...

    def blank(self) -> Views:
        """Views of the same shapes for a place without a picture."""


@dataclass(frozen=True)
class Resized:
    """`image`: the whole picture resized to size x size, without a centre crop."""

    size: int

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        (image,) = picture.cut([(whole(picture), self.size)])
        return {"image": image}

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

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        # shapes are drawn in the resized image, where patches are; crops are cut from the picture, which is sharper
        to_picture = np.array([picture.height, picture.width] * 2) / self.size
        parts = [(self.crops, self.crop_scale, self.crop_size), (self.global_crops, self.global_scale, self.size)]
        boxes = [
            on_pixels(np.array(random_box(self.size, self.size, rng, scale)) * to_picture, picture)
            for count, scale, _ in parts
            for _ in range(count)
        ]
        sizes = [size for count, _, size in parts for _ in range(count)]
        image, *cuts = picture.cut([(whole(picture), self.size), *zip(boxes, sizes, strict=True)])
        box_V4 = (np.array(boxes) / to_picture).astype(np.float32)
        views: Views = {"image": image, "crops": np.stack(cuts[: self.crops]), "boxes": box_V4[: self.crops]}
        if self.global_crops:
            views |= {"global_crops": np.stack(cuts[self.crops :]), "global_boxes": box_V4[self.crops :]}
        return views

    def crops_of(self, views: Mapping[str, V]) -> tuple[list[V], list[V]]:
        """The crops of a batch and their boxes, by kind: the small ones, then the global ones where there are any."""
        kinds = [("crops", "boxes"), ("global_crops", "global_boxes")][: 2 if self.global_crops else 1]
        return [views[crops] for crops, _ in kinds], [views[boxes] for _, boxes in kinds]

    def blank(self) -> Views:
        black = Picture.of(np.zeros((self.size, self.size, 3), np.uint8))
        return self(black, np.random.default_rng(0))


@dataclass(frozen=True)
class RandomResizedCrop(Resized):
    """`image`: a random crop, resized to size x size and mirrored half of the time; for supervised training."""

    scale: tuple[float, float] = (0.25, 1.0)
    mirror: bool = True

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        box = on_pixels(np.array(random_box(picture.height, picture.width, rng, self.scale)), picture)
        (image,) = picture.cut([(box, self.size)])
        return {"image": mirrored(image, rng) if self.mirror else image}


@dataclass(frozen=True)
class CentreCrop(Resized):
    """`image`: the centre, size x size, of the picture resized to `resize` x `resize`; if equal, the whole picture."""

    resize: int

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        return {"image": self.cut(picture, 0.5, 0.5)}

    def cut(self, picture: Picture, down: float, across: float) -> NDArray[np.uint8]:
        """The crop at these fractions (0 .. 1) down and across; cut from the picture itself, which is sharper."""
        share = self.size / self.resize
        height, width = share * picture.height, share * picture.width
        top, left = down * (picture.height - height), across * (picture.width - width)
        (image,) = picture.cut([(on_pixels(np.array([top, left, top + height, left + width]), picture), self.size)])
        return image


def is_fixed(transform: Transform) -> bool:
    """Whether a picture's view is always the same: one uint8 `image`."""
    return type(transform) in (Resized, CentreCrop)


@dataclass(frozen=True)
class RandomCrop(CentreCrop):
    """`image`: a crop anywhere in the resized picture, mirrored half of the time (Krizhevsky et al. 2012)."""

    mirror: bool = True

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        image = self.cut(picture, rng.random(), rng.random())
        return {"image": mirrored(image, rng) if self.mirror else image}


def mirrored(image_3HW: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Half of the time."""
    return np.ascontiguousarray(image_3HW[..., ::-1]) if rng.random() < 0.5 else image_3HW


def whole(picture: Picture) -> Box:
    return 0, 0, picture.height, picture.width


def on_pixels(box: NDArray[np.float64], picture: Picture) -> Box:
    """The nearest box of whole pixels, of at least one, inside the picture."""
    top, left, bottom, right = box.round().astype(int).tolist()
    top, left = min(top, picture.height - 1), min(left, picture.width - 1)
    return top, left, min(max(bottom, top + 1), picture.height), min(max(right, left + 1), picture.width)


def random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[float, float, float, float]:
    """A box of a random share of the area and of a random shape: (top, left, bottom, right), floats.

    The share is always as drawn: in an elongated picture the shape is clipped.
    """
    area = height * width * rng.uniform(*scale)
    least, most = area / height**2, width**2 / area  # width / height of the boxes of this area that fit
    low, high = (min(max(shape, least), most) for shape in ratio)
    shape = math.exp(rng.uniform(math.log(low), math.log(high)))
    h, w = min(math.sqrt(area / shape), height), min(math.sqrt(area * shape), width)
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
    return top, left, top + h, left + w
