"""A shard set in memory: its manifest, its index as arrays, and the bytes of any image in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from bigtrain.data.reader import Reader
from bigtrain.data.schema import filesystem, read_index, read_manifest, shards_url

Places = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]  # shard, offset and size of each sample


class ShardSet:
    """The shard set at a folder or URL; `shard_set.read([3, 7])` gives two images' original bytes.

    Raises:
        ValueError: there is no manifest, or a local shard is not as long as the manifest says.
    """

    def __init__(self, url: str) -> None:
        self.url = str(url)
        self.manifest = read_manifest(self.url)
        table = read_index(self.url)
        if table.num_rows != self.manifest.samples:
            raise ValueError(
                f"{url}: the index has {table.num_rows} rows and the manifest {self.manifest.samples} samples: "
                f"make the index again with `bigtrain-shards index {url}`."
            )
        self._key_N = table["key"].combine_chunks()
        self.shard_N: NDArray[np.int32] = table["shard"].to_numpy()
        self._offset_N = table["image_offset"].to_numpy()
        self._size_N = table["image_size"].to_numpy()
        classes = table["classes"].combine_chunks()
        self._class_start_N = classes.offsets.to_numpy()
        encoded = classes.values.dictionary_encode()
        self._class_of_object = encoded.indices.to_numpy()
        self._class_names: list[str] = encoded.dictionary.to_pylist()
        self._reader = self.reader()
        fs, path = filesystem(shards_url(self.url, self.manifest))
        if isinstance(fs, LocalFileSystem):
            self._check_sizes(Path(path))

    def __len__(self) -> int:
        return len(self.shard_N)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    def key(self, sample: int) -> str:
        return self._key_N[int(sample)].as_py()

    def keys(self) -> list[str]:
        return self._key_N.to_pylist()

    def classes_of(self, sample: int) -> list[str]:
        """The distinct classes an image shows, sorted by name; none where nothing is annotated."""
        part = self._class_of_object[self._class_start_N[sample] : self._class_start_N[sample + 1]]
        return [self._class_names[c] for c in part]

    def shows_any(self, class_names: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which samples show at least one of these classes: bool, shape (N,)."""
        wanted_C = np.isin(np.array(self._class_names, dtype=object), list(class_names))
        hits = np.concatenate([[0], np.cumsum(wanted_C[self._class_of_object])])
        return hits[self._class_start_N[1:]] > hits[self._class_start_N[:-1]]

    def count_classes(self, sample_N: NDArray[np.int64]) -> int:
        """How many distinct classes these images show together."""
        of_sample = np.repeat(np.arange(len(self)), np.diff(self._class_start_N))
        return len(np.unique(self._class_of_object[np.isin(of_sample, sample_N)]))

    def check_single_objects(self) -> None:
        """Refuse a set in which an image shows no class or several: a classifier needs exactly one for each."""
        wrong_N = np.flatnonzero(np.diff(self._class_start_N) != 1)
        if len(wrong_N):
            self.only_class_of(int(wrong_N[0]))

    def only_class_of(self, sample: int) -> str:
        """The class of an image that shows one; a classifier cannot learn from any other."""
        names = self.classes_of(sample)
        if len(names) != 1:
            raise ValueError(
                f"{self.url}: image {self.key(sample)} shows {len(names)} classes {names}; a classifier needs exactly "
                "one for each image: use a data set of single objects."
            )
        return names[0]

    def places(self, sample_N: NDArray[np.int64]) -> Places:
        """Where the pictures of some samples lie: their shards, and offsets and sizes in bytes."""
        return self.shard_N[sample_N], self._offset_N[sample_N], self._size_N[sample_N]

    def reader(self) -> Reader:
        """What reads by `places`, in this process or in a worker, which needs no index for it."""
        return Reader(shards_url(self.url, self.manifest), [shard.file for shard in self.manifest.shards])

    def read(self, samples: Sequence[int]) -> list[bytes]:
        """The original bytes of some images, in the order asked for; a shard that cannot be read stops the run."""
        return self._reader.read(*self.places(np.asarray(samples, np.int64)))

    def _check_sizes(self, folder: Path) -> None:
        for shard in self.manifest.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{path} {found}, and the manifest says {shard.bytes}: copy it again or build the set again "
                    f"(`bigtrain-shards check {self.url}` lists everything that is wrong)."
                )
