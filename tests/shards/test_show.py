"""The table of `show`: what it counts, what it leaves out and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from bigtrain.data.set_files import INDEX_SCHEMA
from shards.cli import main
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


def test_counts_sizes_and_formats_by_hand(index_of):
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


def test_an_average_is_given_only_of_numbers_that_differ(index_of):
    assert "labels 1 a picture" in lines(show(index_of([["cat"], ["dog"]], ["cat", "dog"])))


def test_of_many_classes_the_first_are_listed_and_the_others_summed_up(index_of):
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


def test_a_view_says_where_its_tars_lie_and_how_much_of_them_it_takes(index_of, tmp_path):
    said = lines(show(index_of([["cat"], ["cat"]], ["cat"], shards_at="../elsewhere")))
    assert "size 300 B of pictures, in 20.5 kB" in said
    assert f"tars at {tmp_path.parent}/elsewhere; this is a view" in said


def test_a_class_that_the_manifest_lacks_is_shown_as_such(index_of):
    assert lines(show(index_of([["owl"], ["cat"]], ["cat"])))[-2:] == ["cat 1", "owl (not in the manifest) 1"]


def test_a_set_without_samples_has_a_table_too(index_of):
    assert lines(show(index_of([], ["cat"])))[-1] == "cat 0"


def test_names_cannot_reach_the_terminal(index_of):
    assert "\x1b" not in show(index_of([["\x1b[31mcat\n"]], ["\x1b[31mcat\n"]))


def test_what_chooses_pictures_needs_a_page(index_of, capsys):
    assert main(["show", index_of([["cat"]], ["cat"]), "--seed", "3"]) == 2
    assert "give --page too" in capsys.readouterr().err


def test_a_misspelled_class_of_a_page_is_answered_with_the_nearest_or_a_command_that_runs(index_of, tmp_path, capsys):
    url = index_of([["cat"]], ["cat"])
    for name, hint in (("cta", "did you mean 'cat'?"), ("xyz", f"`bigtrain-shards show {url} --all-classes` lists")):
        assert main(["show", url, "--page", str(tmp_path / "page.html"), "--classes", name]) == 2
        assert hint in capsys.readouterr().err
