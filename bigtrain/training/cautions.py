"""What a user should know of a run's figures before it begins: pictures on both sides, too few, odd settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.data.protocol import Split
from bigtrain.evaluation.intervals import false_alarms
from bigtrain.text import alike, counted
from bigtrain.training.read_labelled import Labelled

BATCHES = ("tune_batch", "distil_batch", "batch")  # settings of a global batch
HALF = 0.5  # of the known test pictures: so many were trained on that nothing is judged
NORMAL_PARTS = ("good", "normal", "ok")  # what inspection calls a part without defect
MUCH_LARGER = 1.5  # times a picture's side


def cautions(config: Any, data: Any) -> Iterator[str]:
    """Sentences on what a recipe reads: a Split, alone or beside more, or images to learn classes from.

    Raises:
        ValueError: most of the pictures to judge on are training pictures.
    """
    first = getattr(data, "split", data)
    if isinstance(first, Labelled):
        yield from of_labelled(first)
    elif isinstance(first, Split):
        yield from of_split(config, first)


def of_labelled(images: Labelled) -> Iterator[str]:
    """Pictures of --val that are learnt from, by content."""
    both_N = images.held_out.also_in(images.train, images.held_out_N, images.fitted_N)
    if len(both_N):
        count = len(images.held_out_N)
        yield f"{len(both_N)} of the {count} pictures to report on are training pictures too: figures are too good"


def of_split(config: Any, split: Split) -> Iterator[str]:
    """Sentences, each on one thing.

    Raises:
        ValueError: most of the known pictures to judge on are training pictures.
    """
    yield from copies(split)
    yield from few_pictures(config, split)
    yield from unusual_classes(split)
    shown = set(split.protocol.known) & set(split.train.classes)
    if any(name.rpartition("/")[2].lower() in NORMAL_PARTS for name in shown) and hasattr(config, "teacher"):
        yield (
            "these look like parts with and without defects, where nearest neighbours and Mahalanobis on features are "
            "usually the better detectors: recipes/baselines.py"
        )
    size = getattr(config, "image_size", 0)
    if size and (side := split.train.typical_side) and size >= MUCH_LARGER * side:
        yield (
            f"the pictures are {side} pixels large, and --image-size is {size}: a smaller one, for a network that "
            "takes it, is faster and shows as much"
        )


def copies(split: Split) -> Iterator[str]:
    """Pictures that are judged on and trained on, by content."""
    trained_N = np.concatenate([split.fitted_N, split.held_out_N])
    for test_N, what in ((split.test_N, "to judge on"), (split.unlabelled_N, "to score")):
        both_N = split.test.also_in(split.train, test_N, trained_N)
        if not len(both_N):
            continue
        is_known_N = split.protocol.is_known(split.test)
        both, known = int(is_known_N[both_N].sum()), int(is_known_N[test_N].sum())
        if what == "to judge on" and both >= HALF * known:
            raise ValueError(
                f"{both} of the {known} known pictures {what} in {split.test.url} are training pictures, so "
                "that no figure would mean anything: give other pictures as --test, or none, and half of --train is "
                "judged on."
            )
        so = "figures are too good" if what == "to judge on" else "they score as known"
        yield f"{len(both_N)} of the {len(test_N)} pictures {what} are training pictures too: {so}"
    if len(twice_N := split.train.also_in(split.train, split.held_out_N, split.fitted_N)):
        yield (
            f"{len(twice_N)} of the {len(split.held_out_N)} held-out pictures are copies of training pictures: the "
            "threshold is too low"
        )


def few_pictures(config: Any, split: Split) -> Iterator[str]:
    count, held_out = len(split.fitted_N), len(split.held_out_N)
    if count == 1:
        yield "there is a single picture to train on: nothing can be learnt of what varies"
    for name in BATCHES:
        if (batch := getattr(config, name, 0)) > count > 1:
            yield f"--{name.replace('_', '-')} is {batch}, larger than the {count} pictures to train on"
    rate = 1 - config.threshold_percentile / 100
    above = held_out - int(np.ceil((1 - rate) * (held_out - 1))) - 1
    if held_out and (span := false_alarms(held_out, above))[1] > 2 * rate:
        yield (
            f"the threshold rests on {counted(held_out, 'held-out picture')}: instead of the {100 * rate:.3g} % asked "
            f"for, it may flag from {100 * span[0]:.2g} to {100 * span[1]:.2g} % of known pictures (95 % interval)"
        )
    if not held_out:
        yield "no picture is held out (--validation-share), so there is no threshold"


def unusual_classes(split: Split) -> Iterator[str]:
    """Known classes that no picture to judge on shows, with novel ones of nearly their names; normal ones of none."""
    if split.protocol.is_normal_only and split.train.classes:
        none_N = split.train.first_class(split.train.classes)[split.fitted_N] < 0
        if none_N.any():
            yield f"{int(none_N.sum())} of the {len(none_N)} training pictures show no class, and are taken for normal"
    if not len(split.test_N):
        return
    shown = split.test.classes_shown(split.test_N)
    if absent := [name for name in split.protocol.known if name not in shown]:
        near = {alike(name): name for name in split.protocol.novel}
        hints = [f"{name} (is it {near[alike(name)]!r}?)" if alike(name) in near else name for name in absent[:10]]
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        yield f"no picture to judge on shows {counted(len(absent), 'known class')}: {', '.join(hints)}{more}"
