"""CIFAR-10 as its owners publish it, and pickles that want to do harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.schema import Sample
from shards.adapters import cifar10


def pixels(sample: Sample) -> np.ndarray:
    assert isinstance(sample.image, bytes)
    return np.asarray(Image.open(io.BytesIO(sample.image)))


def batch_rows(seed: int, count: int = 4) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 10, count).tolist()


def python2_string(data: bytes) -> bytes:
    """A str of Python 2 in protocol 2, as in the official archive: SHORT_BINSTRING or BINSTRING."""
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def official_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """What cPickle of Python 2 wrote for {"batch_label", "labels", "data", "filenames"}, opcode by opcode."""
    s = python2_string
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    dtype = b"cnumpy\ndtype\n" + s(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + s(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + s(b"b") + b"\x87R"
    array += (
        b"(K\x01M" + struct.pack("<H", len(labels)) + b"M\x00\x0c\x86" + dtype + b"\x89" + s(data.tobytes()) + b"tb"
    )
    names = b"](" + b"".join(s(b"picture_%d.png" % n) for n in range(len(labels))) + b"e"
    entries = s(b"batch_label") + s(b"batch 1") + s(b"labels") + numbers + s(b"data") + array + s(b"filenames") + names
    return b"\x80\x02}(" + entries + b"u."


def python3_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"batch_label": b"b", b"labels": labels, b"data": data, b"filenames": [b"a.png"]}, protocol=2)


def archive(path: Path, inner: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def python_files(dump: Callable[[np.ndarray, list[int]], bytes]) -> dict[str, bytes]:
    return {f"data_batch_{n}": dump(*batch_rows(n)) for n in range(1, 6)} | {"test_batch": dump(*batch_rows(6))}


def binary_files() -> dict[str, bytes]:
    files = {}
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"], 1):
        data, labels = batch_rows(number)
        files[f"{name}.bin"] = b"".join(bytes([label]) + row.tobytes() for row, label in zip(data, labels, strict=True))
    return files


def test_the_pickle_of_this_test_is_what_pickle_itself_reads():
    data, labels = batch_rows(1)
    record = pickle.loads(official_pickle(data, labels), encoding="bytes")
    assert np.array_equal(record[b"data"], data)
    assert record[b"labels"] == labels


@pytest.mark.parametrize("dump", [official_pickle, python3_pickle])
@pytest.mark.parametrize("unpacked", [False, True])
def test_the_python_archive_of_cifar_gives_its_pixels_and_classes(tmp_path, dump, unpacked):
    archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(dump))
    if unpacked:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "cifar-10-python.tar.gz").unlink()
    found = list(cifar10.samples(tmp_path, "train"))
    assert cifar10.about(tmp_path, "train").total == len(found) == 20
    data, labels = batch_rows(2)
    assert np.array_equal(pixels(found[5]), data[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert [s.classes for s in found[4:8]] == [[cifar10.CLASSES[label]] for label in labels]
    assert len(list(cifar10.samples(tmp_path, "test"))) == 4


def test_the_binary_archive_of_cifar_gives_the_same_samples_as_the_python_one(tmp_path):
    archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(official_pickle))
    (tmp_path / "b").mkdir()
    archive(tmp_path / "b" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files())
    from_python = list(cifar10.samples(tmp_path / "cifar-10-python.tar.gz", "train"))
    assert from_python == list(cifar10.samples(tmp_path / "b" / "cifar-10-binary.tar.gz", "train"))


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    target = tmp_path / "run"
    for number, attack in enumerate(
        [
            pickle.dumps({b"data": Malice(target), b"labels": [1]}, protocol=2),
            f"cbuiltins\neval\n(S'open({str(target)!r}, \"w\")'\ntR.".encode(),
            b"cnumpy\nload\n(S'x'\ntR.",
            b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
            pickle.dumps({b"data": np.array([Malice(target)], dtype=object), b"labels": [1]}, protocol=2),
            pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, protocol=2),
            official_pickle(*batch_rows(0))[:-5000],
        ]
    ):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "test_batch").write_bytes(attack)
        with pytest.raises(ValueError, match=r"is refused|does not hold"):
            cifar10.about(root, "test")
    assert not target.exists()


def test_class_folders_of_cifar_are_read_and_others_refused(tmp_path, paint):
    paint(0, (32, 32), path=tmp_path / "test" / "frog" / "1.jpg")
    paint(1, (32, 32), path=tmp_path / "test" / "ship" / "1.jpg")
    assert [(s.key, s.classes) for s in cifar10.samples(tmp_path, "test")] == [
        ("test/frog/1", ["frog"]),
        ("test/ship/1", ["ship"]),
    ]
    assert cifar10.about(tmp_path, "test").classes == cifar10.CLASSES
    paint(2, path=tmp_path / "test" / "boat" / "1.jpg")
    with pytest.raises(ValueError, match="boat, which are no classes of CIFAR-10"):
        cifar10.about(tmp_path, "test")
