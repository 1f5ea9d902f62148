"""MNIST and its like, and EMNIST with its mapping files."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.schema import Sample
from shards.adapters import mnist


def pixels(sample: Sample) -> np.ndarray:
    assert isinstance(sample.image, bytes)
    return np.asarray(Image.open(io.BytesIO(sample.image)))


def write_idx(folder: Path, stem: str, images: np.ndarray, labels: np.ndarray, suffix: str = ".gz") -> None:
    opened = gzip.open if suffix else open
    with opened(folder / f"{stem}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    with opened(folder / f"{stem}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


@pytest.fixture
def idx(tmp_path: Path) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def write(count: int = 12, suffix: str = ".gz") -> tuple[np.ndarray, np.ndarray]:
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(tmp_path, "t10k", images, labels, suffix)
        return images, labels

    return write


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_to_png(idx, tmp_path, suffix):
    """IDX images become PNGs of the same pixels, with the class names of the dataset given."""
    images, labels = idx(suffix=suffix)
    found = list(mnist.samples(tmp_path, "test", dataset="fashion_mnist"))
    assert np.array_equal([pixels(sample) for sample in found], images)
    assert [s.classes[0] for s in found] == [mnist.CLASSES["fashion_mnist"][label] for label in labels]
    assert found[9].classes == ["ankle_boot"]
    assert next(mnist.samples(tmp_path, "test")).classes == ["0"]  # digits by default, not guessed


def test_a_cut_idx_file_is_refused(idx, tmp_path):
    idx(suffix="")
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole idx file"):
        mnist.about(tmp_path, "test")


def test_label_out_of_range(tmp_path):
    """A label that is no class is refused."""
    write_idx(tmp_path, "t10k", np.zeros((2, 28, 28), np.uint8), np.array([3, 10], np.uint8))
    with pytest.raises(ValueError, match="10 among them, where there should be as many labels as images, from 0 to 9"):
        mnist.about(tmp_path, "test")


@pytest.fixture
def letters(tmp_path: Path) -> np.ndarray:
    """Three letters, which EMNIST counts from 1 and stores with rows and columns exchanged."""
    images = np.random.default_rng(1).integers(0, 256, (3, 28, 28), np.uint8)
    stored = np.ascontiguousarray(images.transpose(0, 2, 1))
    write_idx(tmp_path, "emnist-letters-train", stored, np.array([2, 1, 26], np.uint8))
    lines = [f"{label} {64 + label} {96 + label}\n" for label in range(1, 27)]
    (tmp_path / "emnist-letters-mapping.txt").write_text("".join(lines))
    return images


def test_emnist(letters, tmp_path):
    """EMNIST is set upright, and its classes are named by its mapping."""
    found = list(mnist.samples(tmp_path, "train", dataset="emnist-letters"))
    assert np.array_equal([pixels(sample) for sample in found], letters)
    assert [sample.classes for sample in found] == [["B"], ["A"], ["Z"]]
    assert found[0].source == "emnist-letters-train-images-idx3-ubyte:0"
    about = mnist.about(tmp_path, "train", dataset="emnist-letters")
    assert (about.dataset, about.total, about.classes[:3], len(about.classes)) == (
        "emnist-letters",
        3,
        ["A", "B", "C"],
        26,
    )


def test_emnist_mapping(letters, tmp_path):
    """The mapping of EMNIST has to be there and whole."""
    path = tmp_path / "emnist-letters-mapping.txt"
    path.write_text("1 65 97\n2 66\n")
    with pytest.raises(ValueError, match=r"line 2 of .*'2 66', where 'label code code' should be"):
        mnist.about(tmp_path, "train", dataset="emnist-letters")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"emnist-letters-mapping.txt is missing: --root must be"):
        mnist.about(tmp_path, "train", dataset="emnist-letters")


def test_label_count(tmp_path, capsys):
    """Another number of labels than of images is refused."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x02\0\0\0\x01\0\0\0\x01ab")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x01\x03")
    with pytest.raises(ValueError, match="has 2 images and 1 labels for train, where"):
        mnist.about(tmp_path, "train", "mnist")
