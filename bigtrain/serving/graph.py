"""A detector as one graph: a uint8 picture of a stated size in; score, p-value, map and class out."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.data.decode import Picture
from bigtrain.data.resize import weights
from bigtrain.data.views import CentreCrop, Resized, Transform, on_pixels, whole
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.detectors.scoring_module import ScoringModule

Size = tuple[int, int]  # height and width, in pixels


class Graph(nn.Module):
    """`forward(image_B3HW)`: uint8 pictures of one size to the tuple of `outputs`.

        resize (where the size is not the view's) -> normalise -> networks -> score -> p-value

    Args:
        input_size: of the pictures; None: that of the detector's view, with nothing to resize.

    Raises:
        ValueError: the detector cannot be written as a graph; it says why.
    """

    held_out_N: Tensor

    def __init__(self, detector: ImageDetector, input_size: Size | None = None) -> None:
        super().__init__()
        self.scorer = ScoringModule(detector)
        if hasattr(detector, "halves_at_once"):
            self.scorer.detector.halves_at_once = detector.scoring.score_pairs  # type: ignore[attr-defined]
        self.side = detector.scoring.image_size
        self.input_size = input_size or (self.side, self.side)
        self.resize = None if input_size in (None, (self.side, self.side)) else Resize(detector.view(), self.input_size)
        self.outputs = ["score"]
        if len(detector.calibration):
            self.outputs.append("p_value")
            self.register_buffer("held_out_N", torch.from_numpy(detector.calibration.score_N))
        if detector.map_side is not None:
            self.outputs.append("map")
        if detector.class_names:
            self.outputs.append("class")
        self.to(detector.device).eval()
        self.example()

    def example(self, images: int = 2) -> Tensor:
        """Grey pictures, seen once: what is made at first use and kept is then a constant of the graph."""
        shape = (images, 3, *self.input_size)
        image_B3HW = torch.full(shape, 128, dtype=torch.uint8, device=self.scorer.detector.device)
        self(image_B3HW)
        return image_B3HW

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, ...]:
        if self.resize is not None:
            image_B3HW = self.resize(image_B3HW)
        found = self.scorer.scored(image_B3HW)
        outputs = [found.score_B.double()]
        if "p_value" in self.outputs:
            as_high_B = (self.held_out_N >= outputs[0][:, None]).double().sum(dim=1)
            outputs.append((1 + as_high_B) / (self.held_out_N.shape[0] + 1))
        if found.map_Bhw is not None:
            outputs.append(found.map_Bhw.float())
        if found.class_B is not None:
            outputs.append(found.class_B)
        return tuple(outputs)


class Resize(nn.Module):
    """uint8 pictures of one size as a view shows them, by the very integers of `data.resize`, as matrix products."""

    across: Tensor
    down: Tensor
    across_bits: int
    down_bits: int

    def __init__(self, view: Transform, input_size: Size) -> None:
        super().__init__()
        height, width = input_size
        blank = Picture.of(np.zeros((height, width, 3), np.uint8))
        assert isinstance(view, Resized)
        self.top, self.left, self.bottom, self.right = whole(blank)
        if isinstance(view, CentreCrop):
            share = view.size / view.resize
            h, w = share * height, share * width
            top, left = 0.5 * (height - h), 0.5 * (width - w)
            box = on_pixels(np.array([top, left, top + h, left + w]), blank)
            self.top, self.left, self.bottom, self.right = box
        for axis, before in (("across", self.right - self.left), ("down", self.bottom - self.top)):
            weight, bits = weights(before, view.size)
            self.register_buffer(axis, torch.from_numpy(weight))
            setattr(self, f"{axis}_bits", bits)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        pixels = image_B3HW[..., self.top : self.bottom, self.left : self.right].double()
        if pixels.shape[-1] != self.across.shape[0]:
            pixels = rounded(pixels @ self.across.T, self.across_bits)
        if pixels.shape[-2] != self.down.shape[0]:
            pixels = rounded(self.down @ pixels, self.down_bits)
        return pixels.to(torch.uint8)


def rounded(sums: Tensor, bits: int) -> Tensor:
    return ((sums + 2 ** (bits - 1)) * 0.5**bits).floor().clamp(0, 255)


def checked_size(detector: ImageDetector, input_size: Size | None) -> None:
    """Refuse a size from which the view could be cut no more: JPEGs are decoded smaller only where no graph is."""
    if input_size is not None and (min(input_size) < 1 or math.prod(input_size) > 50_000_000):
        raise ValueError(f"--input-size {input_size[0]} {input_size[1]}: give height and width in pixels, 1080 1920.")
