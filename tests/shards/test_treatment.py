"""Single pictures: truncation, EXIF orientation, and the odd formats found among millions of files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from bigtrain.data.schema import Box, Object, Sample
from bigtrain.images import UnreadableError, open_image, reason_of
from shards.pack import prepare
from shards.treatment import Treatment, checked, displayed_size

ORIENTATION, MAKE = ExifTags.Base.Orientation, ExifTags.Base.Make
SMALL = Treatment(max_side=50)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(width: int = 100, height: int = 60) -> Image.Image:
    """A white corner, so that every turn shows."""
    pixels_HW3 = np.zeros((height, width, 3), np.uint8)
    pixels_HW3[: height // 3, : width // 3] = 255
    return Image.fromarray(pixels_HW3)


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = orientation, "maker"
    return encoded(scene(), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    """A turned picture has its displayed size, and is upright when it is re-encoded."""
    original = turned(orientation, kind)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(original))).convert("RGB")
    kept = checked(original, "jpg", Treatment())
    assert kept.encoded is original
    assert (kept.width, kept.height) == upright.size == displayed_size(open_image(original), original)
    smaller = checked(original, "jpg", SMALL)
    found = Image.open(io.BytesIO(smaller.encoded))
    assert (smaller.width, smaller.height) == found.size == tuple(side // 2 for side in upright.size)
    assert found.getexif().get(MAKE) == "maker"
    assert found.getexif().get(ORIENTATION, 1) == 1
    expected_HW3 = np.asarray(upright.resize(found.size, Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(found.convert("RGB"), int) - expected_HW3).mean() < 1


def test_turned_boxes_masks():
    """Boxes and masks of a turned picture are in pixels as displayed."""
    mask = encoded(Image.fromarray(np.arange(100 * 60, dtype=np.uint8).reshape(100, 60)), "PNG")
    sample = Sample("a", turned(6), "jpg", [Object("x", Box(0, 0, 100, 60))], mask=mask)
    picture, members, _ = prepare(sample, SMALL)
    assert (picture.width, picture.height) == (30, 50)
    assert b"[0.0,0.0,50.0,30.0" in dict(members)["json"]
    assert Image.open(io.BytesIO(dict(members)["mask.png"])).size == (30, 50)
    lying = encoded(Image.new("L", (100, 60)), "PNG")
    with pytest.raises(UnreadableError, match="mask is 100 x 60, the picture as displayed 60 x 100"):
        prepare(Sample("a", turned(6), "jpg", mask=lying), SMALL)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("verify", ["structure", "decode"])
def test_truncated(kind, verify):
    """A picture cut short is found by its structure as well as by decoding."""
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    whole = encoded(Image.fromarray(pixels_HW3), kind)
    assert checked(whole, "jpg", Treatment(verify=verify)).width == 100
    for keep in (0.3, 0.9):
        with pytest.raises(UnreadableError):
            checked(whole[: int(keep * len(whole))], "jpg", Treatment(verify=verify))


def test_truncated_with_preview():
    """A preview in the header does not hide that the picture is cut."""
    preview = encoded(scene(), "JPEG")
    exif = b"Exif\0\0" + preview
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8))
    whole = encoded(noise, "JPEG")
    with_preview = whole[:2] + segment + whole[2:]
    assert checked(with_preview, "jpg", Treatment()).width == 100
    with pytest.raises(UnreadableError, match="truncated"):
        checked(with_preview[:-500], "jpg", Treatment())
    assert checked(with_preview + b"\0" * 100, "jpg", Treatment()).width == 100  # trailing bytes do no harm


def test_verify_decode():
    """Only decoding finds damage in the middle of a picture."""
    damaged = bytearray(encoded(scene(), "PNG"))
    place = damaged.index(b"IDAT") + 10
    damaged[place : place + 8] = b"\xff" * 8
    assert checked(bytes(damaged), "png", Treatment()).width == 100
    with pytest.raises(UnreadableError):
        checked(bytes(damaged), "png", Treatment(verify="decode"))


def test_decompression_bomb():
    """A decompression bomb is refused, with its size, before it is decoded."""
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    for treatment in (Treatment(), Treatment(max_side=10)):
        with pytest.raises(UnreadableError, match=r"too many pixels: .*400000000"):
            checked(bomb, "png", treatment)
    with pytest.raises(UnreadableError, match="too many pixels: 10000 x 9000"):
        checked(encoded(Image.new("1", (10000, 9000)), "PNG"), "png", Treatment())


def test_a_million_by_one_is_a_picture():
    line = encoded(Image.new("RGB", (1_000_000, 1)), "PNG")
    assert checked(line, "png", Treatment()).width == 1_000_000
    small = checked(line, "png", SMALL)
    assert (small.width, small.height) == (50, 1)


def test_shrink_pixel_modes():
    """CMYK, 16-bit, palette, bilevel and transparent pictures are made smaller in a fitting mode."""
    ramp_HW = np.linspace(0, 65535, 6000).reshape(60, 100).astype(np.uint16)
    for image, kind, mode in [
        (scene().convert("CMYK"), "JPEG", "CMYK"),
        (Image.fromarray(ramp_HW), "PNG", "I;16"),
        (scene().quantize(8), "PNG", "RGB"),
        (scene().convert("1"), "PNG", "L"),
        (scene().convert("LA"), "PNG", "LA"),
    ]:
        small = checked(encoded(image, kind), "x", SMALL)
        found = Image.open(io.BytesIO(small.encoded))
        assert (found.mode, found.size) == (mode, (50, 30))
    small = checked(encoded(Image.fromarray(ramp_HW), "PNG"), "png", SMALL)
    assert np.asarray(Image.open(io.BytesIO(small.encoded))).mean() == pytest.approx(ramp_HW.mean(), rel=0.01)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation(kind):
    """Of an animation that is made smaller, the first frame is kept."""
    frames = [Image.new("RGB", (100, 60), colour) for colour in ("red", "lime")]
    small = checked(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "x", SMALL)
    found = Image.open(io.BytesIO(small.encoded))
    assert getattr(found, "n_frames", 1) == 1
    assert found.convert("RGB").getpixel((5, 5))[0] > 250


def test_quality():
    """The quality sets the size in bytes of what is re-encoded."""
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)), "JPEG")
    sizes = [len(checked(noise, "jpg", Treatment(max_side=50, quality=quality)).encoded) for quality in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the file is empty"), (b"hello", "its bytes are of no known format")],
    ids=["empty", "text"],
)
def test_not_a_picture(data, reason):
    """The reason given for a file that is not a picture is the same in every process."""
    with pytest.raises(UnreadableError, match=f"^not a picture: {reason}$"):
        checked(data, "jpg", Treatment())


def test_reason_of():
    """A reason has no memory address and is never a bare word without the name of its error."""
    assert reason_of(OSError("cannot read <BytesIO object at 0x7f12ab>")) == "cannot read <BytesIO object>"
    assert reason_of(KeyError("exif")) == "KeyError: 'exif'"
    assert reason_of(MemoryError()) == "MemoryError"
