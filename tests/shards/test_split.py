"""Views: which samples they take, and that they are whole sets that copy no picture."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from bigtrain.data.set_files import INDEX_SCHEMA, read_index, read_manifest
from bigtrain.data.shard_set import ShardSet
from shards.check import check
from shards.shards_cli import main
from shards.split import deal, split_classes, split_per_class, split_shares

HALVES = [("a", Fraction("0.5")), ("b", Fraction("0.5"))]
TENTH = {"train": Fraction("0.9"), "val": Fraction("0.1")}


def table(rows: list[tuple[str, list[str]]], per_shard: int = 10) -> pa.Table:
    """An index of (key, classes), in this order."""
    at = {"image_offset": 512, "image_size": 1, "image_ext": "png", "width": 1, "height": 1}
    samples = [{"key": k, "shard": n // per_shard, "classes": c, **at} for n, (k, c) in enumerate(rows)]
    return pa.Table.from_pylist(samples, schema=INDEX_SCHEMA)


def keys_of(index: pa.Table, dealt: dict[str, np.ndarray]) -> dict[str, set[str]]:
    return {name: set(index["key"].take(pa.array(rows)).to_pylist()) for name, rows in dealt.items()}


def write_set(folder: Path, rows: list[tuple[str, list[str]]], classes: str) -> str:
    """A set with tars of one byte each: enough for what reads no picture."""
    folder.mkdir()
    index = table(rows)
    counts = np.bincount(index["shard"].to_numpy())
    shards = tuple(Shard(f"{n:06d}.tar", int(count), 1, "0" * 64) for n, count in enumerate(counts))
    for shard in shards:
        (folder / shard.file).write_bytes(b"-")
    pq.write_table(index, folder / INDEX_FILE)
    (folder / MANIFEST_FILE).write_text(Manifest("toy", "train", tuple(classes), "none", shards).to_json())
    return str(folder)


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """100 samples in 10 shards: the first half shows a, then 30 of b, 15 of b and c, 5 of none; no sample shows d."""
    shown = [["a"]] * 50 + [["b"]] * 30 + [["b", "c"]] * 15 + [[]] * 5
    return write_set(tmp_path / "letters", [(f"k{n}", c) for n, c in enumerate(shown)], "abcd")


rows_of_any_classes = st.dictionaries(
    st.text("xyz", min_size=1, max_size=4), st.sets(st.sampled_from("abcd"), max_size=3).map(sorted), max_size=60
).map(lambda found: list(found.items()))
shares_of_one = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(
    lambda parts: {f"s{n}": Fraction(p, 100) for n, p in enumerate([*parts, 100 - sum(parts)]) if p}
)


@given(rows_of_any_classes, shares_of_one, st.integers(0, 3), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_deal_partition(rows, shares, seed, shuffling):
    """Every sample is in one share, and the same one whatever the order of the rows."""
    index = table(rows)
    dealt = deal(index, shares, seed)
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(len(rows)))
    assert all(abs(len(dealt[name]) - float(share) * len(rows)) < len(shares) for name, share in shares.items())
    shuffling.shuffle(rows)
    again = table(rows)
    assert keys_of(again, deal(again, shares, seed)) == keys_of(index, dealt)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_stratified(sizes, seed):
    """Each class is divided as the whole is, to within one sample."""
    rows = [(f"{c}-{n}", [f"class{c}"]) for c, size in enumerate(sizes) for n in range(size)]
    random.Random(seed).shuffle(rows)
    val = deal(table(rows), TENTH, seed)["val"]
    taken = Counter(rows[row][1][0] for row in val)
    for c, size in enumerate(sizes):
        assert abs(taken[f"class{c}"] - size / 10) <= 1
    assert abs(len(val) - len(rows) / 10) <= 0.5


def test_rarest_class():
    """A sample of several classes counts towards the rarest of them."""
    rows = [(f"k{n}", ["common", "rare"] if n % 5 == 0 else ["common"]) for n in range(100)]
    for seed in range(10):
        val = deal(table(rows), TENTH, seed)["val"]
        assert Counter(row % 5 == 0 for row in val) == {True: 2, False: 8}


def test_seed_with_single_samples():
    """Another seed gives another choice, even where every class has one sample."""
    index = table([(f"k{n}", [f"class{n}"]) for n in range(100)])
    assert len({tuple(deal(index, TENTH, seed)["val"]) for seed in range(5)}) == 5


def test_shares(animals, build_folder, tmp_path):
    """Shares are whole sets that copy no picture."""
    whole = build_folder(animals, tmp_path / "out")
    views = split_shares(
        str(tmp_path / "out"), tmp_path / "parts", [("train", Fraction("0.7")), ("val", Fraction("0.3"))], 3
    )
    assert views["val"].split == "val: 0.3 of train, seed 3"
    assert views["val"].classes == whole.classes
    assert {name: view.samples for name, view in views.items()} == {"train": 15, "val": 6}
    original = ShardSet(str(tmp_path / "out"))
    number_of = {key: number for number, key in enumerate(original.keys())}
    for name in views:
        files = {path.name for path in (tmp_path / "parts" / name).iterdir()}
        assert files == {INDEX_FILE, MANIFEST_FILE}
        view = ShardSet(str(tmp_path / "parts" / name))
        assert view.manifest == views[name]
        assert check(str(tmp_path / "parts" / name)) == []
        assert view.read(list(range(len(view)))) == original.read(list(map(number_of.get, view.keys())))
    keys = [key for name in views for key in read_index(str(tmp_path / "parts" / name))["key"].to_pylist()]
    assert sorted(keys) == sorted(original.keys())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["animals", "out", "parts"]


def test_move_and_determinism(letters, tmp_path):
    """A set and its views may move together, and the same command gives the same bytes."""
    (tmp_path / "more").mkdir()
    for out in ("more/first", "more/again"):
        split_shares(letters, tmp_path / out, HALVES, 0)
    for file in ("a/manifest.json", "b/index.parquet"):
        assert (tmp_path / "more/first" / file).read_bytes() == (tmp_path / "more/again" / file).read_bytes()
    assert read_manifest(str(tmp_path / "more/first/a")).shards_at == "../../../letters"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("letters", "more"):
        shutil.move(tmp_path / name, moved / name)
    assert len(ShardSet(str(moved / "more/first/b"))) == 50


def test_view_behind_symlink(letters, tmp_path):
    """A view behind a symbolic link gives the whole address of its tars."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    split_shares(letters, tmp_path / "link" / "parts", HALVES, 0)
    assert read_manifest(str(tmp_path / "link/parts/a")).shards_at == f"file://{letters}"
    for way in ("link", "disk/deep"):
        assert len(ShardSet(str(tmp_path / way / "parts" / "a"))) == 50


