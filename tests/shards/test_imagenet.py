"""ImageNet as its owners, Kaggle and torchvision lay it out, the 21k of all synsets, and Tiny-ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from bigtrain.data.schema import Box, Object
from shards.adapters import imagenet

WNIDS = ["n01440764", "n02123045", "n03995372"]  # the development kit numbers them otherwise
VAL = {1: "n03995372", 2: "n01440764", 3: "n03995372"}


def synsets() -> np.ndarray:
    """meta.mat: a struct array of the leaf synsets, followed by their ancestors."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    found = np.zeros((4, 1), dtype=[(name, object) for name in [*fields, "num_train_images"]])
    for row, (wnid, children) in enumerate([(WNIDS[2], 0), (WNIDS[0], 0), (WNIDS[1], 0), ("n00001740", 3)]):
        kin = np.arange(1, children + 1, dtype=np.uint16)[None]
        found[row, 0] = (row + 1, wnid, "crane", "a thing", children, kin, 0 if not children else 5, 1300)
    return found


@pytest.fixture
def devkit(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    root = tmp_path / "devkit"
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets()})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n")
    for number in VAL:
        paint(number, path=root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


@pytest.fixture
def kaggle(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    """Data/, LOC_val_solution.csv, and Annotations/ for some of the pictures."""
    root = tmp_path / "kaggle"
    data, annotations = (root / "ILSVRC" / name / "CLS-LOC" for name in ("Data", "Annotations"))
    lines = ["ImageId,PredictionString"]
    for number, wnid in VAL.items():
        paint(number, path=data / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
        lines.append(f"ILSVRC2012_val_{number:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(reversed([*lines[1:], lines[0]])) + "\n")
    paint(9, path=data / "train" / WNIDS[0] / f"{WNIDS[0]}_18.JPEG")
    paint(8, path=data / "train" / WNIDS[0] / f"{WNIDS[0]}_37.JPEG")
    paint(7, path=data / "test" / "ILSVRC2012_test_00000001.JPEG")
    place = annotations / "train" / WNIDS[0] / f"{WNIDS[0]}_18.xml"
    place.parent.mkdir(parents=True)
    box = "<bndbox><xmin>0</xmin><ymin>3</ymin><xmax>19</xmax><ymax>11</ymax></bndbox>"
    place.write_text(f"<annotation><object><name>{WNIDS[0]}</name>{box}</object></annotation>")
    return root


def test_val_layouts(devkit, kaggle, tmp_path, paint):
    """The validation samples are the same in the layouts of the devkit, Kaggle and class folders."""
    for number, wnid in VAL.items():
        paint(number, path=tmp_path / "folders" / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
    expected = [(f"val/ILSVRC2012_val_{number:08d}", [wnid], paint(number)) for number, wnid in VAL.items()]
    for root in (devkit, kaggle, tmp_path / "folders"):
        found = list(imagenet.samples(root, "val"))
        assert [(s.key, s.classes, s.image.read_bytes()) for s in found] == expected
        about = imagenet.about(root, "val")
        assert (about.dataset, about.classes, about.total) == ("imagenet", [WNIDS[0], WNIDS[2]], 3)


def test_val_beside_devkit(devkit):
    """The owners' archive of validation pictures may be unpacked beside the devkit, without val/."""
    for path in (devkit / "val").iterdir():
        path.rename(devkit / path.name)
    (devkit / "val").rmdir()
    found = list(imagenet.samples(devkit, "val"))
    assert [(s.source, s.classes) for s in found][1] == ("ILSVRC2012_val_00000002.JPEG", ["n01440764"])


def test_kaggle_boxes(kaggle):
    """Boxes are read from Kaggle's annotations, where there are any, and count from zero."""
    boxed, plain = imagenet.samples(kaggle, "train")
    assert boxed.objects == [Object(WNIDS[0], Box(top=3, left=0, bottom=11, right=19))]
    assert plain.objects == [Object(WNIDS[0])]
    assert boxed.source == f"train/{WNIDS[0]}/{WNIDS[0]}_18.JPEG"


def test_val_mismatch(devkit, kaggle, paint):
    """Pictures without a label and labels without a picture are counted and named."""
    paint(4, path=devkit / "val" / "ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(ValueError, match=r"has 1 pictures that .*ground_truth.txt does not name \('ILSVRC2012_val_0+4"):
        imagenet.about(devkit, "val")
    (kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"solution.csv names 1 pictures that are not in .*00000003"):
        imagenet.about(kaggle, "val")


def test_unknown_class_number(devkit):
    """A class number that is no leaf synset of the devkit is refused."""
    truth = devkit / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n4\n1\n")  # 4 is a synset above others
    with pytest.raises(ValueError, match=r"gives ILSVRC2012_val_00000002.JPEG the class 4, which is none of the 3"):
        imagenet.about(devkit, "val")


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_damaged_devkit(devkit, damage):
    """A devkit whose meta.mat is damaged, missing or of another kind is refused as such."""
    path = devkit / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "other":
        savemat(path, {"synsets": np.arange(3)})
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"meta.mat (is no MATLAB|does not name|is missing)"):
        imagenet.about(devkit, "val")


def test_21k(tmp_path, paint):
    """All synsets (the 21k) are read as train, without a folder of that name."""
    for wnid in ("n02084071", "n00007846"):
        paint(0, path=tmp_path / wnid / f"{wnid}_7.JPEG")
    (tmp_path / "words.txt").write_text("")
    found = [(s.key, s.classes, s.source) for s in imagenet.samples(tmp_path, "train")]
    assert found[0] == ("train/n00007846/n00007846_7", ["n00007846"], "n00007846/n00007846_7.JPEG")
    assert imagenet.about(tmp_path, "train").total == len(found) == 2
    with pytest.raises(FileNotFoundError, match="val holds no pictures with labels: --root must be"):
        imagenet.about(tmp_path, "val")


@pytest.mark.parametrize("where", ["ILSVRC2012_img_train.tar", "train/n01440764.tar", "n01440764.tar"])
def test_packed_archives(tmp_path, where):
    """Archives that are still packed are refused, with the commands that unpack them."""
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="unpack them first: mkdir train val; tar -xf"):
        imagenet.about(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="unpack them first"):
        imagenet.about(tmp_path / where, "train")


def test_test_pictures_have_no_labels(kaggle):
    with pytest.raises(ValueError, match="--split test has no labels in ImageNet: it may be train or val"):
        imagenet.about(kaggle, "test")


def test_tiny_layouts(tmp_path, paint):
    """Tiny-ImageNet is read in its original layout and in the plain one, with the same samples."""
    for wnid in ("n01443537", "n01629819"):
        for place in range(2):
            paint(place, path=tmp_path / "plain" / "train" / wnid / f"{wnid}_{place}.JPEG")
            paint(place, path=tmp_path / "original" / "train" / wnid / "images" / f"{wnid}_{place}.JPEG")
        (tmp_path / "original" / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    plain, original = (list(imagenet.samples(tmp_path / form, "train")) for form in ("plain", "original"))
    assert [(s.key, s.classes) for s in plain] == [(s.key, s.classes) for s in original]
    assert [s.key for s in plain[:2]] == ["train/n01443537/n01443537_0", "train/n01629819/n01629819_0"]
    assert plain[0].image_ext == "jpeg"


def test_tiny_val(tmp_path, paint):
    """Tiny-ImageNet's validation pictures have the classes that val_annotations.txt gives."""
    for place in range(3):
        paint(place, path=tmp_path / "val" / "images" / f"val_{place}.JPEG")
    lines = [f"val_{place}.JPEG\tn0{3 - place}444034\t0\t32\t44\t62\n" for place in range(3)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    found = [(s.key, s.classes) for s in imagenet.samples(tmp_path, "val")]
    assert found == [("val/val_0", ["n03444034"]), ("val/val_1", ["n02444034"]), ("val/val_2", ["n01444034"])]
    assert next(imagenet.samples(tmp_path, "val")).source == "val/images/val_0.JPEG"
    assert imagenet.about(tmp_path, "val").dataset == "tiny-imagenet"
