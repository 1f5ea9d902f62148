"""One picture: can all of it be decoded, how large is it, and a smaller one where asked for."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace

from PIL import Image

from bigtrain.data.schema import Box, Object

JPEG_QUALITY = 95  # of a re-encoded picture, without subsampling of colour


class UnreadableError(Exception):
    """A picture that is skipped, counted and named; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    encoded: bytes
    ext: str
    width: int
    height: int


def decode(encoded: bytes) -> Image.Image:
    """Decode every pixel, or raise: truncated, no picture, or more pixels than Pillow's MAX_IMAGE_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableError(f"too many pixels: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    return image


def read_size(encoded: bytes) -> tuple[int, int]:
    """Width and height from the header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(encoded)).size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableError(f"too many pixels: {error}") from error
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def checked(encoded: bytes, ext: str, max_side: int | None = None) -> Picture:
    """The picture with its original bytes, or, if its longer side exceeds max_side, a smaller one.

    A smaller one keeps its format where that is JPEG, PNG or WebP and becomes PNG otherwise; it keeps EXIF
    and colour profile.
    """
    image = decode(encoded)
    width, height = image.size
    if max_side is None or max(width, height) <= max_side:
        return Picture(encoded, ext, width, height)
    scale = max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = image.format if image.format in ("JPEG", "PNG", "WEBP") else "PNG"
    options = {"PNG": {}, "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0}, "WEBP": {"quality": JPEG_QUALITY}}[kind]
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
    try:
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        elif image.mode == "1":
            image = image.convert("L")
        file = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).save(file, kind, **kept, **options)
    except (ValueError, OSError) as error:
        raise UnreadableError(f"cannot be made smaller: {error}") from error
    ext_of = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    return Picture(file.getvalue(), ext_of, *size)


def checked_mask(encoded: bytes, original_size: tuple[int, int], size: tuple[int, int]) -> bytes:
    """The mask's original bytes, or nearest-neighbour resized along with its picture, as PNG."""
    mask = decode(encoded)
    if mask.size != original_size:
        raise UnreadableError(
            f"its mask is {mask.size[0]} x {mask.size[1]}, the picture {original_size[0]} x {original_size[1]}"
        )
    if original_size == size and mask.format == "PNG":
        return encoded
    file = io.BytesIO()
    mask.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def scaled(thing: Object, across: float, down: float) -> Object:
    """An object's box in the pixels of the smaller picture."""
    if thing.box is None:
        return thing
    box = thing.box
    return replace(
        thing,
        box=Box(*(round(v, 3) for v in (box.top * down, box.left * across, box.bottom * down, box.right * across))),
    )
