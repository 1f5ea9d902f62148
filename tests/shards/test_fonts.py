"""Sets of characters, from fonts made here so that what each lacks is known."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.set_files import read_index
from shards.adapters import fonts
from shards.build import build
from shards.build_settings import Settings

builder = pytest.importorskip("fontTools.fontBuilder")
pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

OPTIONS = {"characters": None, "count": None, "size": 32, "lacking": "refuse"}


def block(width: int, height: int, low: int = 0):
    """A glyph that is a filled rectangle, in units of a thousandth of an em."""
    pen = pens.TTGlyphPen(None)
    if width:
        pen.moveTo((0, low))
        for corner in ((0, low + height), (width, low + height), (width, low)):
            pen.lineTo(corner)
        pen.closePath()
    return pen.glyph()


@pytest.fixture
def font(tmp_path):
    """A font file whose glyphs are rectangles: character -> (width, height, distance from the base line)."""

    def made(file: str, family: str, glyphs: dict[str, tuple[int, ...]], style: str = "Regular"):
        names = {character: f"u{ord(character):04X}" for character in glyphs}
        made = builder.FontBuilder(1000, isTTF=True)
        made.setupGlyphOrder([".notdef", *names.values()])
        made.setupCharacterMap({ord(character): name for character, name in names.items()})
        made.setupGlyf({".notdef": block(500, 500), **{names[c]: block(*shape) for c, shape in glyphs.items()}})
        made.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
        made.setupHorizontalHeader(ascent=800, descent=-200)
        made.setupNameTable({"familyName": family, "styleName": style})
        made.setupOS2()
        made.setupPost()
        path = tmp_path / "fonts" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
        fonts.choose.cache_clear()
        return tmp_path / "fonts"

    return made


@pytest.fixture
def text(tmp_path):
    def written(characters: str | bytes) -> str:
        path = tmp_path / "characters.txt"
        path.write_bytes(characters if isinstance(characters, bytes) else characters.encode())
        fonts.choose.cache_clear()
        return str(path)

    return written


def ink(sample) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of what is not white."""
    grey = np.asarray(Image.open(io.BytesIO(sample.image())))
    rows, columns = np.nonzero(grey < 128)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_classes_and_samples(font, text):
    """Each font is a class and each character a picture of it, the same every time."""
    font("b.ttf", "Serif", {"一": (500, 250), "丁": (250, 500)})
    root = font("deep/a.TTF", "Hei", {"一": (500, 250), "丁": (250, 500)}, style="Bold")
    options = OPTIONS | {"characters": text("丁 一\n丁\n")}
    found = [replace(sample, image=sample.image()) for sample in fonts.samples(root, "all", **options)]
    assert [(sample.classes[0], sample.source) for sample in found] == [
        ("Hei Bold", "deep/a.TTF U+4E01"),
        ("Serif Regular", "b.ttf U+4E01"),
        ("Hei Bold", "deep/a.TTF U+4E00"),
        ("Serif Regular", "b.ttf U+4E00"),
    ]
    about = fonts.about(root, "all", **options)
    assert (about.classes, about.total) == (["Hei Bold", "Serif Regular"], 4)
    again = [replace(sample, image=sample.image()) for sample in fonts.samples(root, "all", **options)]
    assert found == again


def test_rendering(font, text):
    """A character is black on white, centred, at the font's own scale."""
    root = font("a.ttf", "Hei", {"一": (500, 250), "丁": (250, 500, 300)})
    flat, tall = fonts.samples(root, "all", **OPTIONS | {"characters": text("一丁"), "size": 64})
    grey = np.asarray(Image.open(io.BytesIO(flat.image())))
    assert (grey.dtype, grey.shape, grey[0, 0], grey[32, 32]) == (np.uint8, (64, 64), 255, 0)
    assert ink(flat) == (26, 20, 38, 44)  # 12 x 24 of 64: an em is 48 pixels
    assert ink(tall) == (20, 26, 44, 38)  # wherever it stood above the base line


def test_oversized_character(font, text):
    """A character that would not fit is set smaller, in its own proportions."""
    root = font("a.ttf", "Hei", {"一": (4000, 1000)})
    (sample,) = fonts.samples(root, "all", **OPTIONS | {"characters": text("一")})
    top, left, bottom, right = ink(sample)
    assert 28 <= right - left <= 32
    assert (right - left) / (bottom - top) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("missing", [{}, {"丁": (0, 0)}], ids=["not mapped", "without ink"])
def test_lacking(font, text, capsys, missing):
    """A font that lacks a character is refused by name, or else the font or the character is left out."""
    font("a.ttf", "Full", {"一": (500, 250), "丁": (250, 500)})
    root = font("b.ttf", "Part", {"一": (500, 250), **missing})
    options = OPTIONS | {"characters": text("一丁")}
    with pytest.raises(ValueError, match=r"1 of 2 fonts lack characters: Part Regular lacks 丁 \(U\+4E01\)"):
        fonts.about(root, "all", **options)
    fewer = fonts.about(root, "all", **options | {"lacking": "drop-font"})
    assert (fewer.classes, fewer.total) == (["Full Regular"], 2)
    assert "Part Regular lacks 丁 (U+4E01): it is left out" in capsys.readouterr().err
    shorter = fonts.about(root, "all", **options | {"lacking": "drop-character"})
    assert (shorter.classes, shorter.total) == (["Full Regular", "Part Regular"], 2)
    assert "left out: 丁 (U+4E01)" in capsys.readouterr().err


