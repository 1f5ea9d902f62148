"""A shard set in memory: its manifest, its index as arrays, and the bytes of any image in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from bigtrain.data.schema import filesystem, read_index, read_manifest, shards_url

READ_ATTEMPTS = 4


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
        self._fs, self._path = filesystem(shards_url(self.url, self.manifest))
        self._open: dict[int, int] = {}
        if isinstance(self._fs, LocalFileSystem):
            self._check_sizes()

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

    def read(self, samples: list[int]) -> list[bytes]:
        """The original bytes of some images, in the order asked for; a shard that cannot be read stops the run."""
        for attempt in range(READ_ATTEMPTS):
            try:
                payloads = [self._read_local(s) for s in samples] if self._is_local else self._read_remote(samples)
                for sample, payload in zip(samples, payloads, strict=True):
                    if len(payload) != self._size_N[sample]:
                        whole = f"{len(payload)} of {self._size_N[sample]} bytes of {self.key(sample)}"
                        raise OSError(f"{whole}: the shard is truncated")
                return payloads
            except Exception as error:  # each file system has errors of its own
                if attempt == READ_ATTEMPTS - 1:
                    files = sorted({self.manifest.shards[self.shard_N[s]].file for s in samples})
                    raise OSError(f"{self.url}: {', '.join(files)} cannot be read ({error})") from error
                time.sleep(0.2 * 4**attempt)
        raise AssertionError("unreachable")

    @property
    def _is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def _read_local(self, sample: int) -> bytes:
        shard = int(self.shard_N[sample])
        if shard not in self._open:
            if len(self._open) >= 64:  # far below the usual limit of open files
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(f"{self._path}/{self.manifest.shards[shard].file}", os.O_RDONLY)
        return os.pread(self._open[shard], int(self._size_N[sample]), int(self._offset_N[sample]))

    def _read_remote(self, samples: list[int]) -> list[bytes]:
        files = [f"{self._path}/{self.manifest.shards[self.shard_N[s]].file}" for s in samples]
        start, size = self._offset_N[samples], self._size_N[samples]
        return self._fs.cat_ranges(files, start.tolist(), (start + size).tolist(), on_error="raise")

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            path = Path(self._path) / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{path} {found}, and the manifest says {shard.bytes}: copy it again or build the set again "
                    f"(`bigtrain-shards check {self.url}` lists everything that is wrong)."
                )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # workers open their own files
