"""Crops of dense tuning cut on the device from the resized picture, which then is decoded once for all epochs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigtrain.data.views import MultiCrop
from bigtrain.methods.defend.masks import uniform

SHAPES = (3 / 4, 4 / 3)  # width / height


@dataclass(frozen=True)
class DeviceCrops:
    """Crops `like` those of a transform, with boxes of the same distribution, drawn from each sample's seed by counters
    alone.

    What differs: a crop is cut from the picture of `like.size`, not from the original, which is sharper where that is
    larger; resized bilinearly; and boxes need not lie on whole pixels.
    """

    like: MultiCrop

    def crops_of(self, image_B3HW: Tensor, seed_B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The crops of uint8 images by kind, the small ones, then the global ones where there are any: float32 (B, V,
        3, h, w), 0 to 255; and their boxes (B, V, 4) in pixels of the image."""
        like = self.like
        kinds = [(like.crops, like.crop_scale, like.crop_size), (like.global_crops, like.global_scale, like.size)]
        numbers_BN = uniform(seed_B, 4 * (like.crops + like.global_crops))
        crops, boxes, first = [], [], 0
        for count, scale, side in kinds[: 2 if like.global_crops else 1]:
            box_BV4 = random_boxes(numbers_BN[:, first : first + 4 * count].unflatten(1, (count, 4)), like.size, scale)
            crops.append(cut(image_B3HW, box_BV4, side))
            boxes.append(box_BV4)
            first += 4 * count
        return crops, boxes


def random_boxes(numbers_BV4: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """Boxes of a random share of a square image's area and of a random shape, as `data.views.random_box` draws them.

    Args:
        numbers_BV4: within (0, 1): for area, shape, top and left.

    Returns:
        box_BV4: float32; top, left, bottom, right.
    """
    share, shape, down, across = numbers_BV4.unbind(-1)
    area = size**2 * (scale[0] + (scale[1] - scale[0]) * share)
    least, most = area / size**2, size**2 / area  # width / height of the boxes of this area that fit
    low, high = (torch.full_like(area, side).clamp(least, most).log() for side in SHAPES)
    shape = (low + (high - low) * shape).exp()
    height, width = (area / shape).sqrt().clamp(max=size), (area * shape).sqrt().clamp(max=size)
    top, left = down * (size - height), across * (size - width)
    return torch.stack([top, left, top + height, left + width], dim=-1).float()


def cut(image_B3HW: Tensor, box_BV4: Tensor, side: int) -> Tensor:
    """Parts of each image resized to side x side: float32 (B, V, 3, side, side), bilinear at the pixels' centres."""
    import torchvision  # noqa: F401  # for its operation, in torch.ops

    top, left, bottom, right = box_BV4.unbind(-1)
    image_BV = torch.arange(len(box_BV4), device=box_BV4.device)[:, None].expand_as(top)
    roi_R5 = torch.stack([image_BV, left, top, right, bottom], dim=-1).flatten(0, 1)
    part_R3hw = torch.ops.torchvision.roi_align(image_B3HW.float(), roi_R5, 1.0, side, side, 1, True)
    return part_R3hw.unflatten(0, box_BV4.shape[:2])
