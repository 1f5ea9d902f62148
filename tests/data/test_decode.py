"""Pictures of every kind, against Pillow: the same pixels, or a refusal that says why."""

import io
import logging
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from bigtrain.data import decode
from bigtrain.data.decode import JPEG_DECODERS, Picture, jpeg_decoder
from bigtrain.data.views import on_pixels, random_box
from bigtrain.images import KINDS, UnreadableError


def painted(height=90, width=120, seed=0):
    """A smooth image, like a photograph: noise would expose decoder differences that nobody can see."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(picture, size):
    (view_3HW,) = picture.cut([((0, 0, picture.height, picture.width), size)])
    return view_3HW


def assert_is(payload, expected, decoder=None):
    """Assert that size and pixels equal those of `expected`, a Pillow RGB image."""
    picture = Picture(payload, decoder)
    assert (picture.width, picture.height) == expected.size
    assert np.array_equal(np.asarray(picture.rgb()), np.asarray(expected))


@pytest.mark.parametrize("decoder", JPEG_DECODERS)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_decoders_match_pillow(decoder, subsampling):
    """Every JPEG decoder gives the pixels that Pillow gives."""
    payload = encoded(painted(), quality=90, subsampling=subsampling)
    assert_is(payload, Image.open(io.BytesIO(payload)).convert("RGB"), decoder)


@pytest.mark.parametrize("decoder", JPEG_DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(decoder, orientation):
    """A picture is upright, whatever orientation its EXIF states."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(painted(), exif=exif)
    assert_is(payload, ImageOps.exif_transpose(Image.open(io.BytesIO(payload))), decoder)


def test_damaged_exif():
    """A picture with damaged EXIF is decoded all the same."""
    payload = encoded(painted(), exif=b"Exif\0\0" + b"\xff" * 40)
    assert_is(payload, Image.open(io.BytesIO(payload)).convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("decoder", JPEG_DECODERS)
def test_grey_and_cmyk_jpegs_become_rgb(mode, decoder):
    payload = encoded(painted().convert(mode))
    assert_is(payload, Image.open(io.BytesIO(payload)).convert("RGB"), decoder)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_modes_become_rgb(mode):
    """Pictures of every mode become RGB as Pillow converts them."""
    payload = encoded(painted().convert(mode), "TIFF")
    assert_is(payload, Image.open(io.BytesIO(payload)).convert("RGB"))


@pytest.mark.parametrize(("kind", "maximum"), [("PNG", 65535), ("PPM", 65535), ("TIFF", 65535)])
def test_16_bit_grey(kind, maximum):
    """Greys of 16 bits keep their high byte."""
    grey = np.linspace(0, maximum, 300).astype(np.uint16).reshape(15, 20)
    shown = np.asarray(Picture(encoded(Image.fromarray(grey), kind)).rgb())
    assert np.array_equal(shown, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_animation():
    """An animation shows its first frame."""
    payload = encoded(Image.new("RGB", (9, 7), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 7))])
    assert_is(payload, Image.new("RGB", (9, 7), "red"))


def test_extreme_aspect_ratio():
    """A picture of a million by one pixels still has views."""
    view = whole(Picture(encoded(Image.new("RGB", (1_000_000, 1), (10, 200, 30)), "PNG")), 16)
    assert (view == np.array([10, 200, 30]).reshape(3, 1, 1)).all()


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def jpeg_of_size(width, height):
    payload = bytearray(encoded(Image.new("RGB", (16, 16))))
    at = payload.index(b"\xff\xc0") + 5
    payload[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(payload)


@pytest.mark.parametrize("payload", [png_header(12_000, 10_000), jpeg_of_size(12_000, 10_000)], ids=["png", "jpeg"])
def test_decompression_bomb(payload):
    """A decompression bomb is refused, with its size."""
    with pytest.raises(UnreadableError, match=r"too many pixels: 12000 x 10000, and at most 89478485 are decoded"):
        Picture(payload)


def test_bomb_beyond_pillow_limit():
    """A bomb beyond Pillow's own limit is refused as one, too."""
    with pytest.raises(UnreadableError, match=r"too many pixels: .*10000000000"):
        Picture(png_header(100_000, 100_000))


@pytest.mark.parametrize("decoder", JPEG_DECODERS)
@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (encoded(painted())[:-400], "damaged"),
        (encoded(painted(), "PNG")[:-400], "damaged"),
        (b"", "not a picture"),
        (b"\xff\xd8\xff", "not a picture"),
        (b"<html>", "not a picture"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported"),
    ],
    ids=["truncated jpeg", "truncated png", "empty", "three bytes", "html", "floats"],
)
def test_undecodable(payload, kind, decoder):
    """What cannot be decoded is refused with one of the stated kinds of reason."""
    assert kind in KINDS
    with pytest.raises(UnreadableError, match=rf"^{kind}: "):
        whole(Picture(payload, decoder), 8)


def test_truncated_jpeg():
    """A JPEG that is cut short, at whatever length, is refused as unreadable."""
    payload = encoded(painted(40, 50))
    for length in range(0, len(payload), 7):
        with pytest.raises(UnreadableError):
            whole(Picture(payload[:length]), 8)


