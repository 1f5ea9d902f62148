"""Known and novel: a split of the class names, applied to the index before any picture is read.

An image is known if any object in it is of a known class (DEFEND 4.4); an image without a known object is novel.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.shard_set import ShardSet

# CIFAR-10's partitions of DEFEND table 5, as positions in the list of classes
HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (0, 2, 4, 6, 8), (1, 3, 5, 7, 9))
NORMAL = "normal"  # the class of normal pictures that show none
Half = Literal["", "first-half", "random-half"]
Order = Literal["name", "folder"]


@dataclass(frozen=True)
class Protocol:
    """Which classes are known and which novel.

    Without novel ones every image is known, also one that shows no class, but for those of unlabelled classes, which
    are neither: there are normal pictures only, the commonest case of all.
    """

    known: tuple[str, ...]
    novel: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()

    @property
    def is_normal_only(self) -> bool:
        return not self.novel

    @classmethod
    def half(
        cls, which: Half, classes: Sequence[str], *, seed: int = 0, folder_order: Sequence[str] | None = None
    ) -> Protocol:
        """Half of the classes are known: the first ones (Perera & Patel 5.2), or a seeded choice.

        The first by name, ignoring a leading number ("001.Black_footed_Albatross"). Of an odd number the
        known half is the smaller one.

        Args:
            folder_order: take the first in this order instead: the dataset's numbered folders (a manifest's
                `folder_order`), as the paper does for Caltech-256.

        Raises:
            ValueError: there is one class, or no such order is known.
        """
        if len(classes) < 2:
            raise ValueError(f"--protocol {which} needs two classes or more, and there are {len(classes)}.")
        ordered = sorted(classes, key=lambda name: (re.sub(r"^\d+\.", "", name), name))
        if folder_order is not None:
            if lacking := sorted(set(classes) - set(folder_order)):
                raise ValueError(
                    f"--order folder was asked for, and the manifest keeps no order of folders for {len(lacking)} of "
                    f"the {len(classes)} classes ({', '.join(lacking[:5])}): build the set of Caltech-256, CUB-200 or "
                    "Stanford Dogs again, or take --order name."
                )
            ordered = [name for name in folder_order if name in set(classes)]
        if which == "random-half":
            ordered = np.random.default_rng(seed).permutation(ordered).tolist()
        return cls.of(classes, known=sorted(ordered[: len(classes) // 2]))

    @classmethod
    def of(cls, classes: Sequence[str], *, known: Sequence[str] = (), novel: Sequence[str] = ()) -> Protocol:
        """Split `classes` by the names of the known ones, or of the novel ones; the rest is the other side.

        Raises:
            ValueError: neither or both are given, a name is unknown, or one side is empty.
        """
        if bool(known) == bool(novel):
            given = "both" if known else "neither"
            raise ValueError(f"{given} of --known and --novel given; name one side, the other gets the rest.")
        named = tuple(dict.fromkeys(known or novel))
        for name in named:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, n=3, cutoff=0.4) or list(classes)[:10]
                raise ValueError(
                    f"class {name!r} is in neither the training nor the test shards; the nearest of their "
                    f"{len(classes)} classes {'is' if len(near) == 1 else 'are'} {', '.join(near)}."
                )
        rest = tuple(name for name in classes if name not in named)
        if not rest:
            raise ValueError(
                f"all {len(named)} classes are {'known' if known else 'novel'}: leave some for the rest, or, to train "
                "on normal pictures alone, name no class."
            )
        return cls(named, rest) if known else cls(rest, named)

    def is_known(self, shard_set: ShardSet) -> NDArray[np.bool_]:
        """For each image of a set: does it show an object of a known class? Shape (N,)."""
        return ~self.is_unlabelled(shard_set) if self.is_normal_only else shard_set.shows_any(self.known)

    def is_unlabelled(self, shard_set: ShardSet) -> NDArray[np.bool_]:
        """For each image of a set: does it show an unlabelled class, and no known or novel one? Shape (N,)."""
        return shard_set.shows_any(self.unlabelled) & ~shard_set.shows_any(self.known + self.novel)

    def is_of_unknown_kind(self, test: ShardSet) -> NDArray[np.bool_]:
        """For each image to judge on: is it unlabelled, or does it show no class at all where such are unlabelled too?

        They are where --unlabelled names a class, and among the test pictures of a run on normal pictures; elsewhere an
        image without a known object is novel.
        """
        shows_none = test.first_class(test.classes) < 0
        return self.is_unlabelled(test) | (shows_none & bool(self.unlabelled or self.is_normal_only))

    def check_test(self, test: ShardSet, sample_N: NDArray[np.int64]) -> None:
        """Refuse a test split whose samples `sample_N` lack known or novel images."""
        known = self.is_known(test)[sample_N]
        for side, count in (("known", int(known.sum())), ("novel", int((~known).sum()))):
            if count == 0:
                raise ValueError(
                    f"the test split {test.url} has no {side} images among the {len(known)} to judge on: with known "
                    f"classes {', '.join(self.known[:10])} nothing can be judged. Choose other classes, another test "
                    "split, or a greater limit."
                )


def expand(name: str, classes: Sequence[str]) -> list[Protocol]:
    """The runs behind a named protocol (DEFEND 4.1, 4.4), one `Protocol` each; tables give their mean.

    uni-class: each class known in turn; all-vs-one: each class novel in turn; half-vs-half: four partitions of ten
    classes; first-half: one run, the first half of the classes by name (Perera & Patel 5.2).
    """
    if name == "first-half":
        return [Protocol.half("first-half", classes)]
    if name == "uni-class":
        return [Protocol((c,), tuple(other for other in classes if other != c)) for c in classes]
    if name == "all-vs-one":
        return [Protocol(tuple(other for other in classes if other != c), (c,)) for c in classes]
    if name == "half-vs-half":
        if len(classes) != 10:
            raise ValueError(f"half-vs-half is defined on ten classes (CIFAR-10's), and {len(classes)} were given.")
        return [Protocol.of(classes, known=[classes[i] for i in half]) for half in HALVES]
    raise ValueError(f"there is no protocol {name!r}; there are uni-class, all-vs-one, half-vs-half, first-half.")


def in_validation(keys: Sequence[str], class_N: NDArray[np.int64], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which training samples are held out for validation: exactly this share, of each class too as far as it divides.

    Each class's samples stand in the order of BLAKE2b("<seed>:<key>"), and of all classes together those come first
    that come first in their class. So it holds for any order of the samples, and a greater share keeps a smaller one's.

    Args:
        class_N: of each sample, one, by a number from -1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a validation share of {share} was asked for; it must be at least 0 and below 1.")
    digests = (hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in keys)
    digest_N = np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)
    class_N = np.asarray(class_N) + 1
    order_N = np.lexsort((digest_N, class_N))
    count_C = np.bincount(class_N)
    rank_N = np.empty(len(keys))
    rank_N[order_N] = np.arange(len(keys)) - np.repeat(np.cumsum(count_C) - count_C, count_C)
    place_N = (rank_N + 0.5) / count_C[class_N]
    held_out_N = np.zeros(len(keys), bool)
    held_out_N[np.lexsort((digest_N, place_N))[: round(share * len(keys))]] = True
    return held_out_N


@dataclass(frozen=True)
class Split:
    """The images of a run: known ones to train on, known ones held out for the threshold, and those to judge on."""

    protocol: Protocol
    train: ShardSet
    test: ShardSet
    fitted_N: NDArray[np.int64]  # Numbers of samples in `train`; so are those held out.
    held_out_N: NDArray[np.int64]
    test_N: NDArray[np.int64]  # Numbers of samples in `test`, which may be `train` itself; none: there is no figure.
    unlabelled_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Numbers of samples in `test` that are scored and shown, and enter no figure."""

    def __str__(self) -> str:
        known = self.protocol.known
        classes = (
            f"{len(known)} known classes" if len(known) > 1 else f"the known class {known[0]}" if known else "no class"
        )
        seen = f"{len(self.test_N)} to judge" if len(self.test_N) else "none to judge on"
        also = f", {len(self.unlabelled_N)} unlabelled ones to score" if len(self.unlabelled_N) else ""
        return f"{self.train.manifest.dataset}, {len(self.fitted_N)} images of {classes}, {seen}{also}"


