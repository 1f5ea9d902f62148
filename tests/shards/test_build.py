"""Building: original bytes, the same bytes each time, and nothing lost when a build is killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from bigtrain.data.schema import Box, Object, Sample
from bigtrain.data.set_files import read_index, read_manifest
from shards.check import check
from shards.disk import locked_folder
from shards.location import Location
from shards.order import keyed
from shards.pack import Task, write_shard
from shards.treatment import Treatment
from tests.processes import Family


def test_original_bytes(animals, build_folder, tmp_path):
    """Every picture keeps its original bytes, and they lie where the index says."""
    manifest = build_folder(animals, tmp_path / "out")
    rows = read_index(str(tmp_path / "out")).to_pylist()
    originals = {p.relative_to(animals).with_suffix("").as_posix(): p for p in animals.rglob("*") if p.is_file()}
    assert sorted(row["key"] for row in rows) == sorted(originals)
    for row in rows:
        tar = (tmp_path / "out" / manifest.shards[row["shard"]].file).read_bytes()
        found = tar[row["image_offset"] : row["image_offset"] + row["image_size"]]
        assert found == originals[row["key"]].read_bytes()
        assert (row["width"], row["height"], row["classes"]) == (20, 12, [row["key"].split("/")[0]])


def test_webdataset_reads_the_tars(animals, build_folder, tmp_path):
    build_folder(animals, tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(urls) == 5
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 21
    for sample in samples:
        ext = "png" if sample["__key__"].endswith("last") else "jpg"
        assert sample[ext] == next(animals.glob(f"{sample['__key__']}.*")).read_bytes()
        record = json.loads(sample["json"])
        assert record["classes"] == [sample["__key__"].split("/")[0]]
        assert (animals / record["source"]).read_bytes() == sample[ext]


def test_classes_in_turn(animals, build_folder, tmp_path):
    """Shards show all classes in turn."""
    build_folder(animals, tmp_path / "out", samples_per_shard=3)
    classes = [row["classes"][0] for row in read_index(str(tmp_path / "out")).to_pylist()]
    assert classes == ["cat", "dog", "emu"] * 7


@pytest.mark.parametrize("workers", [1, 2])
def test_deterministic(animals, build_folder, contents, tmp_path, workers):
    """Two builds of the same input are the same bytes, with any number of workers."""
    build_folder(animals, tmp_path / "one")
    for path in animals.rglob("*"):
        os.utime(path, (0, 0))  # times of files do not matter
    build_folder(animals, tmp_path / "two", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize(("kill_after", "workers"), [(0, 1), (3, 1), (20, 2)])
def test_resume_after_kill(paint, build_folder, contents, tmp_path, kill_after, workers):
    """A killed build continues to the same bytes and does not write finished shards again."""
    root, killed = tmp_path / "pictures", tmp_path / "killed"
    for number in range(160):
        paint(number % 4, size=(120, 120), path=root / f"class{number % 4}" / f"{number}.jpg")
    build_folder(root, tmp_path / "whole", samples_per_shard=4)

    options = ["--root", str(root), "--out", str(killed), "--samples-per-shard", "4", "--workers", str(workers)]
    command = [sys.executable, "-m", "shards", "build", "folder", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(killed.glob(".parts/*.json"))) < kill_after or not killed.exists():
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    written = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}

    build_folder(root, killed, samples_per_shard=4)
    assert contents(killed) == contents(tmp_path / "whole")
    kept = [path for path, time_ns in written.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= kill_after  # finished shards were not written again


def test_torn_shard(animals, build_folder, contents, tmp_path, monkeypatch):
    """A torn shard of an interrupted build is written again."""
    build_folder(animals, tmp_path / "whole")
    monkeypatch.setattr("shards.build.Manifest", None)  # ends the build just before its manifest
    with pytest.raises(TypeError):
        build_folder(animals, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / "000001.tar").write_bytes(b"half")
    (tmp_path / "out" / "000002.tar.123.tmp").write_bytes(b"half")
    build_folder(animals, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_renamed(animals, build_folder, contents, tmp_path, monkeypatch):
    """Pictures renamed or removed before a build continues are not mixed with the old ones."""
    monkeypatch.setattr("shards.build.Manifest", None)
    with pytest.raises(TypeError):
        build_folder(animals, tmp_path / "out")
    monkeypatch.undo()
    (animals / "cat" / "cat0.jpg").rename(animals / "cat" / "tom.jpg")
    for path in (animals / "emu").rglob("*.*"):
        path.unlink()
    build_folder(animals, tmp_path / "out")
    build_folder(animals, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_finished_build(animals, build_folder, contents, tmp_path, capsys):
    """A finished build does nothing more: it does not even look at its input again."""
    first = build_folder(animals, tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.rmtree(animals)  # it is not looked at again
    assert build_folder(animals, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before
    assert "finished: 21 samples in 5 shards" in capsys.readouterr().out


def test_other_settings(animals, build_folder, tmp_path):
    """A folder begun with other settings, or by something else, is refused."""
    build_folder(animals, tmp_path / "out")
    with pytest.raises(ValueError, match="samples_per_shard 5, not 6"):
        build_folder(animals, tmp_path / "out", samples_per_shard=6)
    with pytest.raises(ValueError, match="was not begun by"):
        build_folder(animals, animals)


def test_unreadable_skipped(paint, build_folder, tmp_path, capsys):
    """Unreadable pictures are skipped and named."""
    root = tmp_path / "pictures"
    for number in range(250):
        paint(number % 5, path=root / "a" / f"{number:03d}.jpg")
    (root / "a" / "007.jpg").write_bytes(paint(7)[:-200])
    (root / "a" / "100.jpg").write_bytes(b"no picture")
    manifest = build_folder(root, tmp_path / "out", samples_per_shard=50)
    assert [shard.samples for shard in manifest.shards] == [49, 50, 49, 50, 50]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a/007", "a/100"]
    assert "truncated" in lines[0]["reason"]
    assert "skipped a/007.jpg" in capsys.readouterr().err
    assert check(str(tmp_path / "out")) == []


def test_max_skipped(animals, build_folder, tmp_path):
    """A build stops over its budget of unreadable pictures, and continues with a larger one."""
    for number in (1, 2):
        (animals / "dog" / f"dog{number}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 21 pictures cannot be read, and at most 1 may be.*dog/dog1\.jpg"):
        build_folder(animals, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2
    assert build_folder(animals, tmp_path / "out", max_skipped=0.2).samples == 19  # resumed with a larger budget


def test_unreadable_in_a_row(tmp_path, build_folder):
    """A build stops after a hundred unreadable pictures in a row, whatever its budget."""
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for number in range(300):
        (tmp_path / "pictures" / "a" / f"{number:03d}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="100 pictures in a row"):
        build_folder(tmp_path / "pictures", tmp_path / "out", samples_per_shard=60, max_skipped=1.0)


def test_decompression_bomb(paint, build_folder, tmp_path, monkeypatch):
    """A decompression bomb is skipped, and its size is reported."""
    paint(0, path=tmp_path / "pictures" / "a" / "small.jpg")
    paint(0, size=(90, 90), kind="PNG", path=tmp_path / "pictures" / "a" / "large.png")
    monkeypatch.setattr("bigtrain.images.MAX_PIXELS", 8000)
    assert build_folder(tmp_path / "pictures", tmp_path / "out").samples == 1
    assert "too many pixels: 90 x 90" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_max_side(paint, tmp_path):
    """The setting `max_side` shrinks pictures, boxes and masks, and leaves small pictures as they are."""
    mask = io.BytesIO()
    halves = np.zeros((40, 80), np.uint8)
    halves[:, 40:] = 255
    Image.fromarray(halves).save(mask, "PNG")
    large = Sample("large", paint(0, (80, 40)), "jpg", [Object("a", Box(10, 20, 30, 80))], mask=mask.getvalue())
    small = Sample("small", paint(1, (20, 16)), "jpg", [Object("b")])
    part = write_shard(Task(Location(str(tmp_path)), 0, [large, small], Treatment(max_side=20)))
    assert [(row["width"], row["height"]) for row in part.rows] == [(20, 10), (20, 16)]
    with tarfile.open(tmp_path / "000000.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(found) == ["large.jpg", "large.json", "large.mask.png", "small.jpg", "small.json"]
    assert found["small.jpg"] == small.image
    assert json.loads(found["large.json"])["boxes"] == [[2.5, 5, 7.5, 20, "a"]]
    shrunk = np.asarray(Image.open(io.BytesIO(found["large.mask.png"])))
    assert np.array_equal(shrunk, halves[::4, ::4])
    assert Image.open(io.BytesIO(found["large.jpg"])).size == (20, 10)


def test_mask_size_mismatch(paint, tmp_path):
    """A picture whose mask is of another size is skipped, not packed."""
    part = write_shard(
        Task(Location(str(tmp_path)), 0, [Sample("a", paint(), "jpg", mask=paint(0, (9, 9), "PNG"))], Treatment())
    )
    assert part.shard is None
    assert "its mask is 9 x 9" in part.skipped[0]["reason"]
    assert not (tmp_path / "000000.tar").exists()


def test_duplicate_key(animals, paint, build_folder, tmp_path):
    """The same key twice is an error that names both pictures."""
    paint(0, kind="PNG", path=animals / "cat" / "cat3.png")
    with pytest.raises(ValueError, match=r"cat/cat3\.jpg and cat/cat3\.png.* have the same key 'cat/cat3'"):
        build_folder(animals, tmp_path / "out")


def test_unsafe_names(paint, tmp_path):
    """Names that leave their folder or hold odd characters become harmless, distinct keys."""
    names = ["../../escape", "/absolute", "a/../b", "with.dots", "with dots", "图", "x" * 300, ".", "plain/key_1-2"]
    samples = list(keyed(lambda: (Sample(name, paint(), "jpg") for name in names)))
    part = write_shard(Task(Location(str(tmp_path)), 0, samples, Treatment()))
    keys = [row["key"] for row in part.rows]
    assert len(set(keys)) == len(names)
    assert keys[-1] == "plain/key_1-2"
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/") for key in keys)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert len(list((tmp_path / "unpacked").rglob("*.jpg"))) == len(names)
    assert [row["key"] for row in write_shard(Task(Location(str(tmp_path)), 1, samples, Treatment())).rows] == keys


def test_concurrent_build(animals, build_folder, tmp_path):
    """A second build in the same folder is refused while one runs."""
    (tmp_path / "out").mkdir()
    with locked_folder(tmp_path / "out"), pytest.raises(ValueError, match="another build is writing"):
        build_folder(animals, tmp_path / "out")
    assert build_folder(animals, tmp_path / "out").samples == 21


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_orphan_workers(paint, tmp_path):
    """The workers of a killed build end too."""
    for number in range(300):
        paint(0, size=(200, 200), path=tmp_path / "pictures" / "a" / f"{number}.jpg")
    options = ["--root", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), "--samples-per-shard", "2"]
    command = [sys.executable, "-m", "shards", "build", "folder", *options, "--workers", "2"]
    family = Family()
    process = subprocess.Popen(command, env=family.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/.parts/*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    left = family.left_after(20)
    family.kill()
    assert not left, f"{len(left)} processes outlived the build by 20 s"


def test_manifest(animals, build_folder, tmp_path):
    """The manifest tells the dataset, split, licence, classes and shards."""
    build_folder(animals, tmp_path / "out", name="zoo", licence="CC0")
    manifest = read_manifest(str(tmp_path / "out"))
    assert (manifest.dataset, manifest.split, manifest.licence) == ("zoo", "train", "CC0")
    assert manifest.classes == ("cat", "dog", "emu")
    assert [shard.samples for shard in manifest.shards] == [5, 5, 5, 5, 1]
    assert not (tmp_path / "out" / ".parts").exists()
