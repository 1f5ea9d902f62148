"""CIFAR-10 and CIFAR-100: the owners' archives (python or binary form), unpacked or not, or {train,test}/<class>/.

The labels of CIFAR-100 are its 100 fine classes or its 20 coarse ones.
"""

from __future__ import annotations

import contextlib
import functools
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigtrain.data.schema import Object, Sample
from shards.adapters import folder, plain_pickle
from shards.adapters.about import About
from shards.treatment import png

LICENCE = "none stated by its owners"
MAX_BATCH_BYTES = 1 << 28  # the largest, of CIFAR-100's train, has 155 MB
PIXELS = 3072  # of a record: 32 x 32 red, then green, then blue
COARSE_NAMES = [
    *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices"),
    *("household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things"),
    *("large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates"),
    *("people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
]
FINE_NAMES = [
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl"),
    *("boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair"),
    *("chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin"),
    *("elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp"),
    *("lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
    *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck"),
    *("pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road"),
    *("rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger"),
    *("tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman"),
    "worm",
]
OPTIONS: dict[str, dict[str, Any]] = {
    "--labels": {
        "choices": ["fine", "coarse"],
        "default": "fine",
        "help": "the 100 fine classes or the 20 coarse ones that hold five each (default: fine)",
    }
}


@dataclass(frozen=True, eq=False)  # one for each dataset: its methods are cached by it
class Cifar:
    """
    Args:
        name: in the manifest.
        title: in sentences.
        classes: the names, by what --labels may be.
        batches: the files of each split.
        inner: the folder in the archive, by its form, python or binary.
        keys: of the labels in a pickle, by what --labels may be; the binary form has a byte for each, in this order.
    """

    name: str
    title: str
    classes: Mapping[str, Sequence[str]]
    batches: Mapping[str, Sequence[str]]
    inner: Mapping[str, str]
    keys: Mapping[str, bytes]

    @property
    def doc(self) -> str:
        archives = "the owners' archives (python or binary form), unpacked or not, or {train,test}/<class>/."
        others = "\n\nThe labels are its 100 fine classes or its 20 coarse ones." if len(self.classes) > 1 else ""
        return f"{self.title}: {archives}{others}"

    @property
    def layout(self) -> str:
        archives = " or ".join(f"{self.title.lower()}-{form}.tar.gz" for form in self.inner)
        return (
            f"{archives}, the folder that holds or was unpacked from one of them, or a folder of train/<class>/ and "
            "test/<class>/"
        )

    def about(self, root: Path, split: str, labels: str = "fine") -> About:
        if split not in self.batches:
            raise ValueError(f"--split {split} is not in {self.title}: it has train and test.")
        classes = self.classes[labels]
        if self.is_folders(root, split, labels):
            by_class = folder.names_by_class(root / split)
            folder.refuse_twins(root / split, by_class)
            if unknown := sorted(set(by_class) - set(classes)):
                raise ValueError(
                    f"{root / split} has folders {', '.join(unknown[:5])}, which are not classes of {self.title} "
                    f"({', '.join(classes[:10])}{' ...' * (len(classes) > 10)}): use the adapter `folder` for other "
                    "sets."
                )
            return About(self.name, list(classes), LICENCE, sum(map(len, by_class.values())))
        total = sum(len(self.read_batch(root, name, labels)[1]) for name in self.batches[split])
        return About(self.name, list(classes), LICENCE, total)

    def samples(self, root: Path, split: str, labels: str = "fine") -> Iterator[Sample]:
        """Yield archives in their own order (python and binary form give the same keys), folders one class in turn."""
        if self.is_folders(root, split, labels):
            for class_name, name in folder.in_turn(folder.names_by_class(root / split)):
                yield folder.sample(root, f"{split}/{name}", class_name)
            return
        place = 0
        for batch in self.batches[split]:
            images, numbers = self.read_batch(root, batch, labels)
            for row, (image, number) in enumerate(zip(images, numbers, strict=True)):
                name = self.classes[labels][number]
                encoded = png(Image.fromarray(image))
                yield Sample(f"{split}-{place:05d}", encoded, "png", [Object(name)], source=f"{batch}:{row}")
                place += 1

    def is_folders(self, root: Path, split: str, labels: str) -> bool:
        return any((root / split / name).is_dir() for name in self.classes[labels])

    @functools.lru_cache(maxsize=5)  # noqa: B019
    def read_batch(self, root: Path, batch: str, labels: str) -> tuple[np.ndarray, list[int]]:
        """Images, N x 32 x 32 x 3, and labels of one batch, in whichever form it is there."""
        data, form = self.batch_bytes(root, batch)
        where = f"{batch}{'.bin' if form == 'binary' else ''} in {root}"
        if form == "binary":
            record = len(self.keys) + PIXELS
            if not data or len(data) % record:
                raise ValueError(f"{where} is not a whole number of {record}-byte records: download it again.")
            records = np.frombuffer(data, np.uint8).reshape(-1, record)
            column = list(self.keys).index(labels)
            pixels, numbers = records[:, len(self.keys) :], records[:, column].tolist()
        else:
            try:
                loaded = plain_pickle.load(data)
                pixels, numbers = loaded[b"data"], loaded[self.keys[labels]]
                shape = (len(numbers), PIXELS)
                well_formed = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == shape
            except plain_pickle.RefusedError as error:
                raise ValueError(f"{where} is refused: {error}. Get it from its owners.") from error
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{where} is no batch of {self.title} ({error!r}): download it again.") from error
            if not well_formed:
                raise ValueError(f"{where} does not hold N x {PIXELS} bytes and N labels: download it again.")
        count = len(self.classes[labels])
        if not all(isinstance(number, int) and 0 <= number < count for number in numbers):
            raise ValueError(f"{where} has labels outside 0 .. {count - 1}: download it again.")
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), numbers

    def batch_bytes(self, root: Path, batch: str) -> tuple[bytes, str]:
        """The file of a batch, from a folder or out of the archive, and its form."""
        for form, inner in self.inner.items():
            name = f"{batch}.bin" if form == "binary" else batch
            for path in (root / name, root / inner / name):
                if path.is_file():
                    return path.read_bytes(), form
            for archive in (root, root / f"{self.title.lower()}-{form}.tar.gz"):
                if archive.is_file():
                    with contextlib.suppress(KeyError):
                        return from_archive(archive, f"{inner}/{name}", self.title), form
        raise FileNotFoundError(f"{root} has no {batch} of {self.title}: --root must be {self.layout}.")


def from_archive(archive: Path, name: str, title: str) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            member = tar.getmember(name)
            file = tar.extractfile(member)
            if file is None or member.size > MAX_BATCH_BYTES:
                raise ValueError(f"{name} in {archive} is no batch of {title}: get the archive from its owners.")
            return file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read as an archive ({error}): download it again.") from error


CIFAR10 = Cifar(
    "cifar10",
    "CIFAR-10",
    {"fine": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]},
    {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]},
    {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"},
    {"fine": b"labels"},
)
CIFAR100 = Cifar(
    "cifar100",
    "CIFAR-100",
    {"fine": FINE_NAMES, "coarse": COARSE_NAMES},
    {"train": ["train"], "test": ["test"]},
    {"python": "cifar-100-python", "binary": "cifar-100-binary"},
    {"coarse": b"coarse_labels", "fine": b"fine_labels"},
)