def test_classes(letters, tmp_path):
    """A view of classes takes the samples that show any of them, and keeps their other classes."""
    view = split_classes(letters, tmp_path / "view", ["c", "d"])
    assert view.classes == ("b", "c", "d")  # d was asked for, b is shown beside c
    assert [(shard.file, shard.samples) for shard in view.shards] == [("000008.tar", 10), ("000009.tar", 5)]
    index = read_index(str(tmp_path / "view"))
    assert index["classes"].to_pylist() == [["b", "c"]] * 15
    assert index["shard"].to_pylist() == [0] * 10 + [1] * 5
    assert index["key"].to_pylist() == [f"k{n}" for n in range(80, 95)]


def test_view_of_view(letters, tmp_path):
    """A view of a view points to the tars themselves."""
    split_classes(letters, tmp_path / "b", ["b"])
    split_per_class(str(tmp_path / "b"), tmp_path / "few", 2, seed=0)
    few = ShardSet(str(tmp_path / "few"))
    assert few.manifest.shards_at == "../letters"
    assert few.manifest.split == "2 a class of train (b), seed 0"
    assert all(shard.file >= "000005.tar" for shard in few.manifest.shards)


def test_many_classes_name(letters, tmp_path):
    """A view of many classes names the first three and counts the rest."""
    assert split_classes(letters, tmp_path / "view", ["a", "b", "c", "d"]).split == "train (a, b, c and 1 more)"


