"""Views: what a crop shows is what its box says. The picture is a ramp: red is the row, green the column."""

import numpy as np
import pytest
import torch

from bigtrain.data.decode import Picture
from bigtrain.data.views import CentreCrop, MultiCrop, RandomCrop, RandomResizedCrop, Resized, random_box
from bigtrain.models.network import normalised

HEIGHT, WIDTH = 240, 180


def ramp(height=HEIGHT, width=WIDTH):
    row, column = np.mgrid[:height, :width]
    return Picture.of(np.stack([row, column, 0 * row], axis=-1).astype(np.uint8))


def rng(seed=0):
    return np.random.default_rng(seed)


def centres(low, high, size):
    """Where the pixels of a view of the interval lie, in pixels of the picture (the first one's centre is 0)."""
    return low + (np.arange(size) + 0.5) * (high - low) / size - 0.5


def assert_shows(view_3HW, top, left, bottom, right):
    size = view_3HW.shape[-1]
    inside = slice(2, -2)  # at the picture's edges, bicubic does not give a ramp
    rows, columns = centres(top, bottom, size)[inside], centres(left, right, size)[inside]
    shown = view_3HW[:, inside, inside].astype(float)
    assert np.abs(shown[0] - rows[:, None]).max() <= 1
    assert np.abs(shown[1] - columns[None, :]).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(240, 180), (60, 250), (40, 40)])
def test_resized(height, width):
    """The resized picture shows the whole picture."""
    view = Resized(32)(ramp(height, width), rng())["image"]
    assert (view.dtype, view.shape) == (np.uint8, (3, 32, 32))
    assert_shows(view, 0, 0, height, width)


@pytest.mark.parametrize("seed", range(5))
def test_multi_crop_boxes(seed):
    """A crop shows the part of the picture that its box names."""
    views = MultiCrop(size=96, crop_size=24, crops=6, global_crops=2)(ramp(), rng(seed))
    assert_shows(views["image"], 0, 0, HEIGHT, WIDTH)
    for crops, boxes, count, size in (("crops", "boxes", 6, 24), ("global_crops", "global_boxes", 2, 96)):
        assert views[crops].shape == (count, 3, size, size)
        assert views[boxes].shape == (count, 4)
        for crop, box in zip(views[crops], views[boxes], strict=True):
            top, left, bottom, right = box * np.array([HEIGHT, WIDTH] * 2) / 96  # boxes are in pixels of `image`
            assert_shows(crop, top, left, bottom, right)


@pytest.mark.parametrize("scale", [(0.1, 0.3), (0.3, 1.0), (0.25, 0.25)])
def test_random_box(scale):
    """Random boxes lie inside the picture, and take the share of its area that was asked for."""
    boxes = np.array([random_box(96, 96, rng(seed), scale) for seed in range(500)])
    top, left, bottom, right = boxes.T
    assert (boxes >= 0).all() and (boxes <= 96).all()
    share = (bottom - top) * (right - left) / 96**2
    assert (share > scale[0] - 1e-9).all() and (share < scale[1] + 1e-9).all()
    if scale[1] <= 0.3:
        shape = (right - left) / (bottom - top)
        assert (shape > 0.75 - 1e-9).all() and (shape < 4 / 3 + 1e-9).all()
        assert shape.min() < 0.8 and shape.max() > 1.25
        assert top.min() < 3 and bottom.max() > 93 and left.min() < 3 and right.max() > 93
    assert share.max() - share.min() >= 0.8 * (scale[1] - scale[0])


@pytest.mark.parametrize(("height", "width"), [(20, 900), (900, 20), (1, 400)])
def test_elongated_picture(height, width):
    """In an elongated picture, a box keeps its share of the area at the expense of its aspect ratio."""
    for seed in range(200):
        top, left, bottom, right = random_box(height, width, rng(seed), (0.25, 1.0))
        assert 0 <= top <= bottom <= height and 0 <= left <= right <= width + 1e-9
        assert 0.25 - 1e-9 <= (bottom - top) * (right - left) / (height * width) <= 1 + 1e-9


