"""COCO in the forms of 2014 and 2017, and lists that contradict themselves or their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.data.schema import Box, Object
from shards.adapters import coco

NAME = {2014: "COCO_val2014_{:012d}.jpg", 2017: "{:012d}.jpg"}


@pytest.fixture
def tree(tmp_path, paint):
    """Three pictures of val<year> and their list, with the given fields overridden."""

    def made(year: int = 2017, folder: str = "", listing: str = "", **other: object) -> Path:
        names = {n: NAME[year].format(n) for n in (139, 285, 632)}
        for name in names.values():
            paint(0, (64, 48), path=tmp_path / (folder or f"val{year}") / name)
        record = {
            "images": [{"id": n, "file_name": name} for n, name in names.items()],
            "annotations": [
                {"id": 1, "image_id": 139, "category_id": 18, "iscrowd": 0, "bbox": [10.1, 20.2, 30.3, 4.4]},
                {"id": 2, "image_id": 139, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 64, 48]},
            ],
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
            **other,
        }
        path = tmp_path / "annotations" / (listing or f"instances_val{year}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
        coco.read.cache_clear()
        return tmp_path

    return made


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize("between", ["", "images/"])
def test_both_years(tree, capsys, year, between):
    """Both 2014 and 2017 are read, with and without a folder `images` in between."""
    root = tree(year, f"{between}val{year}")
    found = list(coco.samples(root, f"val{year}"))
    assert [sample.image.is_file() for sample in found] == [True] * 3
    assert found[0].key == f"val{year}/{NAME[year].format(139)[:-4]}"
    assert found[0].objects == [
        Object("dog", Box(top=20.2, left=10.1, bottom=24.6, right=40.4)),
        Object("person", Box(top=0, left=0, bottom=48, right=64)),
    ]
    about = coco.about(root, f"val{year}")
    assert (about.classes, about.total) == (["person", "dog"], 3)
    assert capsys.readouterr().err == ""


def test_minival2014(tree, capsys):
    """The split minival2014 takes its pictures from val2014, and warns of no others there."""
    images = [{"id": 139, "file_name": NAME[2014].format(139)}]
    root = tree(2014, listing="instances_minival2014.json", images=images)
    assert coco.about(root, "minival2014").total == 1
    (sample,) = coco.samples(root, "minival2014")
    assert sample.source == f"val2014/{NAME[2014].format(139)}"
    assert capsys.readouterr().err == ""  # the other pictures of val2014 are in no need of a label here


def test_no_annotations(tree, capsys):
    """The pictures of a split without annotations show no class, and a warning says so."""
    root = tree(folder="test2017", listing="image_info_test2017.json", annotations=None)
    assert [sample.objects for sample in coco.samples(root, "test2017")] == [[]] * 3
    assert coco.about(root, "test2017").classes == ["person", "dog"]
    assert "image_info_test2017.json has no annotations" in capsys.readouterr().err


def test_empty_box(tree, capsys):
    """A box without area is counted and dropped, but its class is kept."""
    root = tree(annotations=[{"id": 7, "image_id": 139, "category_id": 18, "bbox": [5, 6, 0, 3]}])
    coco.about(root, "val2017")
    assert "1 annotations of instances_val2017.json, 7 for one, have a box without area" in capsys.readouterr().err
    assert next(coco.samples(root, "val2017")).objects == [Object("dog")]


def test_missing_unlisted_pictures(tree, paint, capsys):
    """Missing and unlisted pictures are counted, and one of each is named."""
    root = tree()
    (root / "val2017" / "000000000285.jpg").unlink()
    paint(0, path=root / "val2017" / "stray.jpg")
    coco.about(root, "val2017")
    said = capsys.readouterr().err.splitlines()
    assert "1 of the 3 pictures that instances_val2017.json names are missing" in said[0]
    assert "000000000285.jpg" in said[0]
    assert "1 pictures in" in said[1] and "stray.jpg" in said[1]


def test_wrong_folder(tree, paint):
    """A folder that holds none of the listed pictures is refused as the wrong root."""
    root = tree()
    for path in (root / "val2017").iterdir():
        path.rename(path.with_name(f"COCO_{path.name}"))
    with pytest.raises(FileNotFoundError, match=r"names 3 pictures .* holds none of them: --root must be"):
        coco.about(root, "val2017")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"annotations": [{"id": 5, "image_id": 139, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "5 .* of category 2,"),
        ({"annotations": [{"id": 5, "image_id": 140, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "5 .* of image 140,"),
        ({"annotations": [{"id": 5, "image_id": 139, "category_id": 1, "bbox": [0, 0, -1, 1]}]}, "is no box"),
        ({"annotations": [{"id": 5, "image_id": 139, "category_id": 1, "bbox": [0, 0, 1e999, 1]}]}, "is no box"),
        ({"annotations": [{"id": 5, "image_id": 139, "category_id": 1, "bbox": None}]}, "no list of COCO"),
        ({"annotations": [{"id": 5, "image_id": [1], "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "no list of COCO"),
        ({"annotations": [5]}, "no list of COCO"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, "lists the image 1 2 times"),
        ({"images": [{"id": n, "file_name": f"a.{n}"} for n in (139, 2)]}, "lists the image a 2 times"),
        ({"images": [{"id": 139, "file_name": "../a.jpg"}]}, "lies outside of"),
        ({"categories": {}}, "does not list|no list"),
    ],
)
def test_contradictory_list(tree, other, sentence):
    """An inconsistent list is refused by `about`, before anything is written."""
    with pytest.raises(ValueError, match=sentence):
        coco.about(tree(**other), "val2017")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'"a"', b"null"])
def test_a_damaged_list_is_named(tree, text):
    root = tree()
    path = root / "annotations" / "instances_val2017.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"instances_val2017.json is no list of COCO"):
        coco.about(root, "val2017")


def test_missing_list(tree):
    """The error for a missing list names the splits that are there, or else the expected layout."""
    root = tree()
    with pytest.raises(FileNotFoundError, match=r"instances_train2017.json is missing: --split may be val2017"):
        coco.about(root, "train2017")
    with pytest.raises(FileNotFoundError, match=r"annotations/instances_<split>.json .* it seems to be"):
        coco.about(root / "val2017", "val2017")