def halved(protocol: Protocol, images: ShardSet, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One set for both: half of the images of each known class to train on; the others, and novel ones, to judge on.

    Perera & Patel 5.2. Which half is a seeded rule by key, so that it holds for any order of the images: in each class
    (the first of an image's known ones), by BLAKE2b("<seed>:<key>").
    """
    known_N = np.flatnonzero(protocol.is_known(images))
    known = set(protocol.known)
    by_class: dict[str, list[tuple[bytes, int]]] = {}
    for sample in known_N.tolist():
        name = next(c for c in images.classes_of(sample) if c in known)
        digest = hashlib.blake2b(f"{seed}:{images.key(sample)}".encode(), digest_size=8).digest()
        by_class.setdefault(name, []).append((digest, sample))
    chosen = [s for members in by_class.values() for _, s in sorted(members)[: -(-len(members) // 2)]]
    train_N = np.sort(np.array(chosen, np.int64))
    return train_N, np.setdiff1d(np.arange(len(images)), train_N)


def seeded_choice(sample_N: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """A random choice of at most `limit` samples, ascending; all of them for a limit of 0."""
    if limit == 0 or len(sample_N) <= limit:
        return sample_N
    return np.sort(np.random.default_rng(seed).choice(sample_N, limit, replace=False))


def split(
    protocol: Protocol,
    train: ShardSet,
    test: ShardSet | None,
    *,
    validation_share: float,
    seed: int,
    train_limit: int = 0,
    test_limit: int = 0,
) -> Split:
    """Divide the images of a run; a limit takes a random choice of so many (of the test split the same for every seed).

    Args:
        test: None: the test split is in `train` too, see `halved`.

    Raises:
        ValueError: a known class has no image to train on, or the test split cannot be judged on.
    """
    if (absent := [name for name in protocol.known if name not in train.classes]) and protocol.known != (NORMAL,):
        raise ValueError(f"the known classes {', '.join(absent[:10])} are not in the training shards {train.url}.")
    judged = test or train
    is_unknown_N = protocol.is_unlabelled(train) if test is None else protocol.is_of_unknown_kind(test)
    unlabelled_N = np.flatnonzero(is_unknown_N)
    if protocol.is_normal_only:
        known_N, test_N = np.flatnonzero(protocol.is_known(train)), np.empty(0, np.int64)
    elif test is None:
        known_N, test_N = halved(protocol, train, seed=seed)
    else:
        known_N, test_N = np.flatnonzero(protocol.is_known(train)), np.arange(len(test))
    test_N = seeded_choice(np.setdiff1d(test_N, unlabelled_N), test_limit, 0)
    if not protocol.is_normal_only:
        protocol.check_test(judged, test_N)
    if len(known_N) == 0:
        raise ValueError(
            f"{train.url} has no image of the known classes ({', '.join(protocol.known)}) to train on: choose others."
        )
    keys = train.keys() if len(known_N) == len(train) else [train.key(s) for s in known_N.tolist()]
    class_N = train.first_class(protocol.known)[known_N]
    held_out = in_validation(keys, class_N, share=validation_share, seed=seed)
    fitted_N = seeded_choice(known_N[~held_out], train_limit, seed)
    unlabelled_N = seeded_choice(unlabelled_N, test_limit, 0)
    return Split(protocol, train, judged, fitted_N, known_N[held_out], test_N, unlabelled_N)


def check_every_class(protocol: Protocol, train: ShardSet, fitted_N: NDArray[np.int64]) -> None:
    """Refuse known classes without an image to train on: multi-class methods could not learn them."""
    shown = {name for sample in fitted_N.tolist() for name in train.classes_of(sample)}
    if empty := [name for name in protocol.known if name not in shown]:
        raise ValueError(
            f"{len(empty)} of the {len(protocol.known)} known classes have no image to train on: "
            f"{', '.join(empty[:10])}. Leave them out of --known, or give more images (--train-limit, "
            "--validation-share)."
        )


def labels_of(classes: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def only_label(shard_set: ShardSet, sample: int, label_of: dict[str, int]) -> int:
    """The number of the one class among `label_of` that an image shows."""
    if label_of == {NORMAL: 0}:
        return 0
    labels = [label_of[name] for name in shard_set.classes_of(sample) if name in label_of]
    if len(labels) != 1:
        raise ValueError(
            f"{shard_set.url}: image {shard_set.key(sample)} shows {len(labels)} of the classes to tell apart "
            f"({', '.join(shard_set.classes_of(sample))}); a classifier needs exactly one: use single objects."
        )
    return labels[0]


def check_single_labels(shard_set: ShardSet, sample_N: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Refuse images that show none or several of the classes, before anything is trained."""
    label_of = labels_of(classes)
    for sample in sample_N.tolist():
        only_label(shard_set, sample, label_of)
