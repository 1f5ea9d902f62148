"""CIFAR-10 and CIFAR-100 as their owners publish them, and malicious pickles."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.schema import Sample
from shards.adapters import cifar, plain_pickle
from shards.adapters.cifar import CIFAR10, CIFAR100


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


def test_pickle_reference():
    """Python's own `pickle` reads the official pickle that these tests write by hand."""
    data, labels = batch_rows(1)
    record = pickle.loads(official_pickle(data, labels), encoding="bytes")
    assert np.array_equal(record[b"data"], data)
    assert record[b"labels"] == labels


@pytest.mark.parametrize("dump", [official_pickle, python3_pickle])
@pytest.mark.parametrize("unpacked", [False, True])
def test_python_archive(tmp_path, dump, unpacked):
    """CIFAR-10's Python archive, packed or unpacked, gives its pixels and classes."""
    archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(dump))
    if unpacked:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "cifar-10-python.tar.gz").unlink()
    found = list(CIFAR10.samples(tmp_path, "train"))
    assert CIFAR10.about(tmp_path, "train").total == len(found) == 20
    data, labels = batch_rows(2)
    assert np.array_equal(pixels(found[5]), data[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert [s.classes for s in found[4:8]] == [[CIFAR10.classes["fine"][label]] for label in labels]
    assert len(list(CIFAR10.samples(tmp_path, "test"))) == 4


def test_binary_archive(tmp_path):
    """CIFAR-10's binary archive gives the same samples as the Python one."""
    archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", python_files(official_pickle))
    (tmp_path / "b").mkdir()
    archive(tmp_path / "b" / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files())
    from_python = list(CIFAR10.samples(tmp_path / "cifar-10-python.tar.gz", "train"))
    assert from_python == list(CIFAR10.samples(tmp_path / "b" / "cifar-10-binary.tar.gz", "train"))


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_malicious_pickle(tmp_path):
    """A malicious or malformed pickle is refused, and runs nothing."""
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
            CIFAR10.about(root, "test")
    assert not target.exists()


def test_class_folders(tmp_path, paint):
    """Folders named after CIFAR-10's classes are read, and any other folder is refused."""
    paint(0, (32, 32), path=tmp_path / "test" / "frog" / "1.jpg")
    paint(1, (32, 32), path=tmp_path / "test" / "ship" / "1.jpg")
    assert [(s.key, s.classes) for s in CIFAR10.samples(tmp_path, "test")] == [
        ("test/frog/1", ["frog"]),
        ("test/ship/1", ["ship"]),
    ]
    assert CIFAR10.about(tmp_path, "test").classes == CIFAR10.classes["fine"]
    paint(2, path=tmp_path / "test" / "boat" / "1.jpg")
    with pytest.raises(ValueError, match="boat, which are not classes of CIFAR-10"):
        CIFAR10.about(tmp_path, "test")


def test_pickle_memo():
    """A pickle that asks for a huge memo takes no memory."""
    for_memo = b"\x80\x02}r" + struct.pack("<I", 1 << 27) + b"."  # Python's reader in C would take 2 GB
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert plain_pickle.load(for_memo) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_kib + (1 << 19)


@pytest.fixture
def cifar100_files() -> dict[str, dict[str, bytes]]:
    """The files of CIFAR-100 by archive format, with five pictures in train and three in test."""
    rng = np.random.default_rng(0)
    files: dict[str, dict[str, bytes]] = {"python": {}, "binary": {}}
    for split, count in (("train", 5), ("test", 3)):
        data = rng.integers(0, 256, (count, 3072), np.uint8)
        fine, coarse = rng.integers(0, 100, count).tolist(), rng.integers(0, 20, count).tolist()
        record = {b"filenames": [b"a.png"] * count, b"batch_label": b"b", b"fine_labels": fine}
        files["python"][split] = pickle.dumps(record | {b"coarse_labels": coarse, b"data": data}, protocol=2)
        rows = zip(coarse, fine, data, strict=True)
        files["binary"][f"{split}.bin"] = b"".join(bytes([c, f]) + row.tobytes() for c, f, row in rows)
    return files


def test_cifar100_archives(tmp_path, cifar100_files):
    """Both archives of CIFAR-100 give the same samples, with fine or coarse classes."""
    for form, files in cifar100_files.items():
        archive(tmp_path / f"cifar-100-{form}.tar.gz", f"cifar-100-{form}", files)
    record = pickle.loads(cifar100_files["python"]["train"])
    for labels, names in (("fine", cifar.FINE_NAMES), ("coarse", cifar.COARSE_NAMES)):
        python, binary = (
            list(CIFAR100.samples(tmp_path / f"cifar-100-{form}.tar.gz", "train", labels=labels))
            for form in ("python", "binary")
        )
        assert python == binary
        assert [s.classes for s in python] == [[names[n]] for n in record[f"{labels}_labels".encode()]]
        assert np.array_equal(pixels(python[4]), record[b"data"][4].reshape(3, 32, 32).transpose(1, 2, 0))
        about = CIFAR100.about(tmp_path, "test", labels=labels)
        assert (about.dataset, about.classes, about.total) == ("cifar100", names, 3)


def test_cifar100_classes():
    """CIFAR-100's 100 fine and 20 coarse classes are sorted, as its owners number them."""
    assert (len(cifar.FINE_NAMES), len(cifar.COARSE_NAMES)) == (100, 20)
    assert sorted(cifar.FINE_NAMES) == cifar.FINE_NAMES
    assert sorted(cifar.COARSE_NAMES) == cifar.COARSE_NAMES


def test_cifar100_bad_label(tmp_path):
    """A label of CIFAR-100 outside its classes is refused."""
    (tmp_path / "test.bin").write_bytes(bytes([19, 100]) + bytes(3072))
    assert CIFAR100.about(tmp_path, "test", labels="coarse").total == 1
    with pytest.raises(ValueError, match=r"labels outside 0 .. 99"):
        CIFAR100.about(tmp_path, "test")
