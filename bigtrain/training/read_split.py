"""From settings to the images of a run: which are known, which train, which are held out, which are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bigtrain.data.protocol import NORMAL, Protocol, Split, check_every_class, check_single_labels, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.text import class_name


def read_split(config: Any, *, fewest_classes: int = 1, single_labels: bool = False) -> Split:
    """Open the shard sets and divide their images.

    Args:
        config: a recipe's, with DataMixin and RunMixin.
        fewest_classes: how many known classes the method tells apart at least.
        single_labels: each training image must show exactly one known class.

    Raises:
        ValueError: too few known classes, a class without images, several labels, or nothing to judge on.
    """
    train = ShardSet(config.train)
    test = ShardSet(config.test) if config.test else None
    protocol = read_protocol(config, train, test)
    if len(protocol.known) < fewest_classes:
        raise ValueError(
            f"this method tells known classes apart and needs at least {fewest_classes}; {len(protocol.known)} was "
            f"given ({', '.join(protocol.known)}). Name more with --known; recipes/defend.py takes one."
        )
    found = split(
        protocol, train, test,
        validation_share=config.validation_share, seed=config.seed,
        train_limit=config.train_limit, test_limit=config.test_limit,
    )  # fmt: skip
    if single_labels:
        if protocol.known != (NORMAL,):
            check_every_class(protocol, train, found.fitted_N)
        check_single_labels(train, found.fitted_N, protocol.known)
    return found


def read_protocol(config: Any, train: ShardSet, test: ShardSet | None) -> Protocol:
    """What is known, by names or by --protocol; normal pictures only where nothing says so and nothing is novel."""
    if config.order == "folder" and config.protocol != "first-half":
        raise ValueError("--order folder has an effect with --protocol first-half alone: leave it out.")
    every = tuple(dict.fromkeys((*train.classes, *(test.classes if test else ()))))
    own = {class_name(name): name for name in every}  # sets of earlier versions have names in other forms
    unlabelled, known, novel = (
        tuple(own.get(class_name(name), name) for name in names)
        for names in (config.unlabelled, config.known, config.novel)
    )
    if unknown := [name for name in unlabelled if name not in every]:
        there = f"the classes are {few(every)}" if every else "these sets have no classes"
        raise ValueError(f"--unlabelled names {', '.join(unknown)}, and {there}: correct it, or leave it out.")
    classes = [name for name in every if name not in unlabelled]
    if config.protocol:
        if known or novel:
            raise ValueError(f"--protocol {config.protocol} says what is known: leave --known and --novel out.")
        in_order = train.manifest.folder_order if config.order == "folder" else None
        found = Protocol.half(config.protocol, classes, seed=config.seed, folder_order=in_order)
        return replace(found, unlabelled=unlabelled)
    if is_normal_only(known, novel, classes, test, unlabelled):
        shown = [name for name in classes if name in train.classes]
        return Protocol(tuple(shown) or (NORMAL,), (), unlabelled)
    return replace(Protocol.of(classes, known=known, novel=novel), unlabelled=unlabelled)


def is_normal_only(
    known: Sequence[str], novel: Sequence[str], classes: Sequence[str], test: ShardSet | None, unlabelled: Sequence[str]
) -> bool:
    """Whether all pictures to train on are normal, and none to judge on is labelled."""
    if novel or (known and set(known) != set(classes)):
        return False
    return test is None or not set(test.classes) - set(unlabelled)


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
