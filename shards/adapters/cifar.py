"""CIFAR-10: the owners' archives (python or binary form), unpacked or not, or folders {train,test}/<class>/."""

from __future__ import annotations

import contextlib
import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bigtrain.data.schema import Object, Sample
from shards.adapters import folder, plain_pickle
from shards.adapters.about import About
from shards.adapters.mnist import png

LAYOUT = (
    "cifar-10-python.tar.gz or cifar-10-binary.tar.gz, the folder that holds or was unpacked from one of them, "
    "or a folder of train/<class>/ and test/<class>/"
)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LICENCE = "none stated by its owners"
BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
INNER = {"cifar-10-python.tar.gz": "cifar-10-batches-py", "cifar-10-binary.tar.gz": "cifar-10-batches-bin"}
RECORD = 1 + 3072  # of the binary form: label, then 32 x 32 red, green, blue
MAX_BATCH_BYTES = 1 << 27  # a batch has 31 MB


def about(root: Path, split: str) -> About:
    if split not in BATCHES:
        raise ValueError(f"--split {split} is not in CIFAR-10: it has train and test.")
    if is_folders(root, split):
        by_class = folder.pictures_by_class(root / split)
        if unknown := sorted(set(by_class) - set(CLASSES)):
            raise ValueError(
                f"{root / split} has folders {', '.join(unknown[:5])}, which are no classes of CIFAR-10 "
                f"({', '.join(CLASSES)}): use the adapter `folder` for other sets."
            )
        return About("cifar10", CLASSES, LICENCE, sum(map(len, by_class.values())))
    total = sum(len(read_batch(root, name)[1]) for name in BATCHES[split])
    return About("cifar10", CLASSES, LICENCE, total)


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield archives in their own order (python and binary form give the same keys), folders one class in turn."""
    if is_folders(root, split):
        for name, path in folder.in_turn(folder.pictures_by_class(root / split)):
            inner = path.relative_to(root)
            yield Sample(
                inner.with_suffix("").as_posix(), path, folder.extension(path), [Object(name)], inner.as_posix()
            )
        return
    place = 0
    for batch in BATCHES[split]:
        images, labels = read_batch(root, batch)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            key = f"{split}-{place:05d}"
            yield Sample(key, png(image), "png", [Object(CLASSES[label])], source=f"{batch}:{row}")
            place += 1


def is_folders(root: Path, split: str) -> bool:
    return any((root / split / name).is_dir() for name in CLASSES)


@functools.lru_cache(maxsize=5)
def read_batch(root: Path, batch: str) -> tuple[np.ndarray, list[int]]:
    """Images, N x 32 x 32 x 3, and labels of one batch, in whichever form it is there."""
    data, is_binary = batch_bytes(root, batch)
    if is_binary:
        if not data or len(data) % RECORD:
            raise ValueError(f"{batch}.bin in {root} is no whole number of {RECORD}-byte records: get it again.")
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        pixels, labels = records[:, 1:], records[:, 0].tolist()
    else:
        try:
            record = plain_pickle.load(data)
            pixels, labels = record[b"data"], record[b"labels"]
            well_formed = (
                isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)
            )
        except plain_pickle.RefusedError as error:
            raise ValueError(f"{batch} in {root} is refused: {error}. Get it from its owners.") from error
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{batch} in {root} is no batch of CIFAR-10 ({error!r}): get it again.") from error
        if not well_formed:
            raise ValueError(f"{batch} in {root} does not hold N x 3072 bytes and N labels: get it again.")
    if not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"{batch} in {root} has labels outside 0 .. 9: get it again.")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def batch_bytes(root: Path, batch: str) -> tuple[bytes, bool]:
    """The file of a batch, from a folder or out of the archive, and whether it has the binary form."""
    for archive_name, inner in INNER.items():
        is_binary = inner.endswith("bin")
        name = f"{batch}.bin" if is_binary else batch
        for path in (root / name, root / inner / name):
            if path.is_file():
                return path.read_bytes(), is_binary
        for archive in (root, root / archive_name):
            if archive.is_file():
                with contextlib.suppress(KeyError):
                    return from_archive(archive, f"{inner}/{name}"), is_binary
    raise FileNotFoundError(f"{root} has no {batch} of CIFAR-10: --root must be {LAYOUT}.")


def from_archive(archive: Path, name: str) -> bytes:
    try:
        with tarfile.open(archive) as tar:
            member = tar.getmember(name)
            file = tar.extractfile(member)
            if file is None or member.size > MAX_BATCH_BYTES:
                raise ValueError(f"{name} in {archive} is no batch of CIFAR-10: get the archive from its owners.")
            return file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read as an archive ({error}): get it again.") from error
