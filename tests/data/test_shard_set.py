"""Manifest, index and bytes: what was written is what is read, and what is broken is refused in a sentence."""

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
def test_a_manifest_reads_as_it_was_written(manifest):
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", "a/b.tar", "..\\x.tar", "..", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(file):
    text = Manifest("pets", "train", (), "", (Shard(file, 1, 1, ""),)).to_json()
    with pytest.raises(ValueError, match="lie beside their manifest"):
        Manifest.from_json(text)


def test_the_label_member_holds_classes_boxes_and_source():
    box = Object("dog", Box(1, 2, 3.5, 4))
    sample = Sample("k", b"", "jpg", [box, Object("cat"), Object("dog")], source="a/k.jpg")
    record = {"classes": ["cat", "dog"], "boxes": [[1, 2, 3.5, 4, "dog"]], "source": "a/k.jpg"}
    assert json.loads(sample.to_json()) == record


@pytest.fixture
def three(write_set, noise):
    return write_set([(["a"], noise(0)), ([], noise(1)), (["a", "b"], noise(2))], per_shard=2)


def manifest_file(shard_set):
    return Path(shard_set.url) / "manifest.json"


def test_a_manifest_of_a_newer_version_is_refused(three):
    record = json.loads(manifest_file(three).read_text())
    manifest_file(three).write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(ValueError, match=r"version 2.* up to version 1: install a newer bigtrain"):
        ShardSet(three.url)


@pytest.mark.parametrize("text", ["{", "{}", '{"format": "other", "version": 1}', "[1]"])
def test_what_is_no_manifest_is_refused(three, text):
    manifest_file(three).write_text(text)
    with pytest.raises(ValueError, match="build the shards again"):
        ShardSet(three.url)


def test_a_missing_manifest_names_the_command_that_builds_one(tmp_path):
    with pytest.raises(ValueError, match=r"bigtrain-shards build folder --root PICTURES --out .*bigtrain-shards index"):
        read_manifest(str(tmp_path))


def test_a_missing_index_names_the_command_that_makes_one(three):
    (Path(three.url) / "index.parquet").unlink()
    with pytest.raises(ValueError, match="bigtrain-shards index"):
        ShardSet(three.url)


def test_an_index_that_disagrees_with_the_manifest_is_refused(three):
    manifest = three.manifest
    more = replace(manifest, shards=(*manifest.shards, Shard("x.tar", 1, 0, "")))
    manifest_file(three).write_text(more.to_json())
    with pytest.raises(ValueError, match=r"3 rows and the manifest 4 samples"):
        ShardSet(three.url)


def test_a_truncated_and_a_missing_shard_are_refused_at_once(three):
    shard = Path(three.url) / "000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"000001.tar has {size - 1} bytes, and the manifest says {size}"):
        ShardSet(three.url)
    shard.unlink()
    with pytest.raises(ValueError, match=r"000001.tar is missing"):
        ShardSet(three.url)


def test_a_shard_that_is_cut_or_lost_during_a_run_stops_it_at_once(three):
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


def test_an_index_that_names_a_shard_which_is_not_there_is_refused(three):
    path = Path(three.url) / "index.parquet"
    rows = read_index(three.url).to_pylist()
    for wrong in (2, -1, None):
        pq.write_table(pa.Table.from_pylist([*rows[:2], {**rows[2], "shard": wrong}], schema=INDEX_SCHEMA), path)
        with pytest.raises(ValueError, match=r"in none of the manifest's 2 shards: make it again"):
            ShardSet(three.url)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_samples_in_any_order_are_read_whole_and_gaps_are_not(tmp_path, data):
    """Files of patterned bytes, and pictures anywhere in them, touching, far apart or asked for twice."""
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


def test_one_class_in_a_hundred_costs_a_hundredth_of_the_bytes(write_set):
    rng = np.random.default_rng(0)
    shard_set = write_set([([f"c{i % 100}"], rng.bytes(2000)) for i in range(1000)], per_shard=250)
    reader = shard_set.reader()
    reader.read(*shard_set.places(np.flatnonzero(shard_set.shows_any(("c7",)))))
    assert reader.bytes_read == 10 * 2000 + 4 * 512  # and the header of the first of each shard


