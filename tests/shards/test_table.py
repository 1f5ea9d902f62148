"""Tables of paths and labels, in CSV and Parquet."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from bigtrain.data.set_files import read_index
from shards.adapters import table
from shards.build import build
from shards.build_settings import Settings

OPTIONS = {
    "path_column": "path",
    "label_column": "label",
    "separator": "|",
    "mask_column": None,
    "split_column": None,
}
COLUMNS = {
    "path": ["b/2.jpg", "a/1.jpg", "a/3.png"],
    "label": ["dog", "cat|dog", ""],
    "split": ["train", "train", "test"],
    "mask": ["", "a/1_mask.png", ""],
}


@pytest.fixture
def write(tmp_path, paint):
    """Three pictures and a mask, and a table of them."""
    for path in ("b/2.jpg", "a/1.jpg"):
        paint(0, path=tmp_path / "pictures" / path)
    for path in ("a/3.png", "a/1_mask.png"):
        paint(0, kind="PNG", path=tmp_path / "pictures" / path)

    def written(kind: str = "csv", **columns):
        path = tmp_path / f"table.{kind}"
        made = pa.table({**COLUMNS, **columns})
        if kind == "parquet":
            pq.write_table(made, path, row_group_size=2)
        else:
            delimiter = "\t" if kind == "tsv" else ","
            pyarrow.csv.write_csv(made, path, pyarrow.csv.WriteOptions(delimiter=delimiter))
        return tmp_path / "pictures", {**OPTIONS, "table": str(path)}

    return written


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_rows(write, capsys, kind):
    """Every row is a picture with its labels, in order; rows without a label are counted."""
    root, options = write(kind)
    found = list(table.samples(root, "all", **options))
    assert [(sample.key, sample.classes) for sample in found] == [
        ("b/2", ["dog"]),
        ("a/1", ["cat", "dog"]),
        ("a/3", []),
    ]
    assert [sample.image for sample in found] == [root / path for path in COLUMNS["path"]]
    about = table.about(root, "all", **options)
    assert (about.dataset, about.classes, about.total) == ("table", ["cat", "dog"], 3)
    assert "1 of the 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_mask_and_split_columns(write, kind):
    """Masks and a split are taken from the columns given, and labels may be numbers."""
    root, options = write(kind, label=[7, 10, 7])
    options |= {"split_column": "split", "mask_column": "mask"}
    found = list(table.samples(root, "train", **options))
    assert [(sample.key, sample.classes) for sample in found] == [("b/2", ["7"]), ("a/1", ["10"])]
    assert [sample.mask for sample in found] == [None, root / "a" / "1_mask.png"]
    assert table.about(root, "train", **options).classes == ["10", "7"]
    with pytest.raises(ValueError, match="no row of split val: --split may be test, train"):
        table.about(root, "val", **options)


def test_separator(write):
    """Labels are divided at the separator given, and an empty one leaves a cell whole."""
    root, options = write(label=["dog", "cat|dog", "a, b"])
    assert table.about(root, "all", **options | {"separator": ""}).classes == ["a, b", "cat|dog", "dog"]
    assert table.about(root, "all", **options | {"separator": ","}).classes == ["a", "b", "cat|dog", "dog"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"path": ["b/2.jpg", "a/1.jpg", "a/1.jpg"]}, "names the picture a/1 more than once"),
        ({"path": ["b/2.jpg", "a/1.jpg", "a/1.png"]}, "names the picture a/1 more than once"),
        ({"path": ["b/2.jpg", "a/1.jpg", "../1.jpg"]}, "names '../1.jpg', which lies outside of"),
        ({"path": ["b/2.jpg", "a/1.jpg", "/etc/1.jpg"]}, "names '/etc/1.jpg', which lies outside of"),
        ({"path": ["b/2.jpg", "", "a/1.jpg"]}, r"row (3 of .*csv|2 of .*parquet) has an empty path"),
        ({"path": ["b/2.jpg", "a/1.jpg", "notes.txt"]}, "names 'notes.txt'; pictures may be jpg"),
        ({"path": ["x/2.jpg", "x/1.jpg", "x/3.jpg"]}, r"x/2.jpg is missing, .* --root must be"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_wrong_row(write, kind, columns, sentence):
    """A wrong row is found by `about`, before anything is written."""
    root, options = write(kind, **columns)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        table.about(root, "all", **options)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_column(write, kind):
    """A missing column is named, with those that are there."""
    root, options = write(kind)
    with pytest.raises(ValueError, match=r"no columns 'class'; it has path, label, split, mask: name .*--label-column"):
        table.about(root, "all", **options | {"label_column": "class"})


def test_unreadable_table(write, tmp_path):
    """A table that is damaged, empty, missing or of another format is refused."""
    root, options = write()
    for name, text in (
        ("ragged.csv", b"path,label\na.jpg,cat\nb.jpg\n"),
        ("latin.csv", b"path,label\na.jpg,caf\xe9\n"),
        ("empty.csv", b""),
        ("cut.parquet", b"PAR1abc"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a table"):
            table.about(root, "all", **options | {"table": str(tmp_path / name)})
    (tmp_path / "header.csv").write_bytes(b"path,label\n")
    with pytest.raises(ValueError, match="give a table with rows"):
        table.about(root, "all", **options | {"table": str(tmp_path / "header.csv")})
    for name in ("none.csv", "table.xlsx"):
        with pytest.raises(FileNotFoundError, match=r"give a .csv, .tsv, .parquet file"):
            table.about(root, "all", **options | {"table": str(tmp_path / name)})
    with pytest.raises(FileNotFoundError, match="--root must be the folder that the paths"):
        table.about(tmp_path / "nowhere", "all", **options)


def test_large_table(write, tmp_path):
    """A large table is read in one pass, with all its rows and classes."""
    root, options = write()
    count = 200_000
    paths = pa.array(["b/2.jpg", *(f"b/{n:07d}.jpg" for n in range(1, count))])
    large = pa.table({"path": paths, "label": [f"class {n % 1000}" for n in range(count)]})
    pq.write_table(large, tmp_path / "large.parquet")
    options["table"] = str(tmp_path / "large.parquet")
    about = table.about(root, "all", **options)
    assert (about.total, len(about.classes)) == (count, 1000)
    assert sum(1 for _ in table.samples(root, "all", **options)) == count


def test_build(write, tmp_path, contents):
    """A table is built like any other set, to the same bytes with any number of workers."""
    root, options = write()
    settings = Settings("table", str(root), "all", samples_per_shard=2, options=options | {"mask_column": "mask"})
    build(settings, tmp_path / "one")
    build(settings, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read_index(str(tmp_path / "one"))["classes"].to_pylist() == [["dog"], ["cat", "dog"], []]


@pytest.mark.parametrize("way", ["pictures", "link"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_absolute_paths(write, tmp_path, way, kind):
    """Absolute paths inside the root are read as relative to it, through a link as well."""
    (tmp_path / "link").symlink_to(tmp_path / "pictures")
    there = [str(tmp_path / way / path) for path in COLUMNS["path"]]
    root, options = write(kind, path=there, mask=["", str(tmp_path / way / "a" / "1_mask.png"), ""])
    for given in (root, tmp_path / "link"):
        found = list(table.samples(given, "all", **options | {"mask_column": "mask"}))
        assert [sample.key for sample in found] == ["b/2", "a/1", "a/3"]
        assert [sample.source for sample in found] == COLUMNS["path"]
        assert found[1].mask == given / "a" / "1_mask.png"
        assert table.about(given, "all", **options).total == 3


def test_absolute_path_escape(write, tmp_path):
    """An absolute path that leads out of the root again is refused."""
    root, options = write(path=[str(tmp_path / "pictures" / ".." / "2.jpg"), "a/1.jpg", "a/3.png"])
    with pytest.raises(ValueError, match=r"row 2 of .* lies outside of"):
        table.about(root, "all", **options)


def test_mask_outside_root(write):
    """A mask outside the root is found by `about`, before anything is written."""
    root, options = write(mask=["", "../1_mask.png", ""])
    with pytest.raises(ValueError, match=r"row 3 of .* names '\.\./1_mask\.png'"):
        table.about(root, "all", **options | {"mask_column": "mask"})


def test_row_number(write):
    """The row of a wrong path is counted in the whole table, not in its split."""
    root, options = write(path=["", "a/1.jpg", ""])
    with pytest.raises(ValueError, match=r"row 4 of "):
        table.about(root, "test", **options | {"split_column": "split"})


def test_unused_split_column(write, capsys):
    """A column `split` that is not used raises a warning."""
    root, options = write()
    table.about(root, "train", **options)
    assert "--split-column split" in capsys.readouterr().err
    table.about(root, "train", **options | {"split_column": "split"})
    assert "--split-column" not in capsys.readouterr().err


def test_wrong_delimiter(write, tmp_path):
    """Columns separated by something else, such as a semicolon, are recognized in the error."""
    root, options = write()
    (tmp_path / "semicolon.csv").write_text("path;label\na/1.jpg;cat\n")
    with pytest.raises(ValueError, match="seem to be separated by ';'"):
        table.about(root, "all", **options | {"table": str(tmp_path / "semicolon.csv")})


def test_parquet_label_lists(paint, tmp_path):
    """A Parquet table may hold lists of labels."""
    for name in "ab":
        paint(path=tmp_path / "pictures" / f"{name}.jpg")
    columns = {"path": ["./a.jpg", "b.jpg"], "label": [["cat", "dog"], None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    options = OPTIONS | {"table": str(tmp_path / "t.parquet")}
    found = list(table.samples(tmp_path / "pictures", "train", **options))
    assert [(sample.key, sample.classes) for sample in found] == [("a", ["cat", "dog"]), ("b", [])]


def test_same_path_spelled_twice(paint, tmp_path):
    """One picture by two spellings of its path is refused as named more than once."""
    paint(path=tmp_path / "in" / "a.jpg")
    for other in ("./a.jpg", ".//a.jpg", str(tmp_path / "in" / "a.jpg")):
        (tmp_path / "t.csv").write_text(f"path,label\na.jpg,cat\n{other},cat\n")
        with pytest.raises(ValueError, match="names the picture a more than once"):
            table.about(tmp_path / "in", "train", **OPTIONS | {"table": str(tmp_path / "t.csv")})
