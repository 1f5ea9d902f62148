"""CUB-200 of 2011 and of 2010."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from bigtrain.data.schema import Box, Object
from shards.adapters import cub200

FILES = {  # by the id of images.txt
    "1": "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
    "2": "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg",
    "3": "002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg",
    "4": "010.Acadian_Flycatcher/Acadian_Flycatcher_0016_887710060.jpg",
}
CLASSES = {"1": "001.Black_footed_Albatross", "2": "002.Laysan_Albatross", "3": "010.Acadian_Flycatcher"}
SORTED = ["Acadian_Flycatcher", "Black_footed_Albatross", "Laysan_Albatross"]
NUMBERED = ("Black_footed_Albatross", "Laysan_Albatross", "Acadian_Flycatcher")


def write_list(path: Path, lines: dict[str, str]) -> None:
    path.write_text("".join(f"{number} {rest}\n" for number, rest in lines.items()))


@pytest.fixture
def of_2011(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "CUB_200_2011"
    for number, name in FILES.items():
        paint(int(number), path=root / "images" / name)
        paint(int(number), kind="PNG", path=tmp_path / "segmentations" / f"{name.removesuffix('.jpg')}.png")
    write_list(root / "images.txt", FILES)
    write_list(root / "classes.txt", CLASSES)
    write_list(root / "image_class_labels.txt", {"1": "1", "2": "1", "3": "2", "4": "3"})
    write_list(root / "train_test_split.txt", {"1": "0", "2": "1", "3": "1", "4": "0"})
    write_list(root / "bounding_boxes.txt", dict.fromkeys(FILES, "2.0 3.0 10.0 8.5"))
    return tmp_path


@pytest.fixture
def of_2010(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "CUB_200_2010"
    for number, name in FILES.items():
        paint(int(number), path=root / "images" / name)
        mat = root / "annotations-mat" / f"{name.removesuffix('.jpg')}.mat"
        mat.parent.mkdir(parents=True, exist_ok=True)
        bbox = {"left": 2.0, "top": 3.0, "right": 12.0, "bottom": 11.0}
        savemat(mat, {"bbox": bbox, "seg": np.zeros((12, 20), np.uint8)})
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text(f"{FILES['2']}\n{FILES['3']}\n")
    (root / "lists" / "test.txt").write_text(f"{FILES['1']}\n{FILES['4']}\n")
    return root


def test_both_releases(of_2011, of_2010):
    """Both releases have their classes sorted by name, their splits and their boxes."""
    for root, year, bottom in ((of_2011, 2011, 11.5), (of_2010, 2010, 11.0)):
        about = cub200.about(root, "train")
        assert (about.dataset, about.classes, about.total) == (f"cub200_{year}", SORTED, 2)
        assert about.folder_order == NUMBERED
        found = list(cub200.samples(root, "train"))
        assert [s.key for s in found] == [
            "Black_footed_Albatross/Black_Footed_Albatross_0009_34",
            "Laysan_Albatross/Laysan_Albatross_0002_1027",
        ]
        assert found[0].objects == [Object("Black_footed_Albatross", Box(top=3, left=2, bottom=bottom, right=12))]
        assert found[0].image.is_file()
        assert [s.classes[0] for s in cub200.samples(root, "test")] == SORTED[:2]
        assert cub200.about(root, "all").total == len(list(cub200.samples(root, "all"))) == 4


def test_boxes_of_2010_may_be_absent(of_2010):
    (of_2010 / "annotations-mat").rename(of_2010 / "aside")
    assert next(cub200.samples(of_2010, "test")).objects == [Object("Acadian_Flycatcher")]


def test_segmentation_masks(of_2011):
    """Segmentations become masks, and a picture without one is named."""
    (sample, _) = cub200.samples(of_2011, "train", masks=True)
    assert sample.mask.read_bytes() == (of_2011 / "segmentations" / f"{FILES['2'][:-4]}.png").read_bytes()
    sample.mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 pictures have no mask .*Black_Footed_Albatross_0009_34"):
        cub200.about(of_2011, "train", masks=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 9\n", r"gives .*Acadian_Flycatcher_0016.* the class 9"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", r"images.txt has 1 ids that .*labels.txt does not name \('4'\)"),
        ("train_test_split.txt", "1 1\n2 1\n3 1\n4 1\n5 0\n", r"split.txt names 1 ids that are not in .*images.txt"),
        ("bounding_boxes.txt", "1 1 1 1\n", r"line 1 of .*, where 'id left top width height' should be"),
        ("bounding_boxes.txt", "".join(f"{n} 1 a 3 4\n" for n in FILES), "where four numbers should be"),
        ("classes.txt", "1 a\n1 b\n", "several lines for '1'"),
        ("images.txt", "1 ../secret.jpg\n2 a/b.jpg\n3 c/d.jpg\n4 e/f.jpg\n", "outside of"),
        ("classes.txt", None, "classes.txt is missing: --root must be"),
    ],
)
def test_wrong_lists(of_2011, name, text, message):
    """A wrong list is refused with what is wrong and where."""
    path = of_2011 / "CUB_200_2011" / name
    path.unlink()
    if text:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cub200.about(of_2011, "train")


def test_pictures_match_lists(of_2011, of_2010, paint):
    """Pictures and lists have to agree."""
    paint(7, path=of_2011 / "CUB_200_2011" / "images" / "002.Laysan_Albatross" / "new.jpg")
    with pytest.raises(ValueError, match=r"1 pictures that .* does not name \('002.Laysan_Albatross/new.jpg'\)"):
        cub200.about(of_2011, "train")
    (of_2010 / "images" / FILES["4"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 pictures that are not in .*Acadian_Flycatcher_0016"):
        cub200.about(of_2010, "train")
