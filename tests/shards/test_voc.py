"""Pascal VOC's devkit, its lists and annotations."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.adapters import voc

ANNOTATION = """<annotation><object><name>{name}</name><difficult>1</difficult>
<bndbox><xmin>{xmin}</xmin><ymin>2</ymin><xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>"""


@pytest.fixture
def devkit(tmp_path, paint):
    """VOC2007 with two images of trainval and one of test, which has no annotation."""
    voc.read.cache_clear()
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for image_id in ("000005", "000007", "000001"):
        paint(0, (60, 40), path=root / "JPEGImages" / f"{image_id}.jpg")
    (root / "Annotations").mkdir()
    for image_id in ("000005", "000007"):
        (root / "Annotations" / f"{image_id}.xml").write_text(ANNOTATION.format(name="dog", xmin=1))
        paint(1, (60, 40), "PNG", path=root / "SegmentationClass" / f"{image_id}.png")
    for folder in ("Main", "Segmentation"):
        (root / "ImageSets" / folder).mkdir(parents=True)
        (root / "ImageSets" / folder / "trainval.txt").write_text("000007\n000005\n")
        (root / "ImageSets" / folder / "test.txt").write_text("000001\n")
    (root / "ImageSets" / "Main" / "dog_trainval.txt").write_text("000007  1\n000005 -1\n")
    return tmp_path / "VOCdevkit"


@pytest.mark.parametrize("inner", ["", "VOC2007", ".."])
def test_roots(devkit, inner):
    """The devkit, its year and the folder around it may each be the root."""
    found = list(voc.samples(devkit / inner, "trainval"))
    assert [(sample.key, sample.classes) for sample in found] == [("000005", ["dog"]), ("000007", ["dog"])]
    assert voc.about(devkit / inner, "trainval").dataset == "voc2007"


def test_two_years(devkit):
    """With a devkit of two years, one has to be chosen."""
    (devkit / "VOC2012" / "ImageSets").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"it may be .*VOC2007 or .*VOC2012"):
        voc.about(devkit, "trainval")


def test_unannotated_test(devkit, capsys):
    """Test images without an annotation have no class, and are counted."""
    for image_set in ("Main", "Segmentation"):
        (sample,) = voc.samples(devkit, "test", image_set=image_set)
        assert (sample.objects, sample.mask) == ([], None)
    voc.about(devkit, "test")
    assert "1 of 1 images, 000001 for one, have no annotation" in capsys.readouterr().err


def test_missing_files(devkit, capsys):
    """A missing annotation or mask is refused by name; missing pictures are only counted."""
    root = devkit / "VOC2007"
    (root / "JPEGImages" / "000007.jpg").unlink()
    voc.about(devkit, "trainval")
    assert "1 of the 2 pictures that trainval.txt names are missing" in capsys.readouterr().err
    voc.read.cache_clear()
    (root / "SegmentationClass" / "000005.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"000005.png is missing, and Segmentation/trainval.txt names 000005"):
        voc.about(devkit, "trainval", image_set="Segmentation")
    (root / "Annotations" / "000007.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"000007.xml is missing, and trainval.txt names 000007"):
        voc.about(devkit, "trainval")


def test_bad_split(devkit):
    """The image list of a single class is refused as a split, and the error names the possible splits."""
    with pytest.raises(ValueError, match="--split may be test, trainval"):
        voc.about(devkit, "dog_trainval")
    with pytest.raises(FileNotFoundError, match="--split may be test, trainval"):
        voc.about(devkit, "train2007")


def test_path_traversal(devkit):
    """A list that leads out of the dataset is refused."""
    (devkit / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match="outside of"):
        voc.about(devkit, "trainval")


def test_swapped_edges(tmp_path):
    """A box whose edges are swapped is put in order."""
    (tmp_path / "a.xml").write_text(ANNOTATION.format(name="dog", xmin="61"))
    (thing,) = voc.objects_in(tmp_path / "a.xml")
    assert thing.box.left < thing.box.right == 61


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ANNOTATION.format(name="dog", xmin="nan"), "without the four numbers"),
        (ANNOTATION.format(name="dog", xmin="inf"), "without the four numbers"),
        (ANNOTATION.format(name=" ", xmin="1"), "without a name"),
        ("<annotation>", "cannot be read as XML"),
        ("", "cannot be read as XML"),
        ('<?xml version="1.0" encoding="utf-7"?><a/>', "cannot be read as XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
    ],
)
def test_a_damaged_annotation_is_named(devkit, text, sentence):
    path = Path(devkit, "VOC2007", "Annotations", "000005.xml")
    path.write_text(text)
    with pytest.raises(ValueError, match=f"000005.xml .*{sentence}"):
        voc.about(devkit, "trainval")
