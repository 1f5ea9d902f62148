"""MVTec AD and VisA, whole and by category, and masks that do not match."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.set_files import read_index
from shards.adapters import mvtec, visa
from shards.build import build
from shards.build_settings import Settings

HEADER = "object,split,label,image,mask\n"


@pytest.fixture
def category(tmp_path, paint):
    """One category: two good ones to train, one good one and two cracks to test."""

    def made(name: str = "tile", mask: str = "{}_mask.png", defect: str = "crack"):
        root = tmp_path / "data" / name
        for place in ("train/good/000", "train/good/001", "test/good/000", f"test/{defect}/000", f"test/{defect}/001"):
            paint(len(place), kind="PNG", path=root / f"{place}.png")
        for number in ("000", "001"):
            paint(0, kind="PNG", path=root / "ground_truth" / defect / mask.format(number))
        (root / "license.txt").write_text("CC BY-NC-SA 4.0")
        return root

    return made


def test_one_category(category):
    """A category has the class good and its defects, with their masks."""
    root = category()
    found = {sample.key: sample for sample in mvtec.samples(root, "test")}
    assert list(found) == ["test/crack/000", "test/good/000", "test/crack/001"]
    assert found["test/crack/001"].mask == root / "ground_truth" / "crack" / "001_mask.png"
    assert (found["test/crack/001"].classes, found["test/good/000"].mask) == (["crack"], None)
    for split, total in (("train", 2), ("test", 3)):
        about = mvtec.about(root, split)
        assert (about.dataset, about.classes, about.total) == ("mvtec-ad-tile", ["good", "crack"], total)


def test_not_of_mvtec(category, capsys):
    """Data of others in the same layout get neither the name nor the licence of MVTec AD."""
    root = category()
    (root / "license.txt").unlink()
    about = mvtec.about(root, "train")
    assert (about.dataset, about.licence) == ("tile", "unknown")
    assert "--licence 'CC BY-NC-SA 4.0' if it is theirs" in capsys.readouterr().err


def test_all_categories(category):
    """With all categories, each class tells its category too; a single one can be chosen."""
    root = category().parent
    category("grid", defect="bent")
    about = mvtec.about(root, "test")
    assert (about.classes, about.total) == (["grid/good", "grid/bent", "tile/good", "tile/crack"], 6)
    found = {sample.key: sample.classes for sample in mvtec.samples(root, "test")}
    assert (len(found), found["grid/test/bent/000"], found["tile/test/good/000"]) == (6, ["grid/bent"], ["tile/good"])
    assert mvtec.about(root, "test", category="grid").classes == ["good", "bent"]
    with pytest.raises(ValueError, match="it may be all, grid, tile"):
        mvtec.about(root, "test", category="wood")


def test_unmatched_masks(category):
    """A defect without a mask and a mask without a picture are named."""
    root = category()
    (root / "ground_truth" / "crack" / "001_mask.png").rename(root / "ground_truth" / "crack" / "002_mask.png")
    with pytest.raises(FileNotFoundError, match=r"1 defects have no mask, .*test/crack/001.png .*crack/001_mask.png"):
        mvtec.about(root, "test")
    (root / "test" / "crack" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 masks have no picture, .*crack/002_mask.png .*test/crack"):
        mvtec.about(root, "test")
    assert mvtec.about(root, "train").total == 2


def test_duplicate_and_loose(category, paint, capsys):
    """Several masks of a picture and pictures of one name are refused; loose pictures are counted."""
    root = category()
    paint(0, path=root / "test" / "loose.jpg")
    mvtec.about(root, "test")
    assert "1 pictures in" in capsys.readouterr().err
    paint(0, path=root / "test" / "good" / "000.jpg")
    with pytest.raises(ValueError, match="same key"):
        mvtec.about(root, "test")
    paint(0, kind="PNG", path=root / "ground_truth" / "crack" / "000" / "000.png")
    with pytest.raises(ValueError, match="several masks of a picture"):
        mvtec.about(root, "test")


def test_missing_split(category):
    """The error for a missing split names those that are there."""
    with pytest.raises(FileNotFoundError, match="--split may be train or test"):
        mvtec.about(category(), "val")


@pytest.fixture
def listed(tmp_path, paint):
    """VisA as it is published: one normal candle each to train and test, and an anomalous one; a mask of 0 and 3."""
    images = tmp_path / "candle" / "Data" / "Images"
    for name in ("Normal/0000", "Normal/0001", "Anomaly/000"):
        paint(0, path=images / f"{name}.JPG")
    file = io.BytesIO()
    Image.fromarray(np.full((12, 20), 3, np.uint8)).save(file, "PNG")
    (tmp_path / "candle" / "Data" / "Masks" / "Anomaly").mkdir(parents=True)
    (tmp_path / "candle" / "Data" / "Masks" / "Anomaly" / "000.png").write_bytes(file.getvalue())
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(
        f"{HEADER}candle,train,normal,candle/Data/Images/Normal/0000.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/0001.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n"
    )
    return tmp_path


def test_visa(listed, tmp_path):
    """VisA follows its list and keeps the values of its masks."""
    found = list(visa.samples(listed, "test"))
    assert [(s.key, s.classes) for s in found] == [
        ("candle/test/anomaly/000", ["candle/anomaly"]),
        ("candle/test/normal/0001", ["candle/normal"]),
    ]
    assert found[0].mask.read_bytes() in (tmp_path / "candle/Data/Masks/Anomaly/000.png").read_bytes()
    assert visa.about(listed, "train").classes == ["candle/normal", "candle/anomaly"]
    one = visa.about(listed, "test", category="candle")
    assert (one.dataset, one.classes, one.total) == ("visa-candle", ["normal", "anomaly"], 2)
    build(Settings("visa", str(listed), "test", options={"category": "candle", "setup": "1cls"}), tmp_path / "set")
    assert read_index(str(tmp_path / "set"))["classes"].to_pylist() == [["anomaly"], ["normal"]]
    mask = (listed / "candle/Data/Masks/Anomaly/000.png").read_bytes()
    assert mask in (tmp_path / "set" / "000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("object,split\na,b\n", "no column label, image, mask"),
        (f"{HEADER}candle,test,odd,a.JPG,\n", "line 2 .* the label 'odd'"),
        (f"{HEADER}candle,test,normal,a.JPG,\ncandle,test,normal,a.JPG,\n", "lists a.JPG more than once"),
        (f"{HEADER}candle,train,normal,a.JPG,\n", "--split test is not in .* it may be train"),
        (f"{HEADER}candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,\n", "have no mask"),
        (f"{HEADER}candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,../x.png\n", "outside of"),
    ],
)
def test_visa_wrong_list(listed, text, sentence):
    """A wrong list of VisA is refused."""
    (listed / "split_csv" / "1cls.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        visa.about(listed, "test")


def test_visa_as_mvtec(category):
    """VisA arranged as MVTec is read as such."""
    root = category("candle", mask="{}.png", defect="bad").parent
    about = visa.about(root, "test")
    assert (about.dataset, about.classes) == ("visa", ["candle/good", "candle/bad"])
    assert sum(sample.mask is not None for sample in visa.samples(root, "test")) == 2