def test_whole_pixels():
    """Crops lie on whole pixels, and are not empty, even in the smallest pictures."""
    for height, width in [(1, 1), (2, 3), (28, 28)]:
        views = MultiCrop(size=16, crop_size=8, crops=50)(ramp(height, width), rng())
        edges = views["boxes"] * np.array([height, width] * 2) / 16
        assert np.abs(edges - edges.round()).max() < 1e-4
        assert (views["boxes"][:, 2:] > views["boxes"][:, :2]).all() and views["boxes"].max() <= 16


def test_crops_by_generator():
    """Crops depend on the random generator alone."""
    views = [MultiCrop(32, 16, 2)(ramp(), rng(seed)) for seed in (0, 0, 1)]
    assert all(np.array_equal(views[0][name], views[1][name]) for name in views[0])
    assert not np.array_equal(views[0]["boxes"], views[2]["boxes"])


def test_random_resized_crop():
    """Random resized crops are mirrored half of the time, never upside down, and of all sizes."""
    mirrored, shares = 0, []
    for seed in range(300):
        view = RandomResizedCrop(16)(ramp(), rng(seed))["image"].astype(float)
        across, down = view[1, 8, 13] - view[1, 8, 2], view[0, 13, 8] - view[0, 2, 8]
        mirrored += across < 0
        assert down > 0  # never upside down
        shares.append(abs(across) * down / (11 / 16) ** 2 / (HEIGHT * WIDTH))
    assert 110 < mirrored < 190  # 150, five standard deviations are 43
    assert 0.22 < min(shares) < 0.35 and 0.85 < max(shares) < 1.03


@pytest.mark.parametrize("transform", [Resized(16), MultiCrop(16, 8, 2, global_crops=1), RandomResizedCrop(16)])
def test_blank(transform):
    """The blank views of a missing picture have the shapes and types of the others."""
    real, blank = transform(ramp(), rng()), transform.blank()
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}
    assert not any(v.any() for k, v in blank.items() if not k.endswith("boxes"))
    for name in {"boxes", "global_boxes"} & set(blank):
        top, left, bottom, right = blank[name].T
        assert (bottom > top).all() and (right > left).all()  # RoIAlign wants an area


def test_to_float_by_hand():
    view = torch.tensor([[[0, 255]], [[0, 255]], [[51, 102]]], dtype=torch.uint8)  # 51 = 0.2 x 255
    expected = torch.tensor([[[-1.0, 1.0]], [[-2.0, 2.0]], [[0.0, 0.8]]])
    found = normalised(view[None, None], mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.25))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0], expected)


def test_centre_crop():
    """The centre crop is the centre of the resized picture."""
    view = CentreCrop(28, 32)(ramp(), rng())["image"]
    assert (view.dtype, view.shape) == (np.uint8, (3, 28, 28))
    assert_shows(view, HEIGHT / 16, WIDTH / 16, HEIGHT * 15 / 16, WIDTH * 15 / 16)
    np.testing.assert_array_equal(CentreCrop(32, 32)(ramp(), rng())["image"], Resized(32)(ramp(), rng())["image"])


def test_random_crop():
    """Random crops have the centre crop's size, lie anywhere, and half are mirrored unless told not to."""
    views = np.stack([RandomCrop(24, 32)(ramp(), rng(seed))["image"] for seed in range(200)]).astype(float)
    top, bottom = views[:, 0, 2].mean(axis=1), views[:, 0, -3].mean(axis=1)
    assert bottom - top == pytest.approx(np.full(200, HEIGHT * 0.75 * 19 / 24), abs=2)
    assert top.min() < 20 and top.max() > 65  # an offset of up to 60, plus the third row
    is_mirrored = views[:, 1, :, 2].mean(axis=1) > views[:, 1, :, -3].mean(axis=1)
    assert 70 < is_mirrored.sum() < 130
    never = [RandomCrop(24, 32, mirror=False)(ramp(), rng(seed))["image"].astype(float) for seed in range(20)]
    assert all(view[1, :, 2].mean() < view[1, :, -3].mean() for view in never)
