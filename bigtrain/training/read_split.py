"""From settings to the images of a run: which are known, which train, which are held out, which are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtrain.data.protocol import Protocol, Split, check_every_class, check_single_labels, split
from bigtrain.data.shard_set import ShardSet


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
    classes = tuple(dict.fromkeys((*train.classes, *(test.classes if test else ()))))
    protocol = read_protocol(config, classes, train)
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
        check_every_class(protocol, train, found.fitted_N)
        check_single_labels(train, found.fitted_N, protocol.known)
    return found


def read_protocol(config: Any, classes: Sequence[str], train: ShardSet) -> Protocol:
    """What is known, by names or by --protocol."""
    if config.order == "folder" and config.protocol != "first-half":
        raise ValueError("--order folder has an effect with --protocol first-half alone: leave it out.")
    if not config.protocol:
        return Protocol.of(classes, known=config.known, novel=config.novel)
    if config.known or config.novel:
        raise ValueError(f"--protocol {config.protocol} says what is known: leave --known and --novel out.")
    in_order = train.manifest.folder_order if config.order == "folder" else None
    return Protocol.half(config.protocol, classes, seed=config.seed, folder_order=in_order)
