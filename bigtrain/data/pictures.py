"""A picture from its encoded bytes: upright, RGB, 8 bits, decoded once and no larger than its views need.

JPEGs go to the fastest decoder there is (`jpeg_decoder`), every other format to Pillow; so does a JPEG that the fast
decoder refuses: CMYK, say, or one whose damage Pillow forgives. What nothing reads is an `UnreadableError`.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bigtrain.data.schema import MAX_PIXELS

log = logging.getLogger(__name__)

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels of the upright picture, half-open
Pixels = NDArray[np.uint8]

SPARE = 3  # times a view's side: no picture is decoded smaller than that (at 1/2, 1/4, 1/8 of its size)
ORIENTATION = 0x0112  # the EXIF tag
KINDS = ("not a picture", "damaged", "too many pixels", "unsupported")


class UnreadableError(Exception):
    """A picture that cannot be decoded; its message begins with one of KINDS."""

    def __init__(self, kind: str, what: object) -> None:
        super().__init__(f"{kind}: {what}")


class Picture:
    """A picture whose views are cut from it: `Picture(payload).cut([((0, 0, 50, 80), 32)])`.

    `height` and `width` are those of the picture as displayed. Its pixels are decoded by the first `cut`.

    Raises:
        UnreadableError: the header cannot be read, or tells of more than MAX_PIXELS pixels.
    """

    def __init__(self, payload: bytes, decoder: str | None = None) -> None:
        self._payload, self._decoder = payload, decoder or jpeg_decoder()
        self._image: Image.Image | None = None
        self._turned = 1
        size = jpeg_size(payload)
        if size is None:
            self._image = open_upright(payload)
            size = self._image.height, self._image.width
        else:
            self._turned = jpeg_orientation(payload)
        if size[0] * size[1] > MAX_PIXELS:
            raise UnreadableError("too many pixels", f"{size[1]} x {size[0]}, and at most {MAX_PIXELS} are decoded")
        self.height, self.width = size if self._turned < 5 else size[::-1]

    @classmethod
    def of(cls, image: Image.Image | Pixels) -> Picture:
        """A picture that is open already: an image of Pillow, or uint8 (H, W, 3) or (H, W)."""
        picture = cls.__new__(cls)
        picture._image = ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.width, picture.height = picture._image.size
        return picture

    def cut(self, views: Sequence[tuple[Box, int]]) -> list[Pixels]:
        """For each (box, size) that part of the picture as uint8 (3, size, size), bicubic with anti-aliasing.

        Beside Pillow's crop and resize of the same pixels, a photograph's view is off by 0.3 levels in the mean and 16
        at single hard edges (Pillow filters across before it filters down). Where all views are so small that a JPEG is
        decoded smaller: 1 in the mean over photographs, 6 over one of fine texture, 64 at single edges.
        """
        spare = min(min(box[2] - box[0], box[3] - box[1]) / size for box, size in views) / SPARE
        reduce = next(factor for factor in (8, 4, 2, 1) if factor <= max(spare, 1))
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
            return pillow_rgb(self._image)
        try:
            pixels_HW3 = JPEG_DECODERS[self._decoder](self._payload, reduce)
        except MemoryError:
            raise
        except Exception as refused:  # each library has errors of its own; Pillow, which reads most, has the last word
            log.debug("%s refuses a JPEG (%s): Pillow reads it", self._decoder, refused)
            return pillow_rgb(open_upright(self._payload))
        return upright(pixels_HW3, self._turned)


def _by_simplejpeg(payload: bytes, reduce: int) -> Pixels:
    height, width, *_ = simplejpeg.decode_jpeg_header(payload)
    # without a minimum it takes no notice of the factor
    least = {"min_height": -(-height // reduce), "min_width": -(-width // reduce)} if reduce > 1 else {}
    return simplejpeg.decode_jpeg(payload, colorspace="RGB", **least)


def _by_torchvision(payload: bytes, reduce: int) -> Pixels:
    """It decodes at full size only."""
    import torchvision.io

    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _by_pillow(payload: bytes, reduce: int) -> Pixels:
    image = Image.open(io.BytesIO(payload))
    if reduce > 1:
        image.draft("RGB", (-(-image.width // reduce), -(-image.height // reduce)))
    return np.array(image.convert("RGB"))


JPEG_DECODERS: dict[str, Callable[[bytes, int], Pixels]] = {  # the fastest first: tests/benchmarks/decoding.py
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
            log.warning("%s cannot decode JPEGs here (%s): the next fastest does", name, error)
        else:
            return name
    raise OSError("no library here decodes JPEGs: install simplejpeg, or a Pillow with libjpeg.")


def jpeg_segments(payload: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG before its pixels; none where the bytes are no JPEG."""
    at = 2
    while payload[:2] == b"\xff\xd8" and at + 4 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        if marker == 0xDA:  # the pixels
            return
        at = end


