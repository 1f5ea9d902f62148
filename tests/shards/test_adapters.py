"""Adapters on tiny replicas of published datasets; most adapters have their own test files."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters import ADAPTERS, coco, voc


def pixels(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image) if isinstance(sample.image, bytes) else sample.image))


# --- coco ---


@pytest.fixture
def coco_root(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    for name in ("000000000139", "000000000285", "000000000632"):
        paint(int(name), (64, 48), path=tmp_path / "val2017" / f"{name}.jpg")
    record = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "width": 64, "height": 48} for n in (632, 139, 285)],
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 18, "iscrowd": 0, "bbox": [10.1, 20.2, 30.3, 4.4]},
            {"id": 2, "image_id": 139, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 64, 48]},
            {"id": 3, "image_id": 632, "category_id": 18, "iscrowd": 0, "bbox": [1, 2, 3, 4]},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(record))
    return tmp_path


def test_coco_objects(coco_root):
    """COCO gives every object, crowds too, with its class name and box."""
    found = list(coco.samples(coco_root, "val2017"))
    assert [sample.key for sample in found] == [f"val2017/{n:012d}" for n in (139, 285, 632)]
    assert found[0].objects == [
        Object("dog", Box(top=20.2, left=10.1, bottom=24.6, right=40.4)),
        Object("person", Box(top=0, left=0, bottom=48, right=64)),
    ]
    assert found[1].objects == []
    about = coco.about(coco_root, "val2017")
    assert (about.classes, about.total) == (["person", "car", "dog"], 3)  # car is named though nobody shows one


def test_coco_path_traversal(coco_root):
    """A list of COCO that names a file outside of the dataset is refused."""
    path = coco_root / "annotations" / "instances_val2017.json"
    for name in ("../../secret.jpg", "/etc/secret.jpg", "..\\secret.jpg"):
        record = json.loads(path.read_text())
        record["images"][0]["file_name"] = name
        other = path.with_name(f"instances_{abs(hash(name))}.json")
        other.write_text(json.dumps(record))
        (coco_root / other.stem.removeprefix("instances_")).mkdir()
        with pytest.raises(ValueError, match="outside of"):
            list(coco.samples(coco_root, other.stem.removeprefix("instances_")))


@pytest.mark.skipif("BIGTRAIN_TEST_DATA" not in os.environ, reason="BIGTRAIN_TEST_DATA names no folder of real data")
def test_coco_real_boxes(tmp_path):
    """The boxes of real COCO annotations lie inside their pictures."""
    path = Path(os.environ["BIGTRAIN_TEST_DATA"]) / "coco-sample.tar.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with tarfile.open(path) as tar:
        names = [name for name in tar.getnames() if name.endswith("val2017.json") or "/val2017/" in name]
        for name in names[:60]:
            tar.extract(name, tmp_path, filter="data")
        if not any(name.endswith(".json") for name in names[:60]):
            tar.extract(next(name for name in names if name.endswith(".json")), tmp_path, filter="data")
    root = next(tmp_path.rglob("annotations")).parent
    assert len(coco.about(root, "val2017").classes) == 80
    boxes = 0
    for sample in coco.samples(root, "val2017"):
        if isinstance(sample.image, Path) and sample.image.is_file():
            height, width = pixels(sample).shape[:2]
            for thing in sample.objects:
                box = thing.box
                assert box is not None
                assert 0 <= box.top <= box.bottom <= height + 1
                assert 0 <= box.left <= box.right <= width + 1
                boxes += 1
    assert boxes > 50


# --- voc ---

ANNOTATION = """<annotation><folder>VOC2012</folder><filename>{id}.jpg</filename>
<size><width>60</width><height>40</height><depth>3</depth></size>
<object><name>person</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
<object><name>dog</name><bndbox><xmax>10.5</xmax><xmin>5</xmin><ymax>9</ymax><ymin>7</ymin></bndbox></object></annotation>"""


@pytest.fixture
def voc_root(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for image_id in ("2008_000002", "2007_000027", "2009_000001"):
        paint(0, (60, 40), path=root / "JPEGImages" / f"{image_id}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{image_id}.xml").write_text(ANNOTATION.format(id=image_id))
    paint(1, (60, 40), "PNG", path=root / "SegmentationClass" / "2007_000027.png")
    for name, lines in {
        "Main/train.txt": "2008_000002\n2007_000027\n",
        "Main/dog_train.txt": "2008_000002 -1\n2007_000027  1\n",
        "Segmentation/train.txt": "2007_000027\n",
    }.items():
        (root / "ImageSets" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / name).write_text(lines)
    return root


def test_voc_boxes(voc_root):
    """VOC's boxes count from zero, and parts are no objects."""
    found = list(voc.samples(voc_root, "train"))
    assert [sample.key for sample in found] == ["2007_000027", "2008_000002"]
    assert found[0].objects == [
        Object("person", Box(top=1, left=0, bottom=40, right=60)),
        Object("dog", Box(top=6, left=4, bottom=9, right=10.5)),
    ]
    about = voc.about(voc_root, "train")
    assert (about.dataset, about.total, len(about.classes)) == ("voc2012", 2, 20)


def test_voc_masks(voc_root):
    """VOC's Segmentation list brings masks."""
    (sample,) = voc.samples(voc_root, "train", image_set="Segmentation")
    assert sample.mask == voc_root / "SegmentationClass" / "2007_000027.png"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_entities(voc_root, encoding):
    """An annotation that declares entities is refused, whatever its encoding."""
    bomb = '<?xml version="1.0" encoding="%s"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><a>&b;</a>'
    (voc_root / "Annotations" / "2007_000027.xml").write_bytes((bomb % encoding).encode(encoding))
    with pytest.raises(ValueError, match="document type"):
        voc.about(voc_root, "train")


# --- all ---


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"mosaic", "table"}))
@pytest.mark.parametrize("exists", [False, True])
def test_wrong_root(tmp_path, name, exists):
    """A wrong or missing root is answered with the layout that the adapter expects."""
    root = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"must be|may be"):
        ADAPTERS[name].about(root, ADAPTERS[name].split)
