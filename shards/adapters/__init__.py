"""Dataset adapters: one file a dataset, which answers one question: what are the samples?

Each has `about(root, split, **options)`, which finds a wrong root before anything is written, and
`samples(root, split, **options)`, an iterator in an order that is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigtrain.data.schema import Sample
from shards.adapters import cifar10, coco, folder, imagenet, mnist, mosaic, voc
from shards.adapters.about import About

__all__ = ["ADAPTERS", "About", "Adapter"]


@dataclass(frozen=True)
class Adapter:
    """
    Args:
        about, samples: the adapter's two functions.
        root: what --root must be, in a line.
        split: the default of --split; None: there is no such option, and the option "mode" names the split.
        options: the adapter's own options of the command line, as argparse takes them.
    """

    about: Callable[..., About]
    samples: Callable[..., Iterator[Sample]]
    root: str
    split: str | None = "train"
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)


ADAPTERS: dict[str, Adapter] = {
    "folder": Adapter(folder.about, folder.samples, folder.LAYOUT),
    "mnist": Adapter(mnist.about, mnist.samples, mnist.LAYOUT, options=mnist.OPTIONS),
    "cifar10": Adapter(cifar10.about, cifar10.samples, cifar10.LAYOUT),
    "coco": Adapter(coco.about, coco.samples, coco.LAYOUT, split="train2017"),
    "voc": Adapter(voc.about, voc.samples, voc.LAYOUT, options=voc.OPTIONS),
    "imagenet": Adapter(imagenet.about, imagenet.samples, imagenet.LAYOUT),
    "mosaic": Adapter(mosaic.about, mosaic.samples, mosaic.LAYOUT, split=None, options=mosaic.OPTIONS),
}
