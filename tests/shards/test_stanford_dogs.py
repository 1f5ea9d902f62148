"""Stanford Dogs with lists as its owners write them: MATLAB cells of cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from bigtrain.data.schema import Box, Object
from shards.adapters import stanford_dogs

FILES = [
    ("n02085620-Chihuahua/n02085620_10074.jpg", 1),
    ("n02085620-Chihuahua/n02085620_5927.jpg", 1),
    ("n02086240-Shih-Tzu/n02086240_1011.jpg", 5),
    ("n02098105-soft-coated_wheaten_terrier/n02098105_18.jpg", 49),
]
XML = """<annotation><folder>%s</folder><filename>%s</filename><size><width>20</width><height>12</height></size>
<object><name>{name}</name><bndbox><xmin>0</xmin><ymin>2</ymin><xmax>19</xmax><ymax>11</ymax></bndbox></object>
</annotation>"""


def write_list(path: Path, files: list[tuple[str, int]]) -> None:
    cells = np.empty((len(files), 1), dtype=object)
    cells[:, 0] = [name for name, _ in files]
    annotations = np.empty((len(files), 1), dtype=object)
    annotations[:, 0] = [name.removesuffix(".jpg") for name, _ in files]
    labels = np.array([[float(label)] for _, label in files])
    savemat(path, {"file_list": cells, "annotation_list": annotations, "labels": labels})


@pytest.fixture
def root(tmp_path: Path, paint: Callable[..., bytes]) -> Path:
    for place, (name, _) in enumerate(FILES):
        paint(place, path=tmp_path / "Images" / name)
        annotation = tmp_path / "Annotation" / name.removesuffix(".jpg")
        annotation.parent.mkdir(parents=True, exist_ok=True)
        annotation.write_text(XML.format(name=name.partition("/")[0].partition("-")[2]))
    write_list(tmp_path / "train_list.mat", [FILES[1], FILES[3], FILES[2]])
    write_list(tmp_path / "test_list.mat", FILES[:1])
    write_list(tmp_path / "file_list.mat", FILES)
    return tmp_path


def test_samples(root):
    """Dogs have the name behind the WordNet ID as class, and their box."""
    about = stanford_dogs.about(root, "train")
    assert (about.classes, about.total) == (["Chihuahua", "Shih-Tzu", "soft-coated_wheaten_terrier"], 3)
    assert about.folder_order == ("Chihuahua", "Shih-Tzu", "soft-coated_wheaten_terrier")
    found = list(stanford_dogs.samples(root, "train"))
    assert [s.key for s in found] == [
        *("Chihuahua/n02085620_5927", "Shih-Tzu/n02086240_1011", "soft-coated_wheaten_terrier/n02098105_18"),
    ]
    assert found[1].objects == [Object("Shih-Tzu", Box(top=2, left=0, bottom=11, right=19))]
    assert found[1].image == root / "Images" / FILES[2][0]


def test_list_sizes(root):
    """A list of one picture is read, and so is that of all."""
    assert [s.key for s in stanford_dogs.samples(root, "test")] == ["Chihuahua/n02085620_10074"]
    assert stanford_dogs.about(root, "test").classes == stanford_dogs.about(root, "all").classes
    assert stanford_dogs.about(root, "all").total == 4


def test_missing_annotations(root):
    """Without annotations there are only labels; with them, none may be missing."""
    (root / "Annotation" / FILES[2][0][:-4]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the annotations of 1 pictures \('n02086240-Shih-Tzu"):
        stanford_dogs.about(root, "train")
    (root / "Annotation").rename(root / "aside")
    assert next(stanford_dogs.samples(root, "train")).objects == [Object("Chihuahua")]


def test_list_mismatch(root, paint):
    """Lists and pictures have to agree: neither may name or hold what the other lacks."""
    paint(9, path=root / "Images" / "n02085620-Chihuahua" / "new.jpg")
    with pytest.raises(ValueError, match=r"has 1 pictures that .*file_list.mat does not name \('n02085620-Chih"):
        stanford_dogs.about(root, "train")
    (root / "Images" / FILES[0][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"file_list.mat names 1 pictures that are not in"):
        stanford_dogs.about(root, "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("../secret.jpg", 1)], "outside of"),
        ([("Chihuahua/1.jpg", 1)], "where n02085620-Chihuahua/n02085620_10074.jpg ... should be"),
        ([FILES[0], (FILES[2][0], 1)], "the label 1.*which is that of Chihuahua"),
        ([("n02085620-Chihuahua/none.jpg", 1)], "names 1 pictures that file_list.mat does not"),
    ],
)
def test_bad_list(root, files, message):
    """A list that cannot be true is refused."""
    write_list(root / "train_list.mat", files)
    with pytest.raises(ValueError, match=message):
        stanford_dogs.about(root, "train")


def test_missing_list(root):
    """A missing list is answered with the expected layout."""
    (root / "train_list.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_list.mat is missing: --root must be the folder of Images/"):
        stanford_dogs.about(root, "train")
