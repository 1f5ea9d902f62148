"""MNIST, Fashion-MNIST and KMNIST: idx files, gzipped or not; each image becomes a PNG of the same pixels."""

from __future__ import annotations

import functools
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigtrain.data.schema import Object, Sample
from shards.adapters.about import About

LAYOUT = "the folder of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-... (with .gz or without)"
CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": [
        *("t-shirt_top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
    ],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}
LICENCES = {"mnist": "CC BY-SA 3.0", "fashion_mnist": "MIT", "kmnist": "CC BY-SA 4.0"}
OPTIONS: dict[str, dict[str, Any]] = {
    "--dataset": {
        "choices": list(CLASSES),
        "default": "mnist",
        "help": "whose class names to give, which idx files do not hold (default: mnist, the digits)",
    }
}
PREFIXES = {"train": "train", "test": "t10k"}


def about(root: Path, split: str, dataset: str = "mnist") -> About:
    images, _ = read_split(root, split)
    return About(dataset, CLASSES[dataset], LICENCES[dataset], len(images))


def samples(root: Path, split: str, dataset: str = "mnist") -> Iterator[Sample]:
    """Yield the images in the order of the file; a key is the image's place in it."""
    images, labels = read_split(root, split)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Sample(
            key=f"{split}-{place:05d}",
            image=png(image),
            image_ext="png",
            objects=[Object(CLASSES[dataset][label])],
            source=f"{PREFIXES[split]}-images-idx3-ubyte:{place}",
        )


@functools.lru_cache(maxsize=1)
def read_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, N x height x width, and their labels, N."""
    if split not in PREFIXES:
        raise ValueError(f"--split {split} is not in this dataset: it has train and test.")
    images = read_idx(find(root, f"{PREFIXES[split]}-images", "idx3-ubyte"), dimensions=3)
    labels = read_idx(find(root, f"{PREFIXES[split]}-labels", "idx1-ubyte"), dimensions=1)
    if len(images) != len(labels) or (len(labels) and labels.max() > 9):
        raise ValueError(
            f"{root} has {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)} for {split}, "
            "where there should be as many labels as images, from 0 to 9: get the files again."
        )
    return images, labels


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
        raise ValueError(f"{path} cannot be unpacked ({error}): get it again.") from error
    header = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:header], ">u4")) if len(data) >= header else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} is no whole idx file of bytes in {dimensions} dimensions: get it again.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def png(pixels: np.ndarray) -> bytes:
    """Grey H x W or colour H x W x 3 bytes as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
