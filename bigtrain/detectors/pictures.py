"""Pictures as users give them to a detector, opened and cut to its view, in batches of one size."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.data.views import Transform
from bigtrain.images import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Given = Union[str, Path, bytes, IO[bytes], Image.Image, NDArray[np.uint8], "Tensor"]
"""A picture: a file by its path, its encoded bytes, an open binary file, or open already (`Picture.of`)."""
Unreadable = Literal["nan", "raise"]


def batches_of(
    images: Iterable[Given], view: Transform, size: int, unreadable: Unreadable = "nan", reduced: bool = True
) -> Iterator[tuple[NDArray[np.uint8] | None, NDArray[np.bool_]]]:
    """The views of the readable images of each batch, filled up with black ones to `size`; None where there are none;
    and which of the batch these are.

    Raises:
        ValueError: a single picture instead of several, or with "raise" one that cannot be read.
    """
    check_several(images)
    if size < 1 or unreadable not in ("nan", "raise"):
        raise ValueError(f"batch is {size} and unreadable {unreadable!r}: give 1 or more, and 'nan' or 'raise'.")
    rest = enumerate(images)
    while some := list(islice(rest, size)):
        views, is_read_b = [], np.zeros(len(some), bool)
        for place, (number, image) in enumerate(some):
            try:
                views.append(view_of(image, view, reduced=reduced))
                is_read_b[place] = True
            except (ValueError, OSError) as error:  # of a closed file too
                named = str(image) if isinstance(image, str | Path) else f"picture {number} (counted from 0)"
                if unreadable == "raise":
                    raise UnreadableError(f"{named} cannot be scored: {error}") from error
                log.warning("%s cannot be scored, and its score is NaN: %s", named, error)
        yield filled(views, size) if views else None, is_read_b


def view_of(image: Given, view: Transform, *, reduced: bool = True) -> NDArray[np.uint8]:
    """What a detector sees of a picture, uint8 (3, H, W). Raises UnreadableError or OSError."""
    return view(opened(image, reduced=reduced), np.random.default_rng(0))["image"]  # type: ignore[return-value]


def filled(views: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Views as one batch of `size`, the last ones black: a kernel's rounding can depend on the batch's shape."""
    image_B3HW = np.zeros((size, *views[0].shape), np.uint8)
    image_B3HW[: len(views)] = np.stack(views)
    return image_B3HW


def check_several(images: object) -> None:
    """Refuse what is one picture, whose letters, bytes or rows would be taken for many."""
    is_one = isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image | Mapping)
    dimensions = getattr(images, "ndim", 4)  # of an array or a tensor
    kind = getattr(getattr(images, "dtype", None), "kind", "u")
    if is_one or hasattr(images, "read") or (dimensions < 4 and kind not in "OUS") or not isinstance(images, Iterable):
        what = type(images).__name__
        hint = "its pictures, such as sorted(folder.glob('*.jpg'))"
        if not (isinstance(images, str | Path) and Path(images).is_dir()):
            hint = "a list, also for one picture: [picture]"
        raise ValueError(f"several pictures are scored, and a single {what} was given: give {hint}.")


def opened(image: Given, *, reduced: bool = True) -> Picture:
    """Raises UnreadableError or OSError."""
    if isinstance(image, bytes | bytearray | memoryview):
        return Picture(bytes(image), reduced=reduced)
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "is missing"
            raise UnreadableError(f"not a picture: it {what}")
        return Picture(path.read_bytes(), reduced=reduced)
    if hasattr(image, "read"):
        payload = image.read()
        if not isinstance(payload, bytes):
            raise UnreadableError("the file is open as text: open it with 'rb'")
        return Picture(payload, reduced=reduced)
    if isinstance(image, Image.Image | np.ndarray) or hasattr(image, "detach"):
        return Picture.of(image)
    raise UnreadableError(
        f"a {type(image).__name__} is no picture: give a path, bytes, an open file, an image of Pillow, or an array or "
        "tensor of uint8"
    )
