"""The table of `show`: what it counts, what it leaves out and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from bigtrain.data.set_files import INDEX_SCHEMA
from shards.shards_cli import main
from shards.show import show


@pytest.fixture
def index_of(tmp_path: Path) -> Callable[..., str]:
    """Manifest and index alone: all that `show` reads."""

    def written(shown: Sequence[Sequence[str]], classes: Sequence[str], **manifest: str) -> str:
        rows = [
            {
                "key": f"k{n}",
                "shard": 0,
                "image_offset": 512,
                "image_size": 100 * (n + 1),
                "image_ext": "png" if n % 3 else "jpg",
                "width": 8 + n,
                "height": 8,
                "classes": list(names),
            }
            for n, names in enumerate(shown)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), tmp_path / INDEX_FILE)
        shards = (Shard("000000.tar", len(rows), 20480, "0" * 64),)
        text = Manifest("toy", "train", tuple(classes), "none", shards, **manifest).to_json()
        (tmp_path / MANIFEST_FILE).write_text(text)
        return str(tmp_path)

    return written


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_counts(index_of):
    """Counts, sizes, formats and labels are those counted by hand."""
    said = lines(show(index_of([["cat"], ["cat", "dog"], [], ["dog"]], ["dog", "cat", "emu"])))
    for line in (
        "samples 4",
        "shards 1 of 4 samples",
        "size 20.5 kB",
        "width 8 .. 11 pixels",
        "height 8 pixels",
        "a picture 100 B .. 400 B",
        "formats jpg 2, png 2",
        "labels 0 .. 2 a picture, 1 on average",
    ):
        assert line in said
    assert said[-4:] == ["dog 2", "cat 2", "emu 0", "(no class) 1"]


def test_average(index_of):
    """An average is given only of numbers that differ."""
    assert "labels 1 a picture" in lines(show(index_of([["cat"], ["dog"]], ["cat", "dog"])))


def test_many_classes(index_of):
    """Of many classes the first are listed and the others summed up, unless all are asked for."""
    names = [f"class{n}" for n in range(50)]
    url = index_of([*([name] for name in names), ["class45"], []], names)
    said = lines(show(url))
    assert said[-3:] == [
        "class39 1",
        "and 10 more classes, 1 .. 2 images each (--all-classes lists them)",
        "(no class) 1",
    ]
    assert [line for line in lines(show(url, all_classes=True)) if line.startswith("class")][1:] == [
        f"{name} {2 if name == 'class45' else 1}" for name in names
    ]


def test_view(index_of, tmp_path):
    """A view says where its tars lie and how much of them it takes."""
    said = lines(show(index_of([["cat"], ["cat"]], ["cat"], shards_at="../elsewhere")))
    assert "size 300 B of pictures, in 20.5 kB" in said
    assert f"tars at {tmp_path.parent}/elsewhere; this is a view" in said


def test_unknown_class(index_of):
    """A class that the manifest lacks is shown as such."""
    assert lines(show(index_of([["owl"], ["cat"]], ["cat"])))[-2:] == ["cat 1", "owl (not in the manifest) 1"]


def test_empty_set(index_of):
    """A set without samples has a table too."""
    assert lines(show(index_of([], ["cat"])))[-1] == "cat 0"


def test_escape_sequences(index_of):
    """Names cannot send escape sequences to the terminal, nor make up rows of the table."""
    said = show(index_of([["\x1b[31mcat\ndog 9"]], ["\x1b[31mcat\ndog 9"]))
    assert "\x1b" not in said and said.splitlines()[-1].split() == ["?[31mcat?dog", "9", "1"]


def test_seed_without_page(index_of, capsys):
    """An option that chooses pictures, such as --seed, needs --page."""
    assert main(["show", index_of([["cat"]], ["cat"]), "--seed", "3"]) == 2
    assert "give --page too" in capsys.readouterr().err


def test_misspelled_class(index_of, tmp_path, capsys):
    """A misspelled class gets the nearest name, or the command that lists all classes."""
    url = index_of([["cat"]], ["cat"])
    for name, hint in (("cta", "did you mean 'cat'?"), ("xyz", f"`bigtrain-shards show {url} --all-classes` lists")):
        assert main(["show", url, "--page", str(tmp_path / "page.html"), "--classes", name]) == 2
        assert hint in capsys.readouterr().err
