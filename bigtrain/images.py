"""From the encoded bytes of an image to upright RGB with Pillow: the one way for stream, detectors, pages and shards.

What cannot be read is an `UnreadableError`, which says why in one of four KINDS. Needs no torch.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it would print its own lines on damaged pictures

Pixels = NDArray[np.uint8]  # (H, W, 3)

MAX_PIXELS = 89_478_485  # 256 MiB in RGB: more is refused as a decompression bomb (Pillow's own limit)
KINDS = ("not a picture", "damaged", "too many pixels", "unsupported")
FORMATS = {  # Pillow's name -> extensions. Bytes are tried as nothing else: Pillow would run PostScript, for one
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": (),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif"),
    "JXL": ("jxl",),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
PLUGINS = {
    "WEBP": "PIL.WebPImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "HEIF": "pillow_heif",
    "JXL": "pillow_jxl",
}  # the others are loaded by Pillow itself
EXTRAS = {"HEIF": "heif", "JXL": "jxl", "AVIF": ""}  # what may be missing: the extra of bigtrain that brings it
SIGNATURES = {
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "HEIF": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "JXL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
}
TURNED_BY_DECODER = ("TIFF", "JXL", "HEIF")  # their size is the displayed one, and their pixels come upright
SWAPS_SIDES = range(5, 9)  # orientations of EXIF that swap width and height
PNG_METADATA = (b"eXIf", b"exif", b"xmp", b"EXIF")


class UnreadableError(ValueError):
    """An image that cannot be decoded or used; the message begins with one of KINDS, or says what else is wrong."""


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Pillow's many errors on damaged input as an UnreadableError, and its warnings left out of our log."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (MemoryError, UnreadableError):
        raise
    except UnidentifiedImageError as error:  # its message is the address of the bytes
        raise UnreadableError("not a picture: its bytes are of no known format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"too many pixels: {error}") from error
    except Exception as error:
        raise UnreadableError(f"damaged: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What an error says, without addresses in memory; one of a single word or none gets its type too."""
    said = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    return said if " " in said else f"{type(error).__name__}: {said}".rstrip(": ")


def check_pixels(width: int, height: int) -> None:
    """Refuse an image of more than MAX_PIXELS, before it is decoded."""
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"too many pixels: {width} x {height}, and at most {MAX_PIXELS} are decoded")


def open_image(encoded: bytes) -> Image.Image:
    """Pillow's image of some bytes, as stored; its header is read, no pixel is decoded yet.

    Raises:
        UnreadableError: not an image, damaged, or of more than MAX_PIXELS.
    """
    if not encoded:
        raise UnreadableError("not a picture: the file is empty")
    for name, signature in SIGNATURES.items():
        if name not in readable_formats() and signature.match(encoded):
            extra = f"install bigtrain[{EXTRAS[name]}]" if EXTRAS[name] else "install a Pillow that has it"
            raise UnreadableError(f"unsupported: {name} is not read here: {extra}")
    with pillow_errors():
        image = Image.open(io.BytesIO(encoded), formats=readable_formats())
    check_pixels(*image.size)
    return image


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow and its plugins read."""
    Image.preinit()
    for module in PLUGINS.values():
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if module == "pillow_heif":
            plugin.register_heif_opener()
    silence_libtiff()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def silence_libtiff() -> None:
    """Have libtiff print no lines of its own on damaged files; Pillow's error says the same."""
    for library in (Path(PIL.__file__).parents[1] / "pillow.libs").glob("libtiff*"):  # of a wheel for Linux
        try:
            libtiff = ctypes.CDLL(str(library))
            libtiff.TIFFSetErrorHandler(None)
            libtiff.TIFFSetWarningHandler(None)
        except (OSError, AttributeError):
            return


def check_range(image: Image.Image) -> None:
    """Refuse numbers without a given range: floating point, or 32-bit integers in any but a format of 16-bit greys."""
    if image.mode == "F":
        raise UnreadableError("unsupported: a picture of floating-point numbers, which have no given range")
    if image.mode == "I" and image.format not in ("PPM", "PNG"):  # 16-bit greys
        raise UnreadableError("unsupported: a picture of 32-bit integers, which have no given range")


def load_pixels(image: Image.Image) -> None:
    """Decode every pixel."""
    with pillow_errors():
        image.load()


def orientation(image: Image.Image, encoded: bytes) -> int:
    """How the image has still to be turned: EXIF's orientation, 1 to 8; damaged EXIF is no damage to the image."""
    if image.format in TURNED_BY_DECODER:
        return 1
    if image.format == "PNG" and not any(name in encoded for name in PNG_METADATA):
        return 1  # Pillow would decode the whole image to look for it
    try:
        with warnings.catch_warnings(action="ignore"):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return turned if turned in range(1, 9) else 1


def orientation_of(encoded: bytes) -> int:
    """EXIF's orientation of encoded bytes; 1 where they cannot be read: decoding will say what is wrong."""
    try:
        return orientation(open_image(encoded), encoded)
    except UnreadableError:
        return 1


def open_upright(encoded: bytes) -> Image.Image:
    """The image as displayed; not decoded yet, unless it has to be turned.

    Raises:
        UnreadableError: as `open_image`.
    """
    image = open_image(encoded)
    with pillow_errors():
        return ImageOps.exif_transpose(image) if orientation(image, encoded) != 1 else image


def to_rgb(image: Image.Image) -> Pixels:
    """8-bit RGB of an open image: 16-bit greys keep their high byte, of an animation the first frame is taken.

    Raises:
        UnreadableError: damaged, or numbers without a given range (floating point, a TIFF of 32-bit integers).
    """
    check_range(image)
    with pillow_errors():
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def decode_rgb(encoded: bytes) -> Pixels:
    """Upright 8-bit RGB, (H, W, 3), of encoded bytes. Raises UnreadableError."""
    return to_rgb(open_upright(encoded))
