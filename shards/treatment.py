"""What a build does with each picture: is it whole, how large is it as displayed, a smaller one where asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, ImageOps

from bigtrain import images
from bigtrain.images import SWAPS_SIDES, UnreadableError, load_pixels, open_image, orientation
from bigtrain.jpeg import read_header

JPEG_QUALITY = 95  # of a re-encoded picture, without subsampling of colour
VERIFY = ("structure", "decode")
EXT_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
REDUCING_GAP = 2.0  # a decoder or a box filter first brings a picture down to this many times its new size


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
class Treated:
    """A picture as it goes into a shard: encoded bytes, and the size as displayed, after EXIF's orientation."""

    encoded: bytes
    ext: str
    width: int
    height: int


def displayed_size(image: Image.Image, encoded: bytes) -> tuple[int, int]:
    """Width and height as displayed, from the header alone."""
    width, height = image.size
    return (height, width) if orientation(image, encoded) in SWAPS_SIDES else (width, height)


def has_its_end(encoded: bytes, kind: str | None) -> bool:
    """Whether a file goes on to the mark of its end, as far as its format has one; cheap, for it looks at few bytes."""
    if kind in ("JPEG", "MPO"):
        header = read_header(encoded)
        return header is not None and header.is_complete(encoded)
    if kind == "PNG":
        return encoded.rfind(b"IEND\xae\x42\x60\x82") > 0
    if kind == "WEBP":
        return int.from_bytes(encoded[4:8], "little") + 8 <= len(encoded)
    return False


def plain_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG of the usual kind that nothing turns; None: Pillow has to look at it.

    That is most of the pictures of most collections.
    """
    header = read_header(encoded)
    if header is None or header.has_app1 or not header.is_usual or header.bits != 8 or header.channels not in (1, 3):
        return None
    is_whole = 0 < header.width * header.height <= images.MAX_PIXELS and header.is_complete(encoded)
    return (header.width, header.height) if is_whole else None


def checked(encoded: bytes, ext: str, treatment: Treatment) -> Treated:
    """The picture with its original bytes, or, if its longer side exceeds max_side, a smaller one."""
    size = plain_size(encoded) if treatment.verify == "structure" else None
    if size is not None and (treatment.max_side is None or max(size) <= treatment.max_side):
        return Treated(encoded, ext, *size)
    image = open_image(encoded)
    width, height = displayed_size(image, encoded)
    if treatment.max_side is not None and max(width, height) > treatment.max_side:
        return smaller(image, encoded, treatment.max_side, treatment.quality)
    if treatment.verify == "decode" or not has_its_end(encoded, image.format):
        load_pixels(image)
    return Treated(encoded, ext, width, height)


def smaller(image: Image.Image, encoded: bytes, max_side: int, quality: int) -> Treated:
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
    load_pixels(image)
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
    return Treated(file.getvalue(), EXT_OF[kind], *small.size)


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
    mask = open_image(encoded)
    if mask.size != displayed:
        raise UnreadableError(
            f"its mask is {mask.size[0]} x {mask.size[1]}, the picture as displayed {displayed[0]} x {displayed[1]}"
        )
    if displayed == size and mask.format == "PNG":
        if not has_its_end(encoded, "PNG"):
            load_pixels(mask)
        return encoded
    load_pixels(mask)
    file = io.BytesIO()
    mask.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
