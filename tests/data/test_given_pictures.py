"""What a picture may be for `score`, and what is said of anything else."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.data.views import Resized
from bigtrain.detectors.pictures import check_several, opened
from bigtrain.images import UnreadableError

PIXELS_HW3 = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY_HW = PIXELS_HW3[..., 0]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


ENCODED = png(Image.fromarray(PIXELS_HW3))
GIVEN = {
    "bytes": ENCODED,
    "bytearray": bytearray(ENCODED),
    "file": io.BytesIO(ENCODED),
    "PIL": Image.fromarray(PIXELS_HW3),
    "HW3": PIXELS_HW3,
    "HW4": np.dstack([PIXELS_HW3, GREY_HW]),
    "strides": PIXELS_HW3[::-1][::-1],
    "3HW": torch.from_numpy(PIXELS_HW3).permute(2, 0, 1),
}
GREYS = {
    "HW": GREY_HW,
    "HW1": GREY_HW[..., None],
    "1HW": torch.from_numpy(GREY_HW)[None],
    "tensor": torch.from_numpy(GREY_HW),
}
WRONG = {
    "float": PIXELS_HW3 / 255,
    "uint16": PIXELS_HW3.astype(np.uint16),
    "bool": PIXELS_HW3 > 9,
    "float tensor": torch.rand(3, 8, 8),
    "two channels": PIXELS_HW3[..., :2],
    "channels last": torch.from_numpy(PIXELS_HW3),
    "four axes": PIXELS_HW3[None, None],
    "no pixels": PIXELS_HW3[:0],
    "floats of Pillow": Image.new("F", (8, 8)),
    "integers of Pillow": Image.new("I", (8, 8)),
    "number": 3,
    "list": [1, 2],
    "none": None,
    "text file": io.StringIO("x"),
    "no bytes": b"",
    "html": b"<html>",
    "missing": "nowhere/x.jpg",
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_colours(given):
    """Every way to give a picture gives its pixels."""
    assert np.array_equal(np.asarray(opened(given).rgb()), PIXELS_HW3)


@pytest.mark.parametrize("given", GREYS.values(), ids=GREYS)
def test_greys(given):
    """Greys too."""
    assert np.array_equal(np.asarray(opened(given).rgb()), np.repeat(GREY_HW[..., None], 3, axis=2))


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_anything_else(given):
    """Anything else is refused in a sentence."""
    with pytest.raises(UnreadableError, match=r"\w+ \w+"):
        opened(given).rgb()


@pytest.mark.parametrize(
    "given", ["a.jpg", b"x", PIXELS_HW3, GREY_HW, Image.new("L", (9, 9)), {"a": 1}, 7, io.BytesIO()]
)
def test_a_single_picture(given):
    """One picture where several are scored is not taken for its letters, bytes or rows."""
    with pytest.raises(ValueError, match=r"several pictures are scored.*\[picture\]"):
        check_several(given)


def test_a_folder(tmp_path):
    """A folder is told how to be given."""
    with pytest.raises(ValueError, match=r"sorted\(folder\.glob"):
        check_several(tmp_path)


def test_file_as_its_array():
    """A large JPEG gives the views of its pixels once it is decoded whole, and nearly these when it is not."""
    large = np.kron(PIXELS_HW3, np.ones((64, 64, 1), np.uint8))
    file = io.BytesIO()
    Image.fromarray(large).save(file, "JPEG", quality=90)
    rng, view = np.random.default_rng(0), Resized(32)
    whole = view(Picture(file.getvalue(), reduced=False), rng)["image"]
    array = view(Picture.of(np.asarray(Picture(file.getvalue()).rgb())), rng)["image"]
    assert np.array_equal(whole, array)
    assert not np.array_equal(view(Picture(file.getvalue()), rng)["image"], array)