def test_bicubic():
    """Views are within 2 levels of Pillow's bicubic, or within 3 where they enlarge."""
    payload = encoded(painted(), "PNG")
    boxes = [((0, 0, 90, 120), 32), ((10, 20, 61, 77), 32), ((5, 5, 8, 9), 24), ((0, 0, 32, 32), 32)]
    for view_3HW, ((top, left, bottom, right), size) in zip(Picture(payload).cut(boxes), boxes, strict=True):
        expected = painted().resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        apart = np.abs(view_3HW.astype(int) - np.asarray(expected).transpose(2, 0, 1)).max()
        assert apart <= (3 if bottom - top < size else 2)


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_reduced_decoding(decoder, monkeypatch):
    """A JPEG much larger than its views is decoded at reduced size, and the views barely change."""
    payload = encoded(painted(800, 1200), quality=95)
    asked = []
    decode = JPEG_DECODERS[decoder]
    monkeypatch.setitem(JPEG_DECODERS, decoder, lambda p, reduce: asked.append(reduce) or decode(p, reduce))
    small = whole(Picture(payload, decoder), 32)
    crop, _ = Picture(payload, decoder).cut([((100, 200, 500, 700), 48), ((0, 0, 800, 1200), 48)])
    both = Picture(payload, decoder).cut([((0, 0, 800, 1200), 32), ((0, 0, 65, 65), 32)])
    assert asked == [8, 2, 1]  # at most side of box / side of view / 3: 8.3, 2.8, 0.7
    full = Picture(encoded(Image.open(io.BytesIO(payload)), "PNG"))
    assert np.abs(small.astype(int) - whole(full, 32)).max() <= 3
    (expected,) = full.cut([((100, 200, 500, 700), 48)])
    assert np.abs(crop.astype(int) - expected).max() <= 6
    assert np.abs(both[0].astype(int) - whole(full, 32)).max() <= 2


@pytest.mark.skipif("BIGTRAIN_TEST_DATA" not in os.environ, reason="BIGTRAIN_TEST_DATA names no folder of real data")
@pytest.mark.parametrize("size", [32, 64, 224])
def test_photographs(size, monkeypatch):
    """Views of photographs are those of Pillow within the stated tolerance."""
    rng, reduced, means = np.random.default_rng(0), [], []
    decode = JPEG_DECODERS["simplejpeg"]
    monkeypatch.setitem(JPEG_DECODERS, "simplejpeg", lambda p, reduce: reduced.append(reduce) or decode(p, reduce))
    with tarfile.open(Path(os.environ["BIGTRAIN_TEST_DATA"]) / "coco-sample.tar.gz") as tar:
        photographs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")][:40]
    for payload in photographs:
        picture = Picture(payload, "simplejpeg")
        box = on_pixels(np.array(random_box(picture.height, picture.width, rng, (0.25, 1.0))), picture)
        (view_3HW,) = picture.cut([(box, size)])
        part = Image.open(io.BytesIO(payload)).convert("RGB").crop((box[1], box[0], box[3], box[2]))
        expected_HW3 = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
        apart = np.abs(view_3HW.astype(int) - expected_HW3.transpose(2, 0, 1))
        assert apart.max() <= (64 if reduced[-1] > 1 else 16)
        means.append(apart.mean())
        assert means[-1] <= (6 if reduced[-1] > 1 else 0.3)
    assert np.mean(means) < 1
    assert (max(reduced) > 1) == (size < 224)


def test_32_bit_integers():
    """Integers of 32 bits, which have no known range, are refused rather than shown as black."""
    payload = encoded(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "TIFF")
    with pytest.raises(UnreadableError, match="unsupported: a picture of 32-bit integers"):
        whole(Picture(payload), 8)


def test_size_without_decoding(monkeypatch):
    """A picture that is stored upright is not decoded to learn its size."""
    payload = encoded(painted(), "PNG")
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert (Picture(payload).height, Picture(payload).width) == (90, 120)


def test_picture_of():
    """An open image, turned upright by its EXIF, and its array are pictures with the same views."""
    image = painted()
    image.getexif()[0x0112] = 6
    assert Picture.of(image).height == 120
    assert np.array_equal(whole(Picture.of(painted()), 16), whole(Picture.of(np.asarray(painted())), 16))


@pytest.fixture
def chosen_anew():
    jpeg_decoder.cache_clear()
    yield
    jpeg_decoder.cache_clear()


def test_decoder_fallback(chosen_anew, monkeypatch, caplog):
    """A decoder that does not work here is replaced by the next, and one warning names it."""

    def broken(payload, reduce):
        raise OSError("no such library")

    assert jpeg_decoder() == "simplejpeg"
    jpeg_decoder.cache_clear()
    monkeypatch.setitem(JPEG_DECODERS, "simplejpeg", broken)
    with caplog.at_level(logging.WARNING, logger=decode.__name__):
        assert jpeg_decoder() == "torchvision"
        assert jpeg_decoder() == "torchvision"
    assert [record.getMessage() for record in caplog.records] == [
        "simplejpeg cannot decode JPEGs here (no such library): using the next fastest"
    ]