def jpeg_size(payload: bytes) -> tuple[int, int] | None:
    """Height and width in the frame header of a grey or colour JPEG, as stored; None for CMYK and for all else."""
    for marker, start, _ in jpeg_segments(payload):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and start + 6 <= len(payload):
            height, width = (int.from_bytes(payload[start + i : start + i + 2], "big") for i in (1, 3))
            return (height, width) if height and width and payload[start + 5] in (1, 3) else None
    return None


def jpeg_orientation(payload: bytes) -> int:
    """EXIF's orientation, 1 to 8; Pillow is asked only where there is a segment that can tell it."""
    if all(marker != 0xE1 for marker, _, _ in jpeg_segments(payload)):
        return 1
    try:
        return orientation(Image.open(io.BytesIO(payload)))
    except Exception:  # the decoder will say what is wrong
        return 1


def orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is no damage to the picture
        return 1
    return turned if turned in range(1, 9) else 1


def upright(pixels_HW3: Pixels, turned: int) -> Pixels:
    """Undo an orientation of EXIF: 2 mirrored, 3 upside down, 4 both, 5 to 8 the same transposed."""
    if turned == 1:
        return pixels_HW3
    if turned >= 5:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    flip_rows, flip_columns = turned in (3, 4, 7, 8), turned in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels_HW3[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def open_upright(payload: bytes) -> Image.Image:
    """Pillow's image; it is not decoded yet, unless it has to be turned upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of a file is not our log's business
            image = Image.open(io.BytesIO(payload))
            if image.width * image.height > MAX_PIXELS or (image.format == "PNG" and not may_be_turned(payload)):
                return image
            return ImageOps.exif_transpose(image) if orientation(image) != 1 else image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise unreadable(error) from error


def may_be_turned(png: bytes) -> bool:
    """Whether it says anything of an orientation; Pillow would decode a whole PNG to see."""
    return any(name in png for name in (b"eXIf", b"exif", b"xmp", b"EXIF"))


def pillow_rgb(image: Image.Image) -> Pixels:
    """RGB of 8 bits; 16-bit greys keep their high byte, an animation its first frame."""
    if image.mode == "F":
        raise UnreadableError("unsupported", "a picture of floating-point numbers, which have no given range")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "I" and image.format == "TIFF":
                raise UnreadableError("unsupported", "a picture of 32-bit integers, which have no given range")
            elif image.mode == "I":
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:
        raise unreadable(error) from error


def unreadable(error: Exception) -> UnreadableError:
    if isinstance(error, Image.DecompressionBombError):
        return UnreadableError("too many pixels", error)
    if isinstance(error, UnidentifiedImageError):
        return UnreadableError("not a picture", "its bytes are of no known format")
    return UnreadableError("damaged", f"{type(error).__name__}: {error}")


def _resized(pixels_HW3: Pixels, box: tuple[float, ...], size: int) -> Pixels:
    """Part of a picture as (3, size, size); in one that was decoded smaller, its edges may lie between pixels."""
    if any(edge != round(edge) for edge in box):
        top, left, bottom, right = box
        image = Image.fromarray(pixels_HW3)
        small = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
    top, left, bottom, right = map(round, box)
    part_HW3 = torch.from_numpy(pixels_HW3)[top:bottom, left:right]
    if part_HW3.shape[:2] == (size, size):
        return np.ascontiguousarray(part_HW3.permute(2, 0, 1).numpy())
    part_13HW = part_HW3.permute(2, 0, 1)[None]
    return F.interpolate(part_13HW, (size, size), mode="bicubic", antialias=True)[0].contiguous().numpy()
