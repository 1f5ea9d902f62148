"""Manifest, index and bytes: what was written is read back, and broken files are refused with a clear message."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bigtrain.data import fetch
from bigtrain.data.reader import MAX_LOCAL_GAP_BYTES, Reader
from bigtrain.data.schema import Box, Manifest, Object, Sample, Shard
from bigtrain.data.set_files import INDEX_SCHEMA, read_index, read_manifest
from bigtrain.data.shard_set import ShardSet

TOP = Path(__file__).parents[2]
names = st.text(min_size=1, max_size=12)
file_names = st.from_regex(r"[0-9A-Za-z_-]{1,12}\.tar", fullmatch=True)


@given(
    st.builds(
        Manifest,
        dataset=names,
        split=names,
        classes=st.lists(names, unique=True).map(tuple),
        licence=names,
        shards=st.lists(
            st.builds(Shard, file_names, st.integers(0, 10**9), st.integers(0, 10**15), st.text("0123456789abcdef"))
        ).map(tuple),
    )
)
def test_manifest_round_trip(manifest):
    """A manifest reads as it was written."""
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", "a/b.tar", "..\\x.tar", "..", ""])
def test_path_traversal(file):
    """A manifest whose shards lead out of its folder is refused."""
    text = Manifest("pets", "train", (), "", (Shard(file, 1, 1, ""),)).to_json()
    with pytest.raises(ValueError, match="lie beside their manifest"):
        Manifest.from_json(text)


def test_label_member():
    """A sample's label member holds its classes, boxes and source."""
    box = Object("dog", Box(1, 2, 3.5, 4))
    sample = Sample("k", b"", "jpg", [box, Object("cat"), Object("dog")], source="a/k.jpg")
    record = {"classes": ["cat", "dog"], "boxes": [[1, 2, 3.5, 4, "dog"]], "source": "a/k.jpg"}
    assert json.loads(sample.to_json()) == record


@pytest.fixture
def three(write_set, noise):
    return write_set([(["a"], noise(0)), ([], noise(1)), (["a", "b"], noise(2))], per_shard=2)


def manifest_file(shard_set):
    return Path(shard_set.url) / "manifest.json"


def test_newer_manifest(three):
    """A manifest of a newer version is refused, with the advice to install a newer bigtrain."""
    record = json.loads(manifest_file(three).read_text())
    manifest_file(three).write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(ValueError, match=r"version 2.* up to version 1: install a newer bigtrain"):
        ShardSet(three.url)


@pytest.mark.parametrize("text", ["{", "{}", '{"format": "other", "version": 1}', "[1]"])
def test_what_is_no_manifest_is_refused(three, text):
    manifest_file(three).write_text(text)
    with pytest.raises(ValueError, match="build the shards again"):
        ShardSet(three.url)


def test_missing_manifest(tmp_path):
    """A missing manifest is refused, with the commands that make one."""
    with pytest.raises(ValueError, match=r"bigtrain-shards build folder --root PICTURES --out .*bigtrain-shards index"):
        read_manifest(str(tmp_path))


def test_missing_index(three):
    """A missing index is refused, with the command that makes one."""
    (Path(three.url) / "index.parquet").unlink()
    with pytest.raises(ValueError, match="bigtrain-shards index"):
        ShardSet(three.url)


def test_index_disagrees(three):
    """An index that disagrees with the manifest on the number of samples is refused."""
    manifest = three.manifest
    more = replace(manifest, shards=(*manifest.shards, Shard("x.tar", 1, 0, "")))
    manifest_file(three).write_text(more.to_json())
    with pytest.raises(ValueError, match=r"3 rows and the manifest 4 samples"):
        ShardSet(three.url)


def test_broken_shard_at_opening(three):
    """A truncated or missing shard is refused as soon as the set is opened."""
    shard = Path(three.url) / "000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"000001.tar has {size - 1} bytes, and the manifest says {size}"):
        ShardSet(three.url)
    shard.unlink()
    with pytest.raises(ValueError, match=r"000001.tar is missing"):
        ShardSet(three.url)


def test_broken_shard_in_run(three):
    """A shard that is cut or lost during a run stops it at once, when it is next read."""
    three.read([0])  # the other shard is open
    shard = Path(three.url) / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    assert len(three.read([0, 1])) == 2  # and still serves
    with pytest.raises(OSError, match=r"000001.tar has 600 bytes, and bytes 0 to \d+ were to be read.* give k2\."):
        three.read([0, 2])
    fresh = three.reader()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"000001.tar is missing"):
        fresh.read(*three.places(np.array([2])))


