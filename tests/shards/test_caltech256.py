"""Caltech-256 with its clutter and its stray files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shards.adapters import caltech256


@pytest.fixture
def root(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    base = tmp_path / "256_ObjectCategories"
    for number, name in [(1, "ak47"), (56, "dog"), (198, "spider"), (145, "motorbikes-101"), (257, "clutter")]:
        for place in (1, 2):
            paint(number + place, path=base / f"{number:03d}.{name}" / f"{number:03d}_{place:04d}.jpg")
    (base / "056.dog" / "greg" / "vision309").mkdir(parents=True)
    (base / "056.dog" / "greg" / "vision309" / "out").write_text("")
    (base / "198.spider" / "RENAME2").write_text("#!/bin/sh")
    return tmp_path


def test_class_names(root):
    """The class is the name behind the folder's number, and classes are sorted by it."""
    about = caltech256.about(root, "all")
    assert about.classes == ["ak47", "clutter", "dog", "motorbikes-101", "spider"]
    assert about.folder_order == ("ak47", "dog", "motorbikes-101", "spider", "clutter")
    found = list(caltech256.samples(root, "all"))
    assert about.total == len(found) == 10
    assert [s.key for s in found[:6]] == [
        *("ak47/001_0001", "clutter/257_0001", "dog/056_0001", "motorbikes-101/145_0001", "spider/198_0001"),
        "ak47/001_0002",
    ]
    assert found[2].source == "056.dog/056_0001.jpg"
    assert found == list(caltech256.samples(root / "256_ObjectCategories", "all"))


def test_clutter_may_be_left_out(root):
    about = caltech256.about(root, "all", without_clutter=True)
    assert (about.classes, about.total) == (["ak47", "dog", "motorbikes-101", "spider"], 8)
    assert all(s.classes != ["clutter"] for s in caltech256.samples(root, "all", without_clutter=True))


def test_stray_files(root, capsys):
    """Stray files are reported and left out."""
    caltech256.about(root, "all")
    said = capsys.readouterr().err
    assert "2 files in" in said
    assert "'056.dog/greg/vision309/out'" in said
    assert "'198.spider/RENAME2'" in said


@pytest.mark.parametrize("name", ["notes", "x.ak47", "300.ak47"])
def test_bad_folder(root, paint, name):
    """A folder that is not named <number>.<unique class> is refused."""
    paint(0, path=root / "256_ObjectCategories" / name / "1.jpg")
    with pytest.raises(ValueError, match="not a number and a class of their own"):
        caltech256.about(root, "all")