def test_per_class(letters, tmp_path):
    """A few samples of each class are among the larger number that the same seed gives."""
    keys = {}
    for few in (3, 10):
        view, fewer = split_per_class(letters, tmp_path / str(few), few, seed=1)
        index = read_index(str(tmp_path / str(few)))
        keys[few] = set(index["key"].to_pylist())
        shown = Counter(name for classes in index["classes"].to_pylist() for name in classes)
        assert shown["a"] == shown["c"] == few <= shown["b"]
        assert fewer == {"d": 0}
        assert view.classes == ("a", "b", "c", "d")
        assert view.split == f"{few} a class of train, seed 1"
    assert keys[3] < keys[10]
    split_per_class(letters, tmp_path / "other", 3, seed=2)
    assert set(read_index(str(tmp_path / "other"))["key"].to_pylist()) != keys[3]


def test_remote_set(letters, tmp_path):
    """A view of a remote set names it by its whole URL."""
    memory = fsspec.filesystem("memory")
    memory.put(letters, "/split-test", recursive=True)
    try:
        split_shares("memory://split-test", tmp_path / "parts", HALVES, 0)
        assert len(ShardSet(str(tmp_path / "parts" / "a"))) == 50
        assert read_manifest(str(tmp_path / "parts/a")).shards_at == "memory://split-test"
    finally:
        memory.rm("/split-test", recursive=True)


def test_failed_split(letters, tmp_path):
    """A split that fails leaves nothing behind."""
    index = pq.read_table(Path(letters) / INDEX_FILE)
    column = index.schema.get_field_index("shard")
    wrong = pa.array([99] * index.num_rows, pa.int32())
    pq.write_table(index.set_column(column, "shard", wrong), Path(letters) / INDEX_FILE)
    with pytest.raises(ValueError, match="shard 99"):
        split_shares(letters, tmp_path / "parts", HALVES, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--shares train=0.9 val=0.2", "add up to 1.1"),
        ("--shares train=0.9 val=0.1 --classes a", "not allowed with"),
        ("--shares train=90% val=10%", "is not NAME=SHARE"),
        ("--shares ../x=0.5 y=0.5", "is not NAME=SHARE"),
        ("--shares a=0.5 a=0.5", "a name of its own"),
        ("--shares train=0.999 val=0.001", "val=0.001 of 100 samples is not one"),
        ("--share train=0.9 val=0.1", "unrecognized arguments: --share. Did you mean --shares?"),
        ("--classes e", "no class 'e' among its 4"),
        ("--classes d", "no sample"),
        ("--classes a --seed 1", "has no effect"),
        ("--classes-file nobody.txt", "No such file"),
        ("--classes-file empty.txt", "names no class"),
        ("--per-class 0", "not a whole number"),
        ("", "one of the arguments --shares --classes --classes-file --per-class is required"),
        ("--per-class 2 --out full", "not empty"),
        ("--per-class 2 --out empty.txt", "is a file"),
        ("--per-class 2 --out s3://bucket/view", "is a URL"),
    ],
)
def test_usage_errors(letters, tmp_path, monkeypatch, capsys, line, sentence):
    """A mistake on the command line is answered by one sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    try:
        code: object = main(["split", letters, *([] if "--out" in line else ["--out", "new"]), *line.split()])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert sentence in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "full", "letters"]
    assert len(list((tmp_path / "full").iterdir())) == 1


def test_split_from_the_command_line(letters, tmp_path, capsys):
    out = tmp_path / "parts"
    assert main(["split", letters, "--shares", "train=0.9", "val=.1", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}/train: 90 samples in 10 shards."
    assert said[1].startswith(f"{out}/val: 10 samples in ")
    (tmp_path / "classes.txt").write_text("a\n\nc\n")
    assert main(["split", letters, "--classes-file", str(tmp_path / "classes.txt"), "--out", str(tmp_path / "ac")]) == 0
    assert "65 samples of 3 classes in 7 shards" in capsys.readouterr().out
    assert main(["split", letters, "--per-class", "20", "--out", str(tmp_path / "few")]) == 0
    assert "2 classes have fewer than 20: c 15, d 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "few" / "manifest.json").read_text())["shards_at"] == "../letters"
