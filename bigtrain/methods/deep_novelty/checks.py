"""Refuses contradictory settings of deep novelty, and reference data with known or novel things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigtrain.data.protocol import Protocol, Split, check_single_labels
from bigtrain.data.shard_set import ShardSet

MAX_NAMED = 10


def check_settings(config: Any) -> None:
    """Refuse settings of recipes/deep_novelty.py that contradict each other; imports no torch."""
    if (config.branches == "one") == bool(config.reference):
        given = "is of no use with --branches one" if config.reference else "SHARDS is needed (or --branches one)"
        raise ValueError(f"--reference {given}: it is what the second branch classifies.")
    if config.branches == "joint" and config.membership_weight not in (0, type(config).membership_weight):
        raise ValueError(
            "--membership-weight has no effect with --branches joint, which has one softmax: leave it out."
        )
    if config.epochs and config.steps != type(config).steps:
        raise ValueError("--steps and --epochs were both given: give only one.")
    if config.variant == "author_code" and not (config.membership_weight and config.branches != "joint"):
        raise ValueError("--variant author_code is about the membership loss, which is not used: leave it out.")


def check_reference(reference: ShardSet, split: Split) -> None:
    """Refuse a reference data set that shares images with the run's, or whose images show several classes."""
    for name, known in (("--train", split.train), ("--test", split.test)):
        if shared := reference.shared_pictures(known):
            raise ValueError(
                f"--reference {reference.url} has {shared} pictures of {name} {known.url}: the reference data set "
                "must show other things than the known and novel classes; `bigtrain-shards split` takes classes."
            )
    check_single_labels(reference, np.arange(len(reference)), reference.classes)


def overlap_warnings(protocol: Protocol, reference: ShardSet) -> Iterator[str]:
    """A warning for reference classes that are known or novel ones too."""
    for kind, names in (("known", protocol.known), ("novel", protocol.novel)):
        if pairs := shared_classes(names, reference.classes):
            listed = ", ".join(a if a == b else f"{a} ({b})" for a, b in pairs[:MAX_NAMED])
            more = f" and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
            why = (
                "their filters cannot be negative for all known classes"
                if kind == "known"
                else "novel classes have been seen in training, so that the figures are too good"
            )
            yield f"warning: {len(pairs)} {kind} classes are reference classes too, {why}: {listed}{more}"


def shared_classes(names: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes that mean the same, by name or, where one is a synset (n02085620), by ImageNet's name of it."""
    from bigtrain.models.lean_timm import timm

    info = timm.data.ImageNetInfo("imagenet-21k")
    descriptions = dict(zip(info.label_names(), info.label_descriptions(), strict=True))

    def meanings(name: str) -> set[str]:
        wnid = name.split("-")[0]
        known_as = descriptions[wnid].split(",") if wnid in descriptions else [name]
        return {" ".join(one.lower().replace("_", " ").replace("-", " ").split()) for one in known_as}

    theirs = {b: meanings(b) for b in others}
    return [(a, b) for a in names for own in [meanings(a)] for b in others if a == b or own & theirs[b]]
