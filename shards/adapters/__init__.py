"""Dataset adapters: one file a dataset, which answers one question: what are the samples?

Each has `about(root, split, **options)`, which finds a wrong root before anything is written, and
`samples(root, split, **options)`, an iterator in an order that is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigtrain.data.schema import Sample
from shards.adapters import (
    caltech256,
    cifar,
    coco,
    cub200,
    folder,
    fonts,
    imagenet,
    mnist,
    mosaic,
    mvtec,
    places365,
    stanford_dogs,
    table,
    visa,
    voc,
)
from shards.adapters.about import About
from shards.adapters.cifar import CIFAR10, CIFAR100

__all__ = ["ADAPTERS", "About", "Adapter"]


@dataclass(frozen=True)
class Adapter:
    """
    Args:
        about, samples: the adapter's two functions.
        root: what --root must be, in a line.
        split: the default of --split; None: there is no such option, and the option "mode" names the split.
        options: the adapter's own options of the command line, as argparse takes them.
        doc: what the dataset is, first in a line; empty: its module says so.
    """

    about: Callable[..., About]
    samples: Callable[..., Iterator[Sample]]
    root: str
    split: str | None = "train"
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    doc: str = ""


ADAPTERS: dict[str, Adapter] = {
    "folder": Adapter(folder.about, folder.samples, folder.LAYOUT),
    "mnist": Adapter(mnist.about, mnist.samples, mnist.LAYOUT, options=mnist.OPTIONS),
    "cifar10": Adapter(CIFAR10.about, CIFAR10.samples, CIFAR10.layout, doc=CIFAR10.doc),
    "cifar100": Adapter(CIFAR100.about, CIFAR100.samples, CIFAR100.layout, options=cifar.OPTIONS, doc=CIFAR100.doc),
    "coco": Adapter(coco.about, coco.samples, coco.LAYOUT, split="train2017"),
    "voc": Adapter(voc.about, voc.samples, voc.LAYOUT, options=voc.OPTIONS),
    "imagenet": Adapter(imagenet.about, imagenet.samples, imagenet.LAYOUT),
    "places365": Adapter(places365.about, places365.samples, places365.LAYOUT, options=places365.OPTIONS),
    "caltech256": Adapter(
        caltech256.about, caltech256.samples, caltech256.LAYOUT, split="all", options=caltech256.OPTIONS
    ),
    "cub200": Adapter(cub200.about, cub200.samples, cub200.LAYOUT, options=cub200.OPTIONS),
    "stanford_dogs": Adapter(stanford_dogs.about, stanford_dogs.samples, stanford_dogs.LAYOUT),
    "mvtec": Adapter(mvtec.about, mvtec.samples, mvtec.LAYOUT, options=mvtec.OPTIONS),
    "visa": Adapter(visa.about, visa.samples, visa.LAYOUT, options=visa.OPTIONS),
    "fonts": Adapter(fonts.about, fonts.samples, fonts.LAYOUT, split="all", options=fonts.OPTIONS),
    "table": Adapter(table.about, table.samples, table.LAYOUT, split="all", options=table.OPTIONS),
    "mosaic": Adapter(mosaic.about, mosaic.samples, mosaic.LAYOUT, split=None, options=mosaic.OPTIONS),
}
