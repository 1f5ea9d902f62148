"""What a build does with each picture: is it whole, how large is it as displayed, a smaller one where asked for."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

from bigtrain import images
from bigtrain.images import (
    SWAPS_SIDES,
    UnreadableError,
    check_range,
    load_pixels,
    open_image,
    orientation,
    to_rgb,
)
from bigtrain.jpeg import read_header

JPEG_QUALITY = 95  # of a re-encoded picture, without subsampling of colour
VERIFY = ("structure", "decode")
EXT_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
SMALLER_AS = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP", "HEIF": "JPEG", "AVIF": "JPEG", "JXL": "JPEG"}
OF_PNG = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I")  # modes that it can hold, beside 16-bit greys
REDUCING_GAP = 2.0  # a decoder or a box filter first brings a picture down to this many times its new size


class Treatment(NamedTuple):
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


class Treated(NamedTuple):
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
    """Width and height of a whole, usual JPEG without EXIF or XMP; None: Pillow has to look at it.

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
    check_range(image)
    width, height = displayed_size(image, encoded)
    if treatment.max_side is not None and max(width, height) > treatment.max_side:
        return smaller(image, encoded, treatment.max_side, treatment.quality)
    if treatment.verify == "decode" or not has_its_end(encoded, image.format):
        load_pixels(image)
    return Treated(encoded, ext, width, height)


def smaller(image: Image.Image, encoded: bytes, max_side: int, quality: int) -> Treated:
    """The picture with max_side pixels on its longer side, turned upright.

    It keeps its format where that is JPEG, PNG or WebP; other formats of photographs become JPEG, and the rest PNG. It
    keeps its EXIF but for the orientation, and its colour profile; of an animation the first frame. A JPEG is decoded
    at 1/2, 1/4 or 1/8 where that leaves REDUCING_GAP times the pixels asked for.
    """
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    kind = SMALLER_AS.get(image.format or "", "PNG")
    if kind == "JPEG" and image.mode not in ("L", "RGB", "CMYK"):
        kind = "PNG"  # transparent
    turned = orientation(image, encoded)
    image.draft(None, (round(size[0] * REDUCING_GAP), round(size[1] * REDUCING_GAP)))
    load_pixels(image)
    kept = {name: image.info[name] for name in ("exif", "icc_profile") if image.info.get(name)}
    try:
        small = resized(resizable(image, kind), size)
        if image.mode.startswith("I;16"):
            small = small.convert("I;16")
        if turned != 1:
            small.getexif()[ExifTags.Base.Orientation] = turned  # so that an orientation from XMP is applied too
            small = ImageOps.exif_transpose(small)
            kept["exif"] = without_orientation(image)
        file = io.BytesIO()
        kept = {name: value for name, value in kept.items() if value}
        small.save(file, kind, quality=quality, subsampling=0, exact=True, **kept)  # a format takes what it knows
    except (ValueError, OSError) as error:
        raise UnreadableError(f"cannot be made smaller: {error}") from error
    return Treated(file.getvalue(), EXT_OF[kind], *small.size)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Smaller; colours under transparent pixels stay what they are, for training sees them."""
    if image.mode in ("LA", "RGBA"):
        *bands, alpha = image.split()
        return Image.merge(
            image.mode, [*resized(Image.merge(image.mode[:-1], bands), size).split(), resized(alpha, size)]
        )
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


def resizable(image: Image.Image, kind: str) -> Image.Image:
    """The picture in a mode that can be filtered, and saved as this kind."""
    if not (image.mode in OF_PNG or image.mode.startswith("I;16") or (image.mode == "CMYK" and kind == "JPEG")):
        return Image.fromarray(to_rgb(image))
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
    except Exception:  # damaged EXIF is dropped, the picture is kept
        return b""


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
