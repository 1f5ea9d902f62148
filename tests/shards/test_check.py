"""`check` finds each kind of damage."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE
from bigtrain.data.set_files import INDEX_SCHEMA, read_index, read_manifest
from shards.check import check
from shards.index_tars import index_tars
from shards.split import split_per_class


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
    (line,) = check(str(out))  # and not one for each picture behind the cut
    assert line.startswith("000001.tar: no whole tar")
    assert "3000 bytes, and the manifest says" in line


def test_unnamed_counted(out, monkeypatch):
    """Faults beyond those that are named are counted too."""
    monkeypatch.setattr("shards.check.MAX_NAMED", 2)
    index = read_index(str(out))
    column = index.schema.get_field_index("image_offset")
    moved = index.set_column(column, "image_offset", pc.add(index["image_offset"], 512))
    pq.write_table(moved, out / INDEX_FILE)
    wrong = check(str(out))
    assert wrong.number == index.num_rows == 21
    assert wrong[2] == "000000.tar: and 3 more like these"


def test_view_moved_tars(out, tmp_path):
    """A view whose tars are missing or have moved says where it looked for them."""
    split_per_class(str(out), tmp_path / "view", 2, seed=0)
    (out / "000001.tar").unlink()
    assert check(str(tmp_path / "view"), quick=True) == [f"000001.tar: missing from {out}"]
    out.rename(tmp_path / "moved")
    (line,) = check(str(tmp_path / "view"))
    assert line.startswith(f"{out}: no tar of this view lies there")


def test_flipped_byte(out):
    """A flipped byte is found, but not by a quick check."""
    tar = out / "000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert check(str(out), quick=True) == []
    assert check(str(out)) == ["000002.tar: its bytes have changed since the manifest was written"]


def test_missing_surplus_shard(out):
    """A missing shard and a surplus one are found."""
    (out / "000003.tar").rename(out / "000009.tar")
    assert check(str(out), quick=True) == ["000009.tar: not in the manifest", "000003.tar: missing"]


def test_a_missing_row_is_found(out):
    index = read_index(str(out))
    pq.write_table(index.slice(1), out / INDEX_FILE)
    wrong = check(str(out))
    assert "index: 4 rows for 000000.tar, and the manifest says 5" in wrong
    assert "000000.tar: cat/cat0 is in the tar, not in the index" in wrong


def test_wrong_offset_and_key(out):
    """A wrong offset and a wrong key in the index are found."""
    index = read_index(str(out))
    column = index.schema.get_field_index("image_offset")
    moved = index.set_column(column, "image_offset", pc.add(index["image_offset"], 512))
    pq.write_table(moved, out / INDEX_FILE)
    assert sum("and the index says" in line for line in check(str(out))) == index.num_rows
    keys = pa.array(["nobody", *index["key"].to_pylist()[1:]])
    pq.write_table(index.set_column(0, "key", keys), out / INDEX_FILE)
    assert any("nobody is in the index, not in the tar" in line for line in check(str(out)))


def test_duplicate_key(out):
    """A key that is in the index twice is found."""
    index = read_index(str(out))
    keys = pa.array([index["key"][1].as_py(), *index["key"].to_pylist()[1:]])
    pq.write_table(index.set_column(0, "key", keys), out / INDEX_FILE)
    assert any("is there 2 times" in line for line in check(str(out), quick=True))


def test_unknown_class(out):
    """A class of the index that the manifest lacks is found."""
    text = (out / MANIFEST_FILE).read_text()
    (out / MANIFEST_FILE).write_text(text.replace('"emu"', '"owl"'))
    assert check(str(out), quick=True) == ["index: the class 'emu' is not in the manifest"]


def test_damaged_index_manifest(out):
    """A damaged index and a damaged manifest are found."""
    (out / INDEX_FILE).write_bytes(b"PAR1 no more")
    assert any("has no readable index.parquet" in line for line in check(str(out)))
    (out / MANIFEST_FILE).write_text("{")
    assert any("is not a manifest" in line for line in check(str(out)))


def test_not_a_set(out, tmp_path):
    """Where there is no set, `check` says what lies there instead."""
    shutil.copytree(out, tmp_path / "unfinished", ignore=shutil.ignore_patterns(MANIFEST_FILE))
    shutil.copytree(out, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.json"))
    for place, sentence in (
        ("unfinished", "a build that was interrupted"),
        ("theirs", r"holds no manifest\.json"),
        ("nowhere", "nowhere does not exist"),
        (".", "holds the sets out: give one"),
        ("out/manifest.json", "is a file"),
    ):
        with pytest.raises((ValueError, NotADirectoryError), match=sentence):
            check(str(tmp_path / place))


def rewrite(out: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Rewrite the set with changed tar members and a new manifest and index that keep the old classes."""
    classes = {row["key"]: row["classes"] for row in read_index(str(out)).to_pylist()}
    for tar in out.glob("*.tar"):
        with tarfile.open(tar) as old:
            held = [(member.name, old.extractfile(member).read()) for member in old]
        with tarfile.open(tar, "w") as new:
            for name, data in held:
                if (data := change(name, data)) is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    new.addfile(member, io.BytesIO(data))
    for name in (MANIFEST_FILE, INDEX_FILE):
        (out / name).unlink()
    names = tuple(sorted({name for shown in classes.values() for name in shown}))
    index_tars(out, class_names=names)
    index = read_index(str(out))
    column = pa.array([classes[key] for key in index["key"].to_pylist()], INDEX_SCHEMA.field("classes").type)
    pq.write_table(index.set_column(index.schema.get_field_index("classes"), "classes", column), out / INDEX_FILE)


