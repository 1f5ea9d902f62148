"""Rows that processes share: whole or made anew, whatever happened to the file."""

import copy
import errno
import multiprocessing
import os

import numpy as np
import pytest

from bigtrain.data.row_cache import RowCache, why_no_room
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import START, Stream
from bigtrain.data.views import CentreCrop, RandomResizedCrop, Resized, is_fixed
from bigtrain.data.work import Work

ROWS, BYTES = 12, 40


def a_cache(folder, belongs_to=(("teacher", "one"),)):
    return RowCache(folder, "tokens", dict(belongs_to), rows=ROWS, row_bytes=BYTES)


def row_of(number):
    return np.random.default_rng(number).integers(0, 256, BYTES, dtype=np.uint8)


def filled(folder):
    cache = a_cache(folder)
    assert cache.prepare(is_own=True) == ""
    for number in range(0, ROWS, 2):
        cache.write(number, row_of(number))
    return cache


def whole(cache):
    """The rows that can be read; they are as they were written."""
    found = []
    for number in range(ROWS):
        row = np.zeros(BYTES, np.uint8)
        if cache.read(number, row):
            assert np.array_equal(row, row_of(number))
            found.append(number)
    return found


def test_read_what_was_written(tmp_path):
    """Rows that were written are read, by any process; others are not there."""
    filled(tmp_path)
    again = a_cache(tmp_path)
    assert whole(again) == [0, 2, 4, 6, 8, 10] and again.has(2) and not again.has(3) and again.news() == []


def test_changed_byte(tmp_path):
    """A row with a changed byte is found by its checksum, told of once, and made anew."""
    cache = filled(tmp_path)
    with cache.path.with_suffix(".rows").open("r+b") as file:
        file.seek(4 * BYTES + 7)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert whole(cache) == [0, 2, 6, 8, 10]
    assert cache.news() == [f"some of the cached tokens in {tmp_path} differ from their checksums: they are made anew"]
    assert cache.news() == []
    cache.write(4, row_of(4))
    assert whole(cache) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("suffix", [".rows", ".sums"])
def test_cut_short(tmp_path, suffix):
    """A file that was cut short gives what is left of it."""
    cache = filled(tmp_path)
    path = cache.path.with_suffix(suffix)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert whole(cache) == [0, 2, 4] and not cache.has(10 if suffix == ".sums" else 11)  # while it is open
    again = a_cache(tmp_path)
    assert again.prepare(is_own=True) == f"the cached tokens in {tmp_path} were cut short: what is missing is made anew"
    again.write(8, row_of(8))
    assert whole(again) == [0, 2, 4, 8]


def test_another_teacher(tmp_path):
    """In a run's own folder the rows of another teacher go; in a shared one they stay."""
    filled(tmp_path / "own"), filled(tmp_path / "shared")
    other = [("teacher", "two")]
    said = a_cache(tmp_path / "own", other).prepare(is_own=True)
    assert said == f"the cached tokens in {tmp_path / 'own'} belong to another teacher: made anew"
    assert len(list((tmp_path / "own").iterdir())) == 3
    assert a_cache(tmp_path / "shared", other).prepare(is_own=False) == ""
    assert whole(a_cache(tmp_path / "shared")) == [0, 2, 4, 6, 8, 10]
    assert whole(a_cache(tmp_path / "shared", other)) == []


def fill(folder):
    cache = a_cache(folder)
    cache.prepare(is_own=False)
    for _ in range(30):
        for number in range(ROWS):
            row = np.zeros(BYTES, np.uint8)
            if cache.read(number, row):
                assert np.array_equal(row, row_of(number))
            cache.write(number, row_of(number))


def test_two_fill_at_once(tmp_path):
    """Two runs that fill one cache at once read whole rows only, and leave it whole."""
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=fill, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert whole(a_cache(tmp_path)) == list(range(ROWS))


def test_no_room(tmp_path):
    """A cache larger than allowed, or than the disk, is refused with a sentence."""
    assert why_no_room(tmp_path / "new", 10, 1, "views") == ""
    assert why_no_room(tmp_path, 2**31, 1, "views").startswith("views need 2.0 GiB, more than --cache-gib 1 leaves")
    assert "are free in" in why_no_room(tmp_path, 2**60, 1e12, "views")


def test_fixed_views():
    """Only views that are always the same are kept."""
    assert is_fixed(Resized(8)) and is_fixed(CentreCrop(8, 8)) and not is_fixed(RandomResizedCrop(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_with_cache(shards, tmp_path, workers):
    """With a cache a stream gives the same batches, reads no picture twice, and mends what was damaged."""
    shard_set = ShardSet(shards / "train")
    plan = shard_set.plan(np.arange(30), 8, seed=1)
    cache = RowCache(tmp_path, "views", {"view": "8"}, rows=len(shard_set), row_bytes=3 * 8 * 8)
    cache.prepare(is_own=True)
    plain = list(Stream(shard_set, plan, Resized(8)).batches(epochs=3))
    kept = list(Stream(shard_set, plan, Resized(8), workers=workers, cache=cache).batches(epochs=3))
    for one, other in zip(plain, kept, strict=True):
        assert one.views["image"].equal(other.views["image"]) and one.weight_B.equal(other.weight_B)
        assert one.sample_B.tolist() == other.sample_B.tolist()
    bytes_of = [sum(batch.read_bytes for batch in kept if batch.position.epoch == epoch) for epoch in range(3)]
    assert bytes_of[0] > 0 and bytes_of[2] == 0 and (workers or bytes_of[1] == 0)
    cache.path.with_suffix(".rows").write_bytes(b"")
    again = list(Stream(shard_set, plan, Resized(8), workers=workers, cache=cache).batches())
    assert all(one.views["image"].equal(other.views["image"]) for one, other in zip(plain, again, strict=False))


def test_nothing_kept_ahead(shards, tmp_path):
    """What was read ahead is let go of where another run has kept the view meanwhile."""
    shard_set = ShardSet(shards / "train")
    plan = shard_set.plan(np.arange(400), 8, seed=1)
    own = RowCache(tmp_path, "views", {"view": "8"}, rows=len(shard_set), row_bytes=3 * 8 * 8)
    own.prepare(is_own=True)
    stream, other = Stream(shard_set, plan, Resized(8), cache=own), copy.copy(own)
    works = [Work(shard_set.reader(), Resized(8), cache) for cache in (own, other)]
    for piece in stream._pieces(START, 1):
        for work in works:
            work[piece]
    assert all(not work._ahead for work in works)
    assert sum(own.has(number) for number in range(400)) == 400


def test_failing_disk(tmp_path, monkeypatch):
    """A disk that fails costs the rows, and no run."""
    cache = filled(tmp_path)

    def fails(*given):
        raise OSError(errno.EIO, "Input/output error")

    for name in ("pread", "preadv", "pwrite"):
        monkeypatch.setattr(os, name, fails)
    assert whole(cache) == [] and not cache.has(0)
    cache.write(0, row_of(0))
    assert cache.is_full and "or the disk fails" in cache.news()[0]
