"""One picture: is it whole, how large is it as displayed, and a smaller one where asked for."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from bigtrain.data.schema import MAX_PIXELS

JPEG_QUALITY = 95  # of a re-encoded picture, without subsampling of colour
VERIFY = ("structure", "decode")
TURNED = range(5, 9)  # values of EXIF's orientation that exchange width and height
EXT_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
START_OF_SCAN, APP1, END_OF_JPEG = 0xDA, 0xE1, b"\xff\xd9"
FRAMES = (0xC0, 0xC1, 0xC2)  # of JPEG: baseline, extended, progressive
REDUCING_GAP = 2.0  # a decoder or a box filter first brings a picture down to this many times its new size


class UnreadableError(Exception):
    """A picture that is skipped, counted and named; the message is the reason."""


@dataclass(frozen=True)
class Treatment:
    """What is done with each picture.

    Args:
        max_side: re-encode what is longer, in pixels; None: all keep their bytes.
        quality: of a re-encoded JPEG or WebP, 1 to 100.
        verify: "structure": the header, and that the file has its end, which finds what was cut short; "decode": every
            pixel. A picture whose format has no mark of its end is decoded either way.
    """

    max_side: int | None = None
    quality: int = JPEG_QUALITY
    verify: str = "structure"


@dataclass(frozen=True)
class Picture:
    """Encoded bytes, and the size as displayed, after EXIF's orientation."""

    encoded: bytes
    ext: str
    width: int
    height: int


def decode(encoded: bytes) -> Image.Image:
    """Decode every pixel as stored, or raise: truncated, no picture, or more than MAX_PIXELS."""
    image = opened(encoded)
    load(image)
    return image


