"""MNIST, Fashion-MNIST, KMNIST and EMNIST: idx files, gzipped or not; each image becomes a PNG of the same pixels.

EMNIST's pictures lie on their side in its files and are set upright here. Its classes are the characters of its mapping
file; where capital and small letter share a label, the class has the capital's name.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigtrain.data.schema import Object, Sample
from shards.adapters.about import About
from shards.adapters.lists import rows
from shards.treatment import png

LAYOUT = (
    "the folder of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... (with .gz or without); for EMNIST of "
    "emnist-letters-train-images-idx3-ubyte ... and emnist-letters-mapping.txt"
)
CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": [
        *("t-shirt_top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
    ],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}
EMNIST = ["emnist-balanced", "emnist-byclass", "emnist-bymerge", "emnist-digits", "emnist-letters", "emnist-mnist"]
LICENCES = {"mnist": "CC BY-SA 3.0", "fashion_mnist": "MIT", "kmnist": "CC BY-SA 4.0"}
EMNIST_LICENCE = "see NIST's page of the EMNIST dataset"
OPTIONS: dict[str, dict[str, Any]] = {
    "--dataset": {
        "choices": [*CLASSES, *EMNIST],
        "default": "mnist",
        "help": "which it is, for its class names, which idx files do not hold (default: mnist, the digits)",
    }
}
PREFIXES = {"train": "train", "test": "t10k"}


def about(root: Path, split: str, dataset: str = "mnist") -> About:
    images, _, classes = read_split(root, split, dataset)
    return About(dataset, list(classes.values()), LICENCES.get(dataset, EMNIST_LICENCE), len(images))


def samples(root: Path, split: str, dataset: str = "mnist") -> Iterator[Sample]:
    """Yield the images in the order of the file; a key is the image's place in it."""
    images, labels, classes = read_split(root, split, dataset)
    stem = stem_of(split, dataset)
    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield Sample(
            key=f"{split}-{place:05d}",
            image=png(Image.fromarray(image.T if dataset in EMNIST else image)),
            image_ext="png",
            objects=[Object(classes[label])],
            source=f"{stem}-images-idx3-ubyte:{place}",
        )


@functools.lru_cache(maxsize=1)
def read_split(root: Path, split: str, dataset: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Images, N x height x width, their labels, N, and the names of the labels."""
    stem = stem_of(split, dataset)
    images = read_idx(find(root, f"{stem}-images", "idx3-ubyte"), dimensions=3)
    labels = read_idx(find(root, f"{stem}-labels", "idx1-ubyte"), dimensions=1)
    classes = characters(root / f"{dataset}-mapping.txt") if dataset in EMNIST else dict(enumerate(CLASSES[dataset]))
    unknown = sorted(set(np.unique(labels).tolist()) - set(classes))
    if len(images) != len(labels) or unknown:
        among = f", {unknown[0]} among them" if unknown else ""
        raise ValueError(
            f"{root} has {len(images)} images and {len(labels)} labels for {split}{among}, where there should be as "
            f"many labels as images, from {min(classes)} to {max(classes)}: get the files again."
        )
    return images, labels, classes


def stem_of(split: str, dataset: str) -> str:
    """What the file names of a split begin with."""
    if split not in PREFIXES:
        raise ValueError(f"--split {split} is not in this dataset: it has train and test.")
    return f"{dataset}-{split}" if dataset in EMNIST else PREFIXES[split]


def characters(path: Path) -> dict[int, str]:
    """A mapping file of EMNIST: a label, the code of its character and, in emnist-letters, that of the small letter."""
    form = "label code code" if path.name == "emnist-letters-mapping.txt" else "label code"
    try:
        classes = {int(label): chr(int(codes[0])) for label, *codes in rows(path, form, LAYOUT)}
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} does not give a number and the code of a character ({error}).") from error
    if not classes:
        raise ValueError(f"{path} is empty: get it from its owners.")
    return classes


def find(root: Path, stem: str, kind: str) -> Path:
    for name in (f"{stem}-{kind}", f"{stem}-{kind}.gz", f"{stem}.{kind}", f"{stem}.{kind}.gz"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{root / stem}-{kind}(.gz) is missing: --root must be {LAYOUT}.")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file: 0, 0, type 8 (uint8), the number of dimensions, their lengths in big-endian, the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): download it again.") from error
    header = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:header], ">u4")) if len(data) >= header else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} is not a whole idx file of bytes in {dimensions} dimensions: download it again.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
