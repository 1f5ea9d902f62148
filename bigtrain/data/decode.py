"""A picture from its encoded bytes: upright 8-bit RGB, decoded once, at no higher resolution than its views need.

JPEGs go to the fastest decoder there is (`jpeg_decoder`), every other format to Pillow (`bigtrain.images`); so does a
JPEG that the fast decoder refuses: CMYK, say, or one whose damage Pillow forgives.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bigtrain.data.resize import resized
from bigtrain.images import (
    Pixels,
    UnreadableError,
    check_pixels,
    check_range,
    decode_rgb,
    open_image,
    open_upright,
    orientation_of,
    pillow_errors,
    to_rgb,
)
from bigtrain.jpeg import read_header

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels of the upright picture, half-open

SPARE = 3  # times a view's side: what its box keeps at least when decoded at 1/2, 1/4 or 1/8


class Picture:
    """A picture whose views are cut from it: `Picture(payload).cut([((0, 0, 50, 80), 32)])`.

    `height` and `width` are those of the picture as displayed. Its pixels are decoded by the first `cut`.

    Raises:
        UnreadableError: the header cannot be read, or tells of more than MAX_PIXELS pixels.

    Args:
        payload: its encoded bytes.
        decoder: of JPEG_DECODERS; None: the fastest.
        reduced: decode large JPEGs at a fraction of their size where the views are small. A picture that is open
            already is resized from its full size: without this both give the same views.
    """

    def __init__(self, payload: bytes, decoder: str | None = None, *, reduced: bool = True) -> None:
        self._payload, self._decoder, self._reduced = payload, decoder or jpeg_decoder(), reduced
        self._image: Image.Image | None = None
        self._turned = 1
        header = read_header(payload)
        if header and header.height and header.width and header.channels in (1, 3):
            check_pixels(header.width, header.height)
            self.height, self.width = header.height, header.width
            self._turned = orientation_of(payload) if header.has_app1 else 1
            if self._turned >= 5:
                self.height, self.width = self.width, self.height
        else:
            self._image = open_upright(payload)
            self.width, self.height = self._image.size

    @classmethod
    def of(cls, image: Image.Image | NDArray[Any] | Tensor) -> Picture:
        """A picture that is open already.

        Args:
            image: an image of Pillow, which is turned upright; an array, uint8 (H, W), (H, W, 1), (H, W, 3) or
                (H, W, 4), the last without its transparency; or a tensor, uint8 (H, W), (1, H, W) or (3, H, W).

        Raises:
            UnreadableError: anything else, or an image whose numbers have no given range.
        """
        picture = cls.__new__(cls)
        if isinstance(image, Image.Image):
            check_range(image)
            if 0 in image.size:
                raise UnreadableError(f"an image of {image.width} x {image.height} has no pixels")
            check_pixels(*image.size)
            with pillow_errors():
                picture._image = ImageOps.exif_transpose(image)
        else:
            picture._image = Image.fromarray(pixels_of(image))
        picture._reduced = False
        picture.width, picture.height = picture._image.size
        return picture

    def cut(self, views: Sequence[tuple[Box, int]]) -> list[Pixels]:
        """For each (box, size) that part of the picture as uint8 (3, size, size), bicubic with anti-aliasing.

        Beside Pillow's crop and resize of the same pixels, a photograph's view is off by 0.3 levels in the mean and 16
        at single hard edges (Pillow filters across before it filters down). Where all views are so small that a JPEG is
        decoded smaller: 1 in the mean over photographs, 6 over one of fine texture, 64 at single edges.
        """
        spare = min(min(box[2] - box[0], box[3] - box[1]) / size for box, size in views) / SPARE
        reduce = next(factor for factor in (8, 4, 2, 1) if factor <= max(spare, 1)) if self._reduced else 1
        pixels_HW3 = self._decoded(reduce)
        down, across = pixels_HW3.shape[0] / self.height, pixels_HW3.shape[1] / self.width
        return [
            _resized(pixels_HW3, (top * down, left * across, bottom * down, right * across), size)
            for (top, left, bottom, right), size in views
        ]

    def rgb(self) -> Image.Image:
        """The whole picture, to be shown."""
        return Image.fromarray(self._decoded(1))

    def _decoded(self, reduce: int) -> Pixels:
        if self._image is not None:
            return to_rgb(self._image)
        try:
            pixels_HW3 = JPEG_DECODERS[self._decoder](self._payload, reduce)
        except MemoryError:
            raise
        except Exception as refused:  # each library has its own errors; Pillow, which reads most, is the fallback
            log.debug("%s refuses a JPEG (%s): Pillow reads it", self._decoder, refused)
            return decode_rgb(self._payload)
        return upright(pixels_HW3, self._turned)


def pixels_of(image: NDArray[Any] | Tensor) -> Pixels:
    """An array or tensor of a picture as contiguous (H, W) or (H, W, 3); see `Picture.of`."""
    kind, channels_last = ("an array", True) if isinstance(image, np.ndarray) else ("a tensor", False)
    shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    layouts = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)" if channels_last else "(H, W), (1, H, W) or (3, H, W)"
    channels = shape[2 if channels_last else 0] if len(shape) == 3 else 0
    if dtype != "uint8" or channels not in ((0, 1, 3, 4) if channels_last else (0, 1, 3)) or len(shape) not in (2, 3):
        raise UnreadableError(
            f"{kind} of {dtype} and the shape {shape} is no picture: give uint8, 0 to 255, of the shape {layouts}"
        )
    if 0 in shape:
        raise UnreadableError(f"{kind} of the shape {shape} has no pixels")
    values = np.asarray(image) if isinstance(image, np.ndarray) else image.detach().cpu().numpy()
    if len(shape) == 3:
        values = values if channels_last else values.transpose(1, 2, 0)
        values = values[..., 0] if channels == 1 else values[..., :3]
    check_pixels(values.shape[1], values.shape[0])
    return np.ascontiguousarray(values)


def _by_simplejpeg(payload: bytes, reduce: int) -> Pixels:
    height, width, *_ = simplejpeg.decode_jpeg_header(payload)
    # it decodes smaller only when given a minimum size
    least = {"min_height": -(-height // reduce), "min_width": -(-width // reduce)} if reduce > 1 else {}
    return simplejpeg.decode_jpeg(payload, colorspace="RGB", **least)


def _by_torchvision(payload: bytes, reduce: int) -> Pixels:
    """Full size only: ignores `reduce`."""
    import torch
    import torchvision.io

    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _by_pillow(payload: bytes, reduce: int) -> Pixels:
    image = open_image(payload)
    if reduce > 1:
        image.draft("RGB", (-(-image.width // reduce), -(-image.height // reduce)))
    return np.array(image.convert("RGB"))


JPEG_DECODERS: dict[str, Callable[[bytes, int], Pixels]] = {  # fastest first: tests/benchmarks/decoding.py
    "simplejpeg": _by_simplejpeg,
    "torchvision": _by_torchvision,
    "pillow": _by_pillow,
}


@lru_cache(maxsize=1)
def jpeg_decoder() -> str:
    """The fastest decoder of JPEGs that works here; chosen once."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    for name, decode in JPEG_DECODERS.items():
        try:
            decode(file.getvalue(), 2)
        except Exception as error:
            log.warning("%s cannot decode JPEGs here (%s): using the next fastest", name, error)
        else:
            return name
    raise OSError("no library here decodes JPEGs: install simplejpeg, or a Pillow with libjpeg.")


def upright(pixels_HW3: Pixels, turned: int) -> Pixels:
    """Undo an orientation of EXIF: 2 mirrored, 3 upside down, 4 both, 5 to 8 the same transposed."""
    if turned == 1:
        return pixels_HW3
    if turned >= 5:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    flip_rows, flip_columns = turned in (3, 4, 7, 8), turned in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels_HW3[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _resized(pixels_HW3: Pixels, box: tuple[float, ...], size: int) -> Pixels:
    """Part of a picture as (3, size, size); in one that was decoded smaller, its edges may lie between pixels."""
    if any(edge != round(edge) for edge in box):
        top, left, bottom, right = box
        image = Image.fromarray(pixels_HW3)
        small = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
    top, left, bottom, right = map(round, box)
    return resized(pixels_HW3[top:bottom, left:right], size, size)
