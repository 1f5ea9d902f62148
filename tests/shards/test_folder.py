"""Class folders, and what lies about in them."""

from __future__ import annotations

import os

import pytest

from shards.adapters import folder


def test_class_is_first_folder(animals):
    """The class of a picture is its first folder, however deep it lies."""
    found = list(folder.samples(animals, "train"))
    assert folder.about(animals, "train").classes == ["cat", "dog", "emu"]
    assert folder.about(animals, "train").total == len(found) == 21
    deep = next(sample for sample in found if sample.key == "dog/more/last")
    assert (deep.classes, deep.image_ext, deep.source) == (["dog"], "png", "dog/more/last.PNG")
    assert deep.image == animals / "dog" / "more" / "last.PNG"


def test_order(animals):
    """Each class has its turn, and within a class pictures come in the order of their names."""
    (animals / "emu" / "emu0.jpg").unlink()
    keys = [sample.key for sample in folder.samples(animals, "train")]
    assert keys[:4] == ["cat/cat0", "dog/dog0", "emu/emu1", "cat/cat1"]
    assert keys[-3:] == ["emu/more/last", "cat/more/last", "dog/more/last"]


def test_other_and_hidden_files(animals, capsys):
    """Other files are reported; hidden ones and empty folders are passed over in silence."""
    (animals / ".cache").mkdir()
    (animals / "cat" / "cat1.jpg").rename(animals / ".cache" / "x.jpg")
    (animals / "cat" / ".thumbs").mkdir()
    (animals / "cat" / "cat2.jpg").rename(animals / "cat" / ".thumbs" / "cat2.jpg")
    (animals / "cat" / "notes.txt").write_text("")
    (animals / "nothing").mkdir()
    about = folder.about(animals, "train")
    assert (about.total, about.classes) == (19, ["cat", "dog", "emu"])
    assert "1 file in" in (said := capsys.readouterr().err)
    assert "'cat/notes.txt'" in said


def test_no_class_folder(animals):
    """A picture in no class folder is refused."""
    (animals / "cat" / "cat1.jpg").rename(animals / "cat1.jpg")
    with pytest.raises(ValueError, match=r"1 picture in no class folder \('cat1.jpg'\)"):
        folder.about(animals, "train")


@pytest.mark.parametrize("twin", ["cat/cat1.png", "cat/cat1.JPG", "dog/more/last.jpg"])
def test_duplicate_name(animals, twin, build_folder, tmp_path):
    """Two pictures of one name are refused before anything is written."""
    (animals / "emu" / "emu1.jpg").rename(animals / twin)
    with pytest.raises(ValueError, match=r"have the same key '(cat/cat1|dog/more/last)'"):
        build_folder(animals, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_symlinks(animals, tmp_path):
    """Links to class folders are followed, and deeper ones are refused."""
    (animals / "dog").rename(tmp_path / "elsewhere")
    (animals / "dog").symlink_to(tmp_path / "elsewhere")
    assert folder.about(animals, "train").total == 21
    (animals / "cat" / "all").symlink_to(animals)
    with pytest.raises(ValueError, match="links may go in a circle"):
        folder.about(animals, "train")


@pytest.mark.parametrize(("names", "warned"), [(["train", "test"], True), (["train", "dog"], False)])
def test_split_folders(paint, tmp_path, capsys, names, warned):
    """Folders of splits that are taken for classes raise a warning."""
    for name in names:
        paint(path=tmp_path / "photos" / name / "cat" / "1.jpg")
    assert folder.about(tmp_path / "photos", "train").classes == sorted(names)
    assert (f"--root {tmp_path / 'photos' / 'train'} say" in capsys.readouterr().err) == warned


def test_class_not_utf8(paint, build_folder, tmp_path):
    """A class whose name is not UTF-8 is named before anything is written."""
    paint(path=tmp_path / "in" / os.fsdecode(b"caf\xe9") / "1.jpg")
    with pytest.raises(ValueError, match=r"in has the class 'caf\\udce9', which is not UTF-8 text: rename it"):
        build_folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