def test_broken_instructions(font, text, capsys):
    """A font whose instructions are broken counts as lacking its characters."""
    root = font("a.ttf", "Hei", {"一": (500, 250)})
    font("b.ttf", "Bad", {"一": (500, 250)})
    library = pytest.importorskip("fontTools.ttLib")
    with library.TTFont(root / "b.ttf") as read:
        read["prep"] = library.newTable("prep")
        read["prep"].program = pytest.importorskip("fontTools.ttLib.tables.ttProgram").Program()
        read["prep"].program.fromBytecode(bytes(8 * [0x28]))  # an invalid instruction; fewer than 8 go unchecked
        read.save(root / "b.ttf")
    about = fonts.about(root, "all", **OPTIONS | {"characters": text("一"), "lacking": "drop-font"})
    assert about.classes == ["Hei Regular"]
    assert "Bad Regular lacks 一 (U+4E00): it is left out" in capsys.readouterr().err


def test_gb2312(font):
    """Without a text, the characters are those of GB 2312, in its order."""
    order = fonts.gb2312()
    assert (len(order), len(set(order)), order[0], order[3754], order[3755], order[-1]) == (6763, 6763, *"啊座亍齄")
    root = font("a.ttf", "Hei", {"啊": (500, 500), "阿": (500, 500)})
    found = fonts.samples(root, "all", **OPTIONS | {"count": 2})
    assert [sample.source for sample in found] == ["a.ttf U+554A", "a.ttf U+963F"]


def test_collections_and_links(font, tmp_path, capsys):
    """Only the first font of a collection is used, links add no duplicates, and font names must be unique."""
    collection = pytest.importorskip("fontTools.ttLib").TTCollection()
    for name in ("One", "Two"):
        font(f"{name}.ttf", name, {"啊": (500, 500)})
    ttlib = pytest.importorskip("fontTools.ttLib")
    collection.fonts = [ttlib.TTFont(tmp_path / "fonts" / f"{name}.ttf") for name in ("One", "Two")]
    root = tmp_path / "collected"
    root.mkdir()
    collection.save(root / "both.ttc")
    (root / "link.ttc").symlink_to("both.ttc")
    assert fonts.about(root, "all", **OPTIONS | {"count": 1}).classes == ["One Regular"]
    assert "1 fonts behind the first of a collection" in capsys.readouterr().err
    (root / "copy.ttf").write_bytes((tmp_path / "fonts" / "One.ttf").read_bytes())
    fonts.choose.cache_clear()
    with pytest.raises(ValueError, match="are both the font 'One Regular'"):
        fonts.about(root, "all", **OPTIONS | {"count": 1})


@pytest.mark.parametrize("cut", [0, 10, 300, -200])
def test_a_damaged_font_is_named(font, cut):
    root = font("a.ttf", "Hei", {"啊": (500, 500)})
    (root / "a.ttf").write_bytes((root / "a.ttf").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.ttf cannot be read as a font|fonts lack characters"):
        fonts.about(root, "all", **OPTIONS | {"count": 1})


def test_impossible_options_are_refused(font, text, tmp_path):
    root = font("a.ttf", "Hei", {"啊": (500, 500)})
    for options, sentence in (
        ({"count": 6764}, "it must be 1 to 6763"),
        ({"count": 0}, "it must be 1 to 6763"),
        ({"characters": text(b"\xff")}, "not UTF-8 text"),
        ({"size": 4}, "--size 4 is too small"),
        ({"lacking": "drop-font"}, "no font has every character"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fonts.about(root, "all", **OPTIONS | options)
    with pytest.raises(ValueError, match="no character is in every font"):
        fonts.about(root, "all", **OPTIONS | {"characters": text(" \n"), "lacking": "drop-character"})
    with pytest.raises(FileNotFoundError, match="give a text file in UTF-8"):
        fonts.about(root, "all", **OPTIONS | {"characters": str(tmp_path / "none.txt")})


def test_build(font, tmp_path, contents):
    """A set of fonts is built like any other, the same with one worker or two."""
    root = font("a.ttf", "汉 Hei", {"啊": (500, 500), "阿": (500, 400)})
    settings = Settings("fonts", str(root), "all", samples_per_shard=1, options=OPTIONS | {"count": 2})
    manifest = build(settings, tmp_path / "one")
    build(settings, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (manifest.classes, manifest.samples) == (("汉 Hei Regular",), 2)
    assert all(key.endswith(("/U554A", "/U963F")) for key in read_index(str(tmp_path / "one"))["key"].to_pylist())
    assert json.loads((tmp_path / "one" / "build.json").read_text())["options"]["size"] == 32


def test_missing_fonttools(font, monkeypatch):
    """Without fontTools, the command that installs it is given."""
    root = font("a.ttf", "Hei", {"啊": (500, 500)})
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    with pytest.raises(ImportError, match=r"pip install bigtrain\[fonts\]"):
        fonts.about(root, "all", **OPTIONS | {"count": 1})
