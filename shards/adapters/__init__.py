"""Dataset adapters: one file a dataset, which answers one question: what are the samples?

Each has `about(root, split, **options)`, which finds a wrong root before anything is written, and
`samples(root, split, **options)`, an iterator in an order that is the same every time; LAYOUT, what --root must be, in
a line; and OPTIONS, its own options of the command line, where it has some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
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


def of_module(module: ModuleType, split: str | None = "train") -> Adapter:
    return Adapter(module.about, module.samples, module.LAYOUT, split, getattr(module, "OPTIONS", {}))


ADAPTERS: dict[str, Adapter] = {
    "folder": of_module(folder),
    "mnist": of_module(mnist),
    "cifar10": Adapter(CIFAR10.about, CIFAR10.samples, CIFAR10.layout, doc=CIFAR10.doc),
    "cifar100": Adapter(CIFAR100.about, CIFAR100.samples, CIFAR100.layout, options=cifar.OPTIONS, doc=CIFAR100.doc),
    "coco": of_module(coco, split="train2017"),
    "voc": of_module(voc),
    "imagenet": of_module(imagenet),
    "places365": of_module(places365),
    "caltech256": of_module(caltech256, split="all"),
    "cub200": of_module(cub200),
    "stanford_dogs": of_module(stanford_dogs),
    "mvtec": of_module(mvtec),
    "visa": of_module(visa),
    "fonts": of_module(fonts, split="all"),
    "table": of_module(table, split="all"),
    "mosaic": of_module(mosaic, split=None),
}