def opened(encoded: bytes) -> Image.Image:
    """Read the header; no pixel is decoded yet."""
    if not encoded:
        raise UnreadableError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message is the address of the bytes
        raise UnreadableError("no picture format that can be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"too many pixels: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise UnreadableError(reason_of(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"too many pixels: {width} x {height}, and at most {MAX_PIXELS} are read")
    return image


def load(image: Image.Image) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What an error says, without addresses in memory; one that says but a word or nothing is named too."""
    said = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    return said if " " in said else f"{type(error).__name__}: {said}".rstrip(": ")


def read_size(encoded: bytes) -> tuple[int, int]:
    """Width and height as displayed, from the header alone."""
    image = opened(encoded)
    return displayed_size(image, encoded)


def displayed_size(image: Image.Image, encoded: bytes) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation(image, encoded) in TURNED else (width, height)


def orientation(image: Image.Image, encoded: bytes) -> int:
    """EXIF's orientation, 1 to 8; damaged EXIF is no damage to the picture."""
    if image.format == "PNG" and not any(name in encoded for name in (b"eXIf", b"exif", b"xmp", b"EXIF")):
        return 1  # Pillow would decode the whole picture to look for it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return turned if turned in range(1, 9) else 1


def has_its_end(encoded: bytes, kind: str | None) -> bool:
    """Whether a file goes on to the mark of its end, as far as its format has one; cheap, for it looks at few bytes."""
    if kind in ("JPEG", "MPO"):  # what is behind the picture's own end (a preview, zeros) does no harm
        scan = jpeg_scan(encoded)
        return scan is not None and encoded.rfind(END_OF_JPEG, scan) > 0
    if kind == "PNG":
        return encoded.rfind(b"IEND\xae\x42\x60\x82") > 0
    if kind == "WEBP":
        return int.from_bytes(encoded[4:8], "little") + 8 <= len(encoded)
    return False


def jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG up to its first scan."""
    place = 2
    while place + 4 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # padding
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no content
            place += 2
        else:
            yield marker, place
            if marker == START_OF_SCAN:
                return
            place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")


def jpeg_scan(encoded: bytes) -> int | None:
    """Where the first scan of a JPEG begins; a preview in an earlier segment has an end of its own."""
    return next((place for marker, place in jpeg_segments(encoded) if marker == START_OF_SCAN), None)


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG of the usual kind that nothing turns; None: Pillow has to look at it.

    That is most of the pictures of most collections, and takes a tenth of Pillow's time.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    size = None
    for marker, place in jpeg_segments(encoded):
        if marker == APP1 or place + 10 > len(encoded):  # EXIF or XMP, which may turn it; or cut short
            return None
        if marker in FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", encoded, place + 4)
            size = (width, height) if bits == 8 and colours in (1, 3) and 0 < width * height <= MAX_PIXELS else None
        elif marker == START_OF_SCAN:
            return size if encoded.rfind(END_OF_JPEG, place) > 0 else None
    return None


def checked(encoded: bytes, ext: str, treatment: Treatment) -> Picture:
    """The picture with its original bytes, or, if its longer side exceeds max_side, a smaller one."""
    size = plain_size(encoded) if treatment.verify == "structure" else None
    if size is not None and (treatment.max_side is None or max(size) <= treatment.max_side):
        return Picture(encoded, ext, *size)
    image = opened(encoded)
    width, height = displayed_size(image, encoded)
    if treatment.max_side is not None and max(width, height) > treatment.max_side:
        return smaller(image, encoded, treatment.max_side, treatment.quality)
    if treatment.verify == "decode" or not has_its_end(encoded, image.format):
        load(image)
    return Picture(encoded, ext, width, height)


def smaller(image: Image.Image, encoded: bytes, max_side: int, quality: int) -> Picture:
    """The picture with max_side pixels on its longer side, turned upright.

    It keeps its format where that is JPEG, PNG or WebP and becomes PNG otherwise, its EXIF but for the orientation, and
    its colour profile; of an animation the first frame. A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves
    REDUCING_GAP times the pixels asked for.
    """
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    kind = {"MPO": "JPEG"}.get(image.format or "", image.format or "")
    kind = kind if kind in EXT_OF else "PNG"
    turned = orientation(image, encoded)
    image.draft(None, (round(size[0] * REDUCING_GAP), round(size[1] * REDUCING_GAP)))
    load(image)
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
    try:
        small = resizable(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
        if image.mode.startswith("I;16"):
            small = small.convert("I;16")
        if turned != 1:
            small.getexif()[ExifTags.Base.Orientation] = turned  # so that XMP's counts as well
            small = ImageOps.exif_transpose(small)
            kept["exif"] = without_orientation(image)
        options: dict[str, Any] = {
            "JPEG": {"quality": quality, "subsampling": 0},
            "WEBP": {"quality": quality},
            "PNG": {},
        }[kind]
        file = io.BytesIO()
        small.save(file, kind, **{name: value for name, value in kept.items() if value}, **options)
    except (ValueError, OSError) as error:
        raise UnreadableError(f"cannot be made smaller: {error}") from error
    return Picture(file.getvalue(), EXT_OF[kind], *small.size)


def resizable(image: Image.Image) -> Image.Image:
    """The picture in a mode that can be filtered."""
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if image.mode == "1":
        return image.convert("L")
    return image.convert("I") if image.mode.startswith("I;16") else image


def without_orientation(image: Image.Image) -> bytes:
    try:
        exif = image.getexif()
        exif.pop(ExifTags.Base.Orientation, None)
        return exif.tobytes() if len(exif) else b""
    except Exception:  # damaged: the picture is worth more than what is left of it
        return b""


def checked_mask(encoded: bytes, displayed: tuple[int, int], size: tuple[int, int]) -> bytes:
    """The mask's original bytes, or nearest-neighbour resized along with its picture, as PNG."""
    mask = opened(encoded)
    if mask.size != displayed:
        raise UnreadableError(
            f"its mask is {mask.size[0]} x {mask.size[1]}, the picture as displayed {displayed[0]} x {displayed[1]}"
        )
    if displayed == size and mask.format == "PNG":
        if not has_its_end(encoded, "PNG"):
            load(mask)
        return encoded
    load(mask)
    file = io.BytesIO()
    mask.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
