"""ImageNet's names of classes: which names of two data sets mean the same thing."""

from __future__ import annotations

from collections.abc import Sequence

from bigtrain.models.lean_timm import timm


def shared_classes(names: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes that mean the same, by name or, where one is a synset (n02085620), by ImageNet's name of it."""
    info = timm.data.ImageNetInfo("imagenet-21k")
    descriptions = dict(zip(info.label_names(), info.label_descriptions(), strict=True))

    def meanings(name: str) -> set[str]:
        wnid = name.split("-")[0]
        known_as = descriptions[wnid].split(",") if wnid in descriptions else [name]
        return {" ".join(one.lower().replace("_", " ").replace("-", " ").split()) for one in known_as}

    theirs = {b: meanings(b) for b in others}
    return [(a, b) for a in names for own in [meanings(a)] for b in others if a == b or own & theirs[b]]
