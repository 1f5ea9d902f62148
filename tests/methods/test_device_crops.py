"""Crops that are cut on the device: where they lie, and what they show."""

import numpy as np
import torch

from bigtrain.data.views import MultiCrop, random_box
from bigtrain.methods.defend.device_crops import DeviceCrops, cut, random_boxes


def test_boxes_as_drawn_elsewhere():
    """From the same numbers come the boxes that `data.views.random_box` draws."""

    class Numbers:
        def __init__(self, numbers):
            self.numbers = iter(numbers)

        def uniform(self, low, high):
            return low + (high - low) * next(self.numbers)

    numbers = np.random.default_rng(0).random((50, 1, 4))
    for scale in ((0.1, 0.3), (0.3, 1.0), (0.9, 1.0)):
        expected = [random_box(96, 96, Numbers(four[0]), scale) for four in numbers]
        found = random_boxes(torch.from_numpy(numbers), 96, scale)
        torch.testing.assert_close(found[:, 0].double(), torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_pixels():
    """A box of whole pixels that is not resized gives exactly these pixels; of twice the size, means of neighbours."""
    image_B3HW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    box_BV4 = torch.tensor([[[2.0, 3.0, 10.0, 11.0]], [[0.0, 0.0, 16.0, 16.0]]])
    crop_BV3hw = cut(image_B3HW, box_BV4, 8)
    assert crop_BV3hw[0, 0].equal(image_B3HW[0, :, 2:10, 3:11].float())
    torch.testing.assert_close(crop_BV3hw[1, 0], torch.nn.functional.avg_pool2d(image_B3HW[1].float(), 2))


def test_by_seed():
    """Crops belong to a sample's seed, not to its place in a batch; global ones come after the small ones."""
    crops = DeviceCrops(MultiCrop(16, 8, 3, global_crops=1))
    image_B3HW = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    seed_B = torch.tensor([5, 6, 7])
    (small, whole), (small_boxes, whole_boxes) = crops.crops_of(image_B3HW, seed_B)
    assert small.shape == (3, 3, 3, 8, 8) and whole.shape == (3, 1, 3, 16, 16)
    (again, _), (boxes, _) = crops.crops_of(image_B3HW[[2, 0]], seed_B[[2, 0]])
    assert again.equal(small[[2, 0]]) and boxes.equal(small_boxes[[2, 0]])
    for box_BV4 in (small_boxes, whole_boxes):
        assert (box_BV4 >= 0).all() and (box_BV4 <= 16).all() and (box_BV4[..., 2:] > box_BV4[..., :2]).all()
