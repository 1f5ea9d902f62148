"""Places365 by its file lists and in its easy format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shards.adapters import places365

TRAIN = {"/a/airfield/00000001.jpg": 0, "/a/airfield/00000002.jpg": 0, "/a/apartment_building/outdoor/00000001.jpg": 1}
VAL = {"Places365_val_00000001.jpg": 1, "Places365_val_00000002.jpg": 0}
CLASSES = ["airfield", "apartment_building-outdoor"]


@pytest.fixture
def by_lists(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "lists"
    for place, name in enumerate(TRAIN):
        paint(place, path=root / "data_256_standard" / name[1:])
        paint(10 + place, path=root / "data_large" / name[1:])
    for place, name in enumerate(VAL):
        paint(20 + place, path=root / "val_256" / name)
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/apartment_building/outdoor 1\n")
    (root / "places365_train_standard.txt").write_text("".join(f"{n} {c}\n" for n, c in TRAIN.items()))
    (root / "places365_val.txt").write_text("".join(f"{n} {c}\n" for n, c in VAL.items()))
    return root


@pytest.fixture
def easy(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "places365_standard"
    names = [f"train/{CLASSES[number]}/{name[-12:]}" for name, number in TRAIN.items()]
    names += [f"val/{CLASSES[number]}/{name}" for name, number in VAL.items()]
    for place, name in enumerate(names):
        paint(place if place < 3 else 17 + place, path=root / name)
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names if name.startswith(split)))
    return root


@pytest.mark.parametrize(
    ("split", "keys"),
    [
        (
            "train",
            ["train/airfield/00000001", "train/apartment_building-outdoor/00000001", "train/airfield/00000002"],
        ),
        ("val", ["val/Places365_val_00000002", "val/Places365_val_00000001"]),
    ],
)
def test_formats(by_lists, easy, split, keys):
    """The file lists and the easy format give the same samples."""
    listed, plain = (list(places365.samples(root, split)) for root in (by_lists, easy))
    assert [s.key for s in listed] == keys
    assert [(s.key, s.classes, s.image.read_bytes()) for s in listed] == [
        (s.key, s.classes, s.image.read_bytes()) for s in plain
    ]
    for root in (by_lists, easy):
        about = places365.about(root, split)
        assert (about.classes, about.total) == (CLASSES, len(keys))


def test_large_and_challenge(by_lists, paint):
    """The large pictures and the challenge list are read."""
    sample = next(places365.samples(by_lists, "train", size="large"))
    assert sample.source == "data_large/a/airfield/00000001.jpg"
    with pytest.raises(FileNotFoundError, match=r"places365_train_challenge.txt is missing: --root must be"):
        places365.about(by_lists, "train", train_list="challenge")
    paint(0, path=by_lists / "data_256_challenge" / "a" / "airfield" / "00005001.jpg")
    (by_lists / "places365_train_challenge.txt").write_text("/a/airfield/00005001.jpg 0\n")
    assert places365.about(by_lists, "train", train_list="challenge").total == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/a/airfield/00000009.jpg 0\n", "names 1 pictures that are not in .*'a/airfield/00000009.jpg'"),
        ("/a/airfield/00000001.jpg 0\n", "several lines for '/a/airfield/00000001.jpg'"),
        ("/a/airfield/00000003.jpg 365\n", "gives /a/airfield/00000003.jpg the class 365, which is none of the 2"),
        ("/../../etc/secret.jpg 0\n", "outside of"),
        ("/a/airfield/00000003.jpg\n", "line 4 of .*, where 'file class' should be"),
    ],
)
def test_bad_list(by_lists, line, message):
    """A list that is wrong is refused, and the message says where."""
    with (by_lists / "places365_train_standard.txt").open("a") as file:
        file.write(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        places365.about(by_lists, "train")


def test_unlisted_picture(by_lists, easy, paint):
    """A picture that no list names is refused, in either format."""
    paint(5, path=by_lists / "val_256" / "new.jpg")
    paint(5, path=easy / "val" / "airfield" / "new.jpg")
    for root, name in ((by_lists, "new.jpg"), (easy, "val/airfield/new.jpg")):
        with pytest.raises(ValueError, match=rf"has 1 pictures that .* does not name \('{name}'\)"):
            places365.about(root, "val")


def test_refused_options(easy, by_lists):
    """Options that would have no effect are refused, and so is the test split."""
    with pytest.raises(ValueError, match="easy format"):
        places365.about(easy, "train", size="large")
    with pytest.raises(ValueError, match="of no effect on --split val"):
        places365.about(by_lists, "val", train_list="challenge")
    with pytest.raises(ValueError, match="--split test has no labels"):
        places365.about(by_lists, "test")