def test_index_unknown_shard(three):
    """An index that names a shard which the manifest does not have is refused."""
    path = Path(three.url) / "index.parquet"
    rows = read_index(three.url).to_pylist()
    for wrong in (2, -1, None):
        pq.write_table(pa.Table.from_pylist([*rows[:2], {**rows[2], "shard": wrong}], schema=INDEX_SCHEMA), path)
        with pytest.raises(ValueError, match=r"in none of the manifest's 2 shards: make it again"):
            ShardSet(three.url)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_any_samples(tmp_path, data):
    """Samples at any offsets, adjacent, far apart or repeated, are read in full, and large gaps are skipped."""
    sizes = data.draw(st.lists(st.integers(0, 300_000), min_size=1, max_size=3))
    contents = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.tar").write_bytes(content)
    places = []
    for _ in range(data.draw(st.integers(0, 30))):
        shard = data.draw(st.integers(0, len(sizes) - 1))
        start = data.draw(st.integers(0, sizes[shard]))
        places.append((shard, start, data.draw(st.integers(0, sizes[shard] - start))))
    reader = Reader(str(tmp_path), [f"{i}.tar" for i in range(len(sizes))])
    reader._checked = {f"{tmp_path}/{i}.tar" for i in range(len(sizes))}  # these have no headers
    place_N3 = np.array(places, np.int64).reshape(-1, 3)
    assert reader.read(*place_N3.T) == [contents[shard][start : start + size] for shard, start, size in places]
    assert reader.bytes_read <= sum(size for _, _, size in places) + MAX_LOCAL_GAP_BYTES * max(0, len(places) - 1)


def test_bytes_of_one_class(write_set):
    """Reading one class in a hundred reads a hundredth of the bytes, plus one header per shard."""
    rng = np.random.default_rng(0)
    shard_set = write_set([([f"c{i % 100}"], rng.bytes(2000)) for i in range(1000)], per_shard=250)
    reader = shard_set.reader()
    reader.read(*shard_set.places(np.flatnonzero(shard_set.shows_any(("c7",)))))
    assert reader.bytes_read == 10 * 2000 + 4 * 512  # and the header of the first of each shard


def test_pickle_reader(three):
    """A pickled reader is small and holds no open files, and reads the same bytes when unpickled."""
    reader = three.reader()
    places = three.places(np.arange(3))
    before = reader.read(*places)
    sent = pickle.dumps(reader)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert received.bytes_read == 0
    assert received.read(*places) == reader.read(*places) == before


def test_classes_of(three):
    """The classes of an image are those annotated."""
    assert [three.classes_of(s) for s in range(3)] == [["a"], [], ["a", "b"]]
    assert [three.key(s) for s in range(3)] == three.keys() == ["k0", "k1", "k2"]


@pytest.mark.parametrize("seed", range(5))
def test_shows_any(write_set, seed):
    """What `shows_any` finds is what a search of each image finds."""
    rng = np.random.default_rng(seed)
    every = list("abcdef")
    shown = [set(rng.choice(every, rng.integers(0, 4), replace=False).tolist()) for _ in range(40)]
    shard_set = write_set([(classes, b"x") for classes in shown], classes=every)
    for wanted in ((), ("a",), ("b", "e"), ("f", "a", "c"), tuple(every), ("absent",)):
        assert shard_set.shows_any(wanted).tolist() == [bool(classes & set(wanted)) for classes in shown]


def test_shows_any_unannotated(write_set):
    """A set without any annotation shows nothing."""
    shard_set = write_set([([], b"x"), ([], b"y")], classes=["a"])
    assert shard_set.shows_any(("a",)).tolist() == [False, False]


