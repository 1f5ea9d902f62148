"""The report's pictures: which are most telling, and each with its patch scores laid over it on one shared scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.evaluation.intervals import Bools
from bigtrain.evaluation.metrics import Floats
from bigtrain.evaluation.pixel_figures import outline
from bigtrain.pages import data_uri

MAX_SIDE = 256  # pixels in the page; larger pictures are scaled down
MIN_OVERLAY_SIDE = 168  # small pictures are enlarged under their maps, so that patches keep their sharp edges
OPACITY = 0.55
OUTLINE = "#00e5ff"  # no colour of HEAT
HEAT = ("#0d0887", "#6a00a8", "#b12a90", "#e16462", "#fca636", "#f0f921")  # plasma, dark = low, also in grey


class Shown(NamedTuple):
    """One picture of the report, with what is known of it."""

    key: str
    classes: Sequence[str]
    novel: bool
    score: float
    image: Image.Image
    score_map_hw: NDArray[np.floating] | None = None  # one novelty score a patch
    mask_HW: NDArray[np.bool_] | None = None  # what is defective, of the picture's size


class Scale(NamedTuple):
    """The range of patch scores that the colours span, the same for all pictures."""

    low: float
    high: float


def most_telling(novel_N: Bools, score_N: Floats, *, count: int = 8) -> dict[str, list[int]]:
    """Return the positions of the pictures worth a look, by section title, the most striking first.

    Known pictures that look most novel and novel ones that look least novel are the detector's worst errors; a class
    with fewer than `count` images gives all it has.
    """
    rising = np.argsort(score_N, kind="stable")
    known, novel = rising[~novel_N[rising]], rising[novel_N[rising]]
    return {
        "Most novel": rising[::-1][:count].tolist(),
        "Least novel": rising[:count].tolist(),
        "Known pictures that look most novel": known[::-1][:count].tolist(),
        "Novel pictures that look least novel": novel[:count].tolist(),
    }


def shared_scale(pictures: Iterable[Shown]) -> Scale | None:
    """Return the range of all maps, without the outer 1 % at each end, or None where no picture has a map."""
    maps = [picture.score_map_hw for picture in pictures if picture.score_map_hw is not None]
    return scale_of(maps) if maps else None


def scale_of(maps: Sequence[NDArray[np.floating]]) -> Scale:
    """The range of some maps, without the outer 1 % at each end."""
    values = np.concatenate([np.asarray(score_map_hw, np.float64).ravel() for score_map_hw in maps])
    if not np.isfinite(values).all():
        raise ValueError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} patch scores are NaN or infinite: no colour shows them"
        )
    low, high = np.quantile(values, [0.01, 0.99])
    return Scale(float(low), float(high))


def rgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB, no side longer than MAX_SIDE."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def heat(value_hw: Floats, scale: Scale) -> NDArray[np.uint8]:
    """Return the colours (h, w, 3) of patch scores; what lies beyond the scale gets the colour of its end."""
    anchors_A3 = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in HEAT])
    span = (scale.high - scale.low) or 1.0
    position_hw = ((value_hw - scale.low) / span).clip(0, 1) * (len(HEAT) - 1)
    channels = [np.interp(position_hw, np.arange(len(HEAT)), anchors_A3[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(
    image: Image.Image,
    score_map_hw: NDArray[np.floating],
    scale: Scale,
    mask_HW: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """Lay the patch scores over the picture, which is made grey so that all colour is score; patches stay squares. The
    outline of a mask is drawn over both."""
    enlarged = max(1, math.ceil(MIN_OVERLAY_SIDE / max(image.size)))
    size = (image.width * enlarged, image.height * enlarged)
    grey = image.convert("L").convert("RGB").resize(size, Image.Resampling.NEAREST)
    colours = Image.fromarray(heat(np.asarray(score_map_hw, np.float64), scale))
    laid = Image.blend(grey, colours.resize(size, Image.Resampling.NEAREST), OPACITY)
    if mask_HW is not None:
        marked = np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))
        edge = Image.fromarray(outline(marked, thickness=2))
        laid.paste(OUTLINE, mask=edge)
    return laid


def page_image(image: Image.Image) -> str:
    """A picture inside of a page: PNG where it is small, JPEG where it is not."""
    return data_uri(image, is_png=max(image.size) < 200)


def picture_fields(image: Image.Image, key: str, classes: Sequence[str]) -> dict[str, Any]:
    """What every page shows of a picture, as its template takes it."""
    return {
        "key": key,
        "classes": ", ".join(classes) or "no class",
        "image": page_image(image),
        "width": image.width,
        "height": image.height,
        "small": max(image.size) < 128,
        "caption": "",  # instead of the classes
        "overlay": "",  # a picture beside it
    }
