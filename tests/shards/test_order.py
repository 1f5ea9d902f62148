"""Which samples, in which order: keys, shuffling, duplicates; and a disk that fills up."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigtrain.data.schema import INDEX_FILE, Sample
from bigtrain.data.set_files import read_index
from shards.check import check
from shards.index_file import IndexWriter, columns_at, repeated
from shards.order import keyed, shuffled

ROOT = Path(__file__).parents[2]


def test_hash_collision(monkeypatch):
    """Two keys with the same hash are no error, but two equal keys are."""
    monkeypatch.setattr("shards.order.hash64", lambda key: 7)
    samples = [Sample(name, b"", "jpg", source=f"{name}.jpg") for name in "abc"]
    assert [sample.key for sample in keyed(lambda: iter(samples))] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"b\.jpg and again\.png have the same key 'b'"):
        list(keyed(lambda: iter([*samples, Sample("b", b"", "png", source="again.png")])))


def test_duplicate_key(animals, paint, build_folder, contents, tmp_path):
    """A key that comes twice stops the build, which continues once that is repaired."""
    from shards.adapters import folder

    build_folder(animals, tmp_path / "whole")
    twin = animals / "emu" / "zz.jpg"
    paint(0, path=twin)
    original = folder.samples

    def with_twin(root: Path, split: str):
        yield from original(root, split)
        yield Sample("cat/cat0", twin, "jpg", source="emu/zz.jpg")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "shards.build.ADAPTERS",
            {
                "folder": type(
                    "A", (), {"about": staticmethod(folder.about), "samples": staticmethod(with_twin), "split": "train"}
                )
            },
        )
        with pytest.raises(ValueError, match=r"cat/cat0\.jpg and emu/zz\.jpg have the same key"):
            build_folder(animals, tmp_path / "out")
    twin.unlink()
    assert not (tmp_path / "out" / "manifest.json").exists()
    build_folder(animals, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_shuffle_seed(animals, build_folder, contents, tmp_path, workers):
    """Shuffling follows from the seed and the keys alone."""
    build_folder(animals, tmp_path / "plain")
    build_folder(animals, tmp_path / "one", shuffle_seed=1)
    build_folder(animals, tmp_path / "again", shuffle_seed=1, workers=workers)
    build_folder(animals, tmp_path / "two", shuffle_seed=2)
    keys = [read_index(str(tmp_path / name))["key"].to_pylist() for name in ("plain", "one", "two")]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert keys[0] != keys[1] != keys[2]
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    assert json.loads((tmp_path / "one" / "build.json").read_text())["shuffle_seed"] == 1
    samples = [Sample(key, b"", "jpg") for key in keys[0]]
    backwards = [sample.key for sample in shuffled(iter(samples[::-1]), 1, None)]
    assert backwards == keys[1]
    with pytest.raises(ValueError, match="shuffle_seed 1, not 2"):
        build_folder(animals, tmp_path / "one", shuffle_seed=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicate_pictures(animals, build_folder, contents, tmp_path, capsys, workers):
    """Pictures with the same bytes are all kept, and are reported by their keys."""
    again = animals / "dog" / "a_cat.jpg"
    again.write_bytes((animals / "cat" / "cat2.jpg").read_bytes())
    (animals / "emu" / "another_cat.jpg").write_bytes(again.read_bytes())
    build_folder(animals, tmp_path / "out", workers=workers)
    lines = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert [sorted(line["keys"]) for line in lines] == [["cat/cat2", "dog/a_cat", "emu/another_cat"]]
    said = capsys.readouterr().err
    assert "2 pictures have the same bytes as another; all are kept" in said
    assert "In 1 group of equal pictures the classes differ" in said
    assert check(str(tmp_path / "out")) == []
    build_folder(animals, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_near_duplicates(build_folder, tmp_path, capsys):
    """Pictures that only begin and end alike are no duplicates."""
    (tmp_path / "a").mkdir()
    for number in range(3):
        pixels_HW = np.zeros((200, 100), np.uint8)
        pixels_HW[100, 50] = max(number, 1)
        Image.fromarray(pixels_HW).save(tmp_path / "a" / f"{number}.bmp")
    build_folder(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "duplicates.jsonl").read_text() == '{"keys": ["a/0", "a/1"]}\n'
    assert "the classes differ" not in capsys.readouterr().err


def test_row_groups(tmp_path, monkeypatch):
    """An index of many row groups has the rows of one table, in their order."""
    monkeypatch.setattr("shards.index_file.ROWS_PER_GROUP", 10)
    row = {"image_offset": 1, "image_size": 2, "image_ext": "jpg", "width": 3, "height": 4, "classes": ["a"]}
    with (tmp_path / INDEX_FILE).open("w+b") as file, IndexWriter(file) as index:
        for shard in range(12):
            index.add([{**row, "key": f"{shard}-{n}"} for n in range(3)], shard)
        index.close()
        rows = np.array([0, 19, 20, 31, 35])
        assert [row["key"] for row in columns_at(file, rows, ["key"])] == ["0-0", "6-1", "6-2", "10-1", "11-2"]
    parquet = pq.ParquetFile(tmp_path / INDEX_FILE)
    assert [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)] == [10, 10, 10, 6]
    keys = read_index(str(tmp_path))["key"].to_pylist()
    assert keys == [f"{shard}-{n}" for shard in range(12) for n in range(3)]


def test_repeated_hashes():
    """Repeated hashes are grouped, in the order of their first places."""
    hashes = np.array([5, 0, 9, 5, 0, 2**64 - 1, 5], np.uint64)
    assert [group.tolist() for group in repeated(hashes)] == [[0, 3, 6], [1, 4]]
    assert repeated(np.array([0], np.uint64)) == []
    assert repeated(np.array([], np.uint64)) == []


def build_command(root: Path, out: Path, workers: int) -> list[str]:
    options = ["--root", str(root), "--out", str(out), "--samples-per-shard", "5", "--workers", str(workers)]
    return [sys.executable, "-m", "shards", "build", "folder", *options]


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(animals, build_folder, contents, tmp_path, workers):
    """A full disk is reported in one sentence, and the build continues once there is space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted here")
    try:
        command = build_command(animals, disk / "out", workers)
        stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert stopped.returncode == 2
        assert stopped.stderr.count("no space is left for") == 1
        assert "Traceback" not in stopped.stderr
        assert not list(disk.rglob("*.tmp"))
        assert list((disk / "out").glob("*.tar"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        build_folder(animals, tmp_path / "whole")
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(animals, tmp_path):
    """A limit on the size of files is reported with the same sentence as a full disk."""
    stopped = subprocess.run(
        build_command(animals, tmp_path / "out", 1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )
    assert stopped.returncode == 2
    assert "no space is left for" in stopped.stderr
    assert not list((tmp_path / "out").glob("*.tar*"))