def test_builder_round_trip(tmp_path):
    """Pictures come back as their original bytes from the shards that the builder wrote."""
    originals = {}
    for name in ("cat", "dog"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for i in range(5):
            path = tmp_path / "raw" / name / f"{i}.png"
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 7, 3), np.uint8)).save(path)
            originals[f"{name}/{i}"] = path.read_bytes()
    options = ["--root", tmp_path / "raw", "--out", tmp_path / "set", "--samples-per-shard", 4, "--workers", 1]
    command = [sys.executable, "-m", "shards", "build", "folder", *map(str, options)]
    subprocess.run(command, cwd=TOP, check=True, capture_output=True)
    shard_set = ShardSet(str(tmp_path / "set"))
    assert len(shard_set.manifest.shards) == 3
    assert sorted(shard_set.keys()) == sorted(originals)
    order = [7, 2, 2, 9, 0, 5]
    assert shard_set.read(order) == [originals[shard_set.key(s)] for s in order]
    assert all(shard_set.classes_of(s) == [shard_set.key(s).split("/")[0]] for s in range(10))
    assert read_index(shard_set.url)["width"].to_pylist() == [7] * 10


@pytest.fixture
def remote(write_set):
    """The same set on disk and in an in-memory file system: (local, remote, the file system)."""
    local = write_set([(["a"], bytes([i]) * (50 + i)) for i in range(10)], per_shard=3)
    fs = fsspec.filesystem("memory")
    for file in Path(local.url).iterdir():
        fs.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    yield local, ShardSet("memory://bucket/set"), fs
    fs.rm("/bucket", recursive=True)


def test_remote_bytes(remote):
    """A set in a remote file system gives the same keys and bytes as on the disk."""
    local, far, _ = remote
    assert far.keys() == local.keys()
    order = [9, 0, 4, 4, 1]
    assert far.read(order) == local.read(order) == [bytes([i]) * (50 + i) for i in order]


@pytest.mark.parametrize(
    ("harm", "kind", "cause", "waits"),
    [
        ("missing", FileNotFoundError, "000001.tar is missing", 0),
        ("truncated", OSError, r"000001.tar has 600 bytes, and bytes \d+ to \d+ were to be read", 0),
        ("refused", OSError, "000001.tar cannot be read: tried 6 times; last error: RuntimeError: 503", 5),
    ],
)
def test_retry_or_stop(remote, monkeypatch, harm, kind, cause, waits):
    """A transient failure is retried with growing waits; a permanent one stops the read at once."""
    _, far, fs = remote
    waited = []
    monkeypatch.setattr(fetch.time, "sleep", waited.append)
    if harm == "missing":
        fs.rm("/bucket/set/000001.tar")
    elif harm == "truncated":
        fs.pipe_file("/bucket/set/000001.tar", fs.cat_file("/bucket/set/000001.tar")[:600])
    else:  # clients of object stores have errors of their own

        def refuse(*_, **__):
            raise RuntimeError("503")

        monkeypatch.setattr(type(fs), "cat_file", refuse)
    with pytest.raises(kind, match=rf"memory://bucket/set/{cause}|memory:///bucket/set/{cause}"):
        far.read([4])
    assert len(waited) == waits
    assert all(0.25 * 2**n <= wait_s <= 0.75 * 2**n for n, wait_s in enumerate(waited))


def forty_shards(write_set, name, classes, size=100):
    return write_set([([c], bytes(size)) for c in classes], per_shard=10, name=name)


def test_span_length(write_set, caplog):
    """A span is about a megabyte at most, and a single picture if the set is sorted by class."""
    in_order = ["a"] * 200 + ["b"] * 200
    mixed = np.random.default_rng(0).permutation(in_order).tolist()
    everything = np.arange(400)
    small, large = forty_shards(write_set, "small", mixed), forty_shards(write_set, "large", mixed, 30_000)
    assert [small.plan(everything, 8).span_length, large.plan(everything, 8).span_length] == [32, 32]
    large._size_N = 10 * large._size_N
    assert large.plan(everything, 8).span_length == 3
    large._size_N = 10 * large._size_N
    assert large.plan(everything, 8).span_length == 1
    assert not caplog.records
    shard_set = forty_shards(write_set, "sorted", in_order)
    assert shard_set.plan(everything, 8).span_length == 1
    assert "sorted by class" in caplog.text
    assert shard_set.plan(everything[:200], 8).span_length == 32  # with a single class, sorting does not matter


def test_plan_in_order(write_set, caplog):
    """A plan without shuffling keeps the index's order, and does not warn of sorted classes."""
    shard_set = forty_shards(write_set, "sorted", ["a"] * 200 + ["b"] * 200)
    assert np.array_equal(shard_set.plan(np.arange(400), 8, shuffle=False).order(0), np.arange(400))
    assert not caplog.records