def test_json_class_mismatch(out):
    """A JSON with other classes than the index is found."""
    rewrite(out, lambda name, data: data.replace(b'"cat"', b'"dog"') if name == "cat/cat0.json" else data)
    assert check(str(out)) == ["000000.tar: cat/cat0.json has the classes ['dog'], and the index says ['cat']"]


def test_view_subset(out, tmp_path):
    """A view may use only some samples of its tars, and a truncated shard of a view is still found."""
    (tmp_path / "view").mkdir()
    index, manifest = read_index(str(out)), read_manifest(str(out))
    rows = index.filter(pc.equal(index["shard"], 0)).slice(1)
    pq.write_table(rows, tmp_path / "view" / INDEX_FILE)
    shards = tuple(replace(shard, samples=4 if n == 0 else 0) for n, shard in enumerate(manifest.shards))
    view = replace(manifest, shards=shards, shards_at="../out")
    (tmp_path / "view" / MANIFEST_FILE).write_text(view.to_json())
    assert check(str(tmp_path / "view")) == []
    (out / "000000.tar").write_bytes(b"cut")
    assert "000000.tar: 3 bytes" in check(str(tmp_path / "view"), quick=True)[0]


def test_orphan_members(out):
    """A JSON without a picture and a picture without the JSON that others have are found."""
    manifest = read_manifest(str(out))
    tar = out / manifest.shards[0].file
    data = tar.read_bytes()
    renamed = data.replace(b"cat/cat0.json", b"cat/none.json")
    header = renamed.index(b"cat/none.json")
    block = bytearray(renamed[header : header + 512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    tar.write_bytes(renamed[:header] + bytes(block) + renamed[header + 512 :])
    wrong = check(str(out))
    assert "000000.tar: cat/cat0 has no json, and others in the tar have one" in wrong
    assert "000000.tar: cat/none has a json or mask and no picture" in wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_report_order(animals, build_folder, tmp_path, workers):
    """Faults are reported in the order of the shards, with any number of workers."""
    out = tmp_path / "out"
    build_folder(animals, out)
    (out / "000000.tar").write_bytes((out / "000000.tar").read_bytes()[:-700])
    (out / "000002.tar").unlink()
    data = bytearray((out / "000003.tar").read_bytes())
    data[600] ^= 1
    (out / "000003.tar").write_bytes(data)
    wrong = check(str(out), workers=workers)
    assert [line.split(":")[0] for line in wrong] == ["000000.tar", "000002.tar", "000003.tar"]


def test_dunder_names(paint, build_folder, tmp_path):
    """Pictures with double underscores in their names, which WebDataset would skip, are not lost."""
    for number in range(3):
        paint(number, path=tmp_path / "in" / "__background__" / f"{number}.jpg")
        paint(number + 9, path=tmp_path / "in" / "dog" / f"__{number}__.jpg")
    build_folder(tmp_path / "in", tmp_path / "out")
    assert check(str(tmp_path / "out")) == []
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(list(webdataset.WebDataset(tars, shardshuffle=False))) == 6
