"""`check` finds each kind of damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, read_index
from shards.check import check


@pytest.fixture
def out(animals: Path, build_folder: Callable[..., object], tmp_path: Path) -> Path:
    build_folder(animals, tmp_path / "out")
    return tmp_path / "out"


def test_a_whole_set_is_right(out):
    assert check(str(out)) == []
    assert check(str(out), quick=True) == []


def test_a_truncated_tar_is_found(out):
    tar = out / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    assert any("000001.tar: 3000 bytes" in line for line in check(str(out), quick=True))
    assert any("000001.tar: no whole tar" in line for line in check(str(out)))


def test_a_flipped_byte_is_found_but_not_by_a_quick_look(out):
    tar = out / "000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert check(str(out), quick=True) == []
    assert [line.split(" ")[:2] for line in check(str(out))] == [["000002.tar:", "sha256"]]


def test_a_missing_and_a_surplus_shard_are_found(out):
    (out / "000003.tar").rename(out / "000009.tar")
    assert check(str(out), quick=True) == ["000009.tar: not in the manifest", "000003.tar: missing"]


def test_a_missing_row_is_found(out):
    index = read_index(str(out))
    pq.write_table(index.slice(1), out / INDEX_FILE)
    wrong = check(str(out))
    assert "index: 4 rows for 000000.tar, and the manifest says 5" in wrong
    assert "000000.tar: cat/cat0 is in the tar, not in the index" in wrong


def test_a_wrong_offset_and_a_wrong_key_are_found(out):
    index = read_index(str(out))
    column = index.schema.get_field_index("image_offset")
    moved = index.set_column(column, "image_offset", pc.add(index["image_offset"], 512))
    pq.write_table(moved, out / INDEX_FILE)
    assert sum("and the index says" in line for line in check(str(out))) == index.num_rows
    keys = pa.array(["nobody", *index["key"].to_pylist()[1:]])
    pq.write_table(index.set_column(0, "key", keys), out / INDEX_FILE)
    assert any("nobody is in the index, not in the tar" in line for line in check(str(out)))


def test_a_key_that_is_there_twice_is_found(out):
    index = read_index(str(out))
    keys = pa.array([index["key"][1].as_py(), *index["key"].to_pylist()[1:]])
    pq.write_table(index.set_column(0, "key", keys), out / INDEX_FILE)
    assert any("is there 2 times" in line for line in check(str(out), quick=True))


def test_a_class_that_the_manifest_lacks_is_found(out):
    text = (out / MANIFEST_FILE).read_text()
    (out / MANIFEST_FILE).write_text(text.replace('"emu"', '"owl"'))
    assert check(str(out), quick=True) == ["index: the class 'emu' is not in the manifest"]


def test_a_damaged_index_and_a_damaged_manifest_are_found(out):
    (out / INDEX_FILE).write_bytes(b"PAR1 no more")
    assert any("has no readable index.parquet" in line for line in check(str(out)))
    (out / MANIFEST_FILE).write_text("{")
    assert any("is no manifest" in line for line in check(str(out)))


def test_a_folder_without_manifest_is_no_shard_set(out):
    shutil.copytree(out, out.parent / "unfinished", ignore=shutil.ignore_patterns(MANIFEST_FILE))
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        check(str(out.parent / "unfinished"))