def test_a_reader_travels_small_and_closed(three):
    reader = three.reader()
    places = three.places(np.arange(3))
    before = reader.read(*places)
    sent = pickle.dumps(reader)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert received.bytes_read == 0
    assert received.read(*places) == reader.read(*places) == before


def test_the_classes_of_an_image_are_what_was_annotated(three):
    assert [three.classes_of(s) for s in range(3)] == [["a"], [], ["a", "b"]]
    assert [three.key(s) for s in range(3)] == three.keys() == ["k0", "k1", "k2"]
    assert three.only_class_of(0) == "a"
    for sample, count in ((1, 0), (2, 2)):
        with pytest.raises(ValueError, match=f"shows {count} classes"):
            three.only_class_of(sample)


@pytest.mark.parametrize("seed", range(5))
def test_shows_any_is_what_a_search_of_each_image_finds(write_set, seed):
    rng = np.random.default_rng(seed)
    every = list("abcdef")
    shown = [set(rng.choice(every, rng.integers(0, 4), replace=False).tolist()) for _ in range(40)]
    shard_set = write_set([(classes, b"x") for classes in shown], classes=every)
    for wanted in ((), ("a",), ("b", "e"), ("f", "a", "c"), tuple(every), ("absent",)):
        assert shard_set.shows_any(wanted).tolist() == [bool(classes & set(wanted)) for classes in shown]


def test_a_set_without_any_annotation_shows_nothing(write_set):
    shard_set = write_set([([], b"x"), ([], b"y")], classes=["a"])
    assert shard_set.shows_any(("a",)).tolist() == [False, False]


def test_pictures_come_back_as_their_original_bytes_from_shards_of_the_builder(tmp_path):
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
    """The same set on a local disk and in a file system that is none: (local, remote, the file system)."""
    local = write_set([(["a"], bytes([i]) * (50 + i)) for i in range(10)], per_shard=3)
    fs = fsspec.filesystem("memory")
    for file in Path(local.url).iterdir():
        fs.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    yield local, ShardSet("memory://bucket/set"), fs
    fs.rm("/bucket", recursive=True)


def test_a_remote_set_gives_the_same_bytes(remote):
    local, far, _ = remote
    assert far.keys() == local.keys()
    order = [9, 0, 4, 4, 1]
    assert far.read(order) == local.read(order) == [bytes([i]) * (50 + i) for i in order]


@pytest.mark.parametrize(
    ("harm", "kind", "cause", "waits"),
    [
        ("missing", FileNotFoundError, "000001.tar is missing", 0),
        ("truncated", OSError, r"000001.tar has 600 bytes, and bytes \d+ to \d+ were to be read", 0),
        ("refused", OSError, "000001.tar cannot be read: tried 6 times, at last RuntimeError: 503", 5),
    ],
)
def test_what_may_pass_is_tried_again_and_what_will_not_stops_at_once(remote, monkeypatch, harm, kind, cause, waits):
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


def test_a_run_is_about_a_megabyte_and_one_picture_where_neighbours_show_one_class(write_set, caplog):
    in_order = ["a"] * 200 + ["b"] * 200
    mixed = np.random.default_rng(0).permutation(in_order).tolist()
    everything = np.arange(400)
    small, large = forty_shards(write_set, "small", mixed), forty_shards(write_set, "large", mixed, 30_000)
    assert [small.plan(everything, 8).run_length, large.plan(everything, 8).run_length] == [32, 32]
    large._size_N = 10 * large._size_N
    assert large.plan(everything, 8).run_length == 3
    large._size_N = 10 * large._size_N
    assert large.plan(everything, 8).run_length == 1
    assert not caplog.records
    shard_set = forty_shards(write_set, "sorted", in_order)
    assert shard_set.plan(everything, 8).run_length == 1
    assert "sorted by class" in caplog.text
    assert shard_set.plan(everything[:200], 8).run_length == 32  # one class, and then there is nothing else


def test_in_order_a_plan_asks_nothing_of_the_classes(write_set, caplog):
    shard_set = forty_shards(write_set, "sorted", ["a"] * 200 + ["b"] * 200)
    assert np.array_equal(shard_set.plan(np.arange(400), 8, shuffle=False).order(0), np.arange(400))
    assert not caplog.records
