"""Manifest, index and bytes: what was written is what is read, and what is broken is refused in a sentence."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bigtrain.data import shard_set as module
from bigtrain.data.schema import Box, Manifest, Object, Sample, Shard, read_index, read_manifest
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


def test_a_shard_truncated_during_a_run_is_retried_and_then_stops_it(three, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    shard = Path(three.url) / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    assert len(three.read([0, 1])) == 2  # the other shard still serves
    with pytest.raises(OSError, match=r"000001.tar cannot be read .*truncated"):
        three.read([0, 2])
    assert len(waits) == 3
    assert waits == sorted(waits)


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


@pytest.mark.parametrize("harm", ["missing", "truncated", "refused"])
def test_a_remote_shard_that_cannot_be_read_is_retried_and_then_stops_the_run(remote, monkeypatch, harm):
    _, far, fs = remote
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    if harm == "missing":
        fs.rm("/bucket/set/000001.tar")
    elif harm == "truncated":
        fs.pipe_file("/bucket/set/000001.tar", fs.cat_file("/bucket/set/000001.tar")[:600])
    else:  # clients of object stores have errors of their own

        def refuse(*_, **__):
            raise RuntimeError("503")

        monkeypatch.setattr(type(fs), "cat_file", refuse)
    cause = {"missing": "/bucket/set/000001.tar", "truncated": "0 of 54 bytes of k4", "refused": "503"}[harm]
    with pytest.raises(OSError, match=rf"000001.tar cannot be read \({cause}"):
        far.read([4])
    assert len(waits) == 3


def test_a_remote_shard_that_comes_back_is_read(remote, monkeypatch):
    local, far, fs = remote
    whole = fs.cat_file("/bucket/set/000001.tar")
    fs.rm("/bucket/set/000001.tar")
    monkeypatch.setattr(module.time, "sleep", lambda _: fs.pipe_file("/bucket/set/000001.tar", whole))
    assert far.read([4]) == local.read([4])
