"""Characters rendered from fonts, as in FounderType-200: each font is a class, each of its characters a picture.

ROOT holds the font files; of a collection (.ttc) the first font is taken, since its others share most outlines, and of
several links to a file one. A class is named by family and style. All fonts show the same characters: those of
--characters, or the first --count of GB 2312 (level 1, then level 2: the 6763 that FounderType-200 has).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from bigtrain.data.schema import Object, Sample
from shards.adapters.about import About
from shards.adapters.lists import warn
from shards.keys import safe_key
from shards.treatment import png

SUFFIXES = (".ttf", ".otf", ".ttc")
LAYOUT = f"a folder with font files ({', '.join(SUFFIXES)}) at any depth; --split only names the set"
LICENCE = "each font's own"
EM_SHARE = 0.75  # of the picture's side; a character whose ink would not fit is set smaller
MAX_NAMED = 4  # fonts, and characters of each, in a sentence
OPTIONS: dict[str, dict[str, Any]] = {
    "--characters": {
        "type": os.path.abspath,
        "metavar": "FILE",
        "help": "a text in UTF-8: each of its characters once, in order, spaces aside (default: GB 2312's)",
    },
    "--count": {"type": int, "metavar": "M", "help": "only the first M characters (default: all)"},
    "--size": {"type": int, "default": 64, "metavar": "PIXELS", "help": "side of a picture (default: 64)"},
    "--lacking": {
        "choices": ["refuse", "drop-font", "drop-character"],
        "default": "refuse",
        "help": "what to do where a font lacks a character: stop, or leave out that font or that character "
        "(default: refuse)",
    },
}


class Chosen(NamedTuple):
    """What is rendered: the fonts by class name, sorted, and the characters."""

    fonts: dict[str, Path]
    characters: str
    notes: tuple[str, ...]  # on what is left out


def about(root: Path, split: str, size: int = 64, **choice: Any) -> About:
    if size < 8:
        raise ValueError(f"--size {size} is too small for a character: give at least 8.")
    chosen = choose(root, **choice)
    for note in chosen.notes:
        warn(note)
    return About(root.resolve().name, list(chosen.fonts), LICENCE, len(chosen.fonts) * len(chosen.characters))


def samples(root: Path, split: str, size: int = 64, **choice: Any) -> Iterator[Sample]:
    """Yield the first character of each font, then the second of each."""
    chosen = choose(root, **choice)
    for character in chosen.characters:
        for name, path in chosen.fonts.items():
            code = f"{ord(character):04X}"
            yield Sample(
                key=f"{safe_key(name.replace('/', '_'))}/U{code}",
                image=functools.partial(rendered, path, character, size),
                image_ext="png",
                objects=[Object(name)],
                source=f"{path.relative_to(root).as_posix()} U+{code}",
            )


@functools.lru_cache(maxsize=1)
def choose(root: Path, characters: str | None = None, count: int | None = None, lacking: str = "refuse") -> Chosen:
    wanted = gb2312() if characters is None else characters_in(Path(characters))
    if count is not None and not 1 <= count <= len(wanted):
        raise ValueError(f"--count is {count}; it must be 1 to {len(wanted)}, the characters that there are.")
    wanted = wanted[:count]
    fonts, collections = fonts_by_name(root)
    notes = []
    if collections:
        more, of = sum(collections.values()), next(iter(collections))
        notes.append(f"{more} fonts behind the first of a collection, as in {of}, are left out.")
    lacks = {name: found for name, path in fonts.items() if (found := lacked(path, wanted))}
    if lacks and lacking == "refuse":
        named = "; ".join(f"{name} lacks {listed(found)}" for name, found in list(lacks.items())[:MAX_NAMED])
        named += "; and so on" if len(lacks) > MAX_NAMED else ""
        raise ValueError(
            f"{len(lacks)} of {len(fonts)} fonts lack characters: {named}. Give other characters or fonts, or "
            "--lacking drop-font or --lacking drop-character."
        )
    if lacks and lacking == "drop-font":
        fonts = {name: path for name, path in fonts.items() if name not in lacks}
        notes += [f"{name} lacks {listed(found)}: it is left out." for name, found in lacks.items()]
    elif lacks:
        gone = "".join(character for character in wanted if any(character in found for found in lacks.values()))
        wanted = "".join(character for character in wanted if character not in set(gone))
        notes.append(f"{len(lacks)} fonts lack characters, so that these are left out: {listed(gone)}.")
    if not fonts or not wanted:
        raise ValueError(f"no {'character is in every font' if fonts else 'font has every character'}: give others.")
    return Chosen(fonts, wanted, tuple(notes))


def gb2312() -> str:
    """The 6763 Chinese characters of GB 2312 in its order: 3755 common ones, by sound, then 3008 by radical."""
    rows = b"".join(bytes([row, cell]) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
    return rows.decode("gb2312", errors="ignore")


def characters_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--characters {path} is missing: give a text file in UTF-8.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--characters {path} is not UTF-8 text ({error}): save it as UTF-8.") from error
    return "".join(character for character in dict.fromkeys(text) if not character.isspace())


def listed(characters: str) -> str:
    shown = ", ".join(f"{character} (U+{ord(character):04X})" for character in characters[:MAX_NAMED])
    return shown if len(characters) <= MAX_NAMED else f"{shown} ... {len(characters)} in all"


def fonts_by_name(root: Path) -> tuple[dict[str, Path], dict[Path, int]]:
    """Fonts by the name of their class, and collections with the number of fonts behind their first."""
    paths = sorted(
        Path(place, name)
        for place, _, names in os.walk(root)
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
    )
    if not paths:
        raise FileNotFoundError(f"{root} holds no font: --root must be {LAYOUT}.")
    files = {path.resolve(): path for path in reversed(paths)}
    found: dict[str, Path] = {}
    collections = {}
    for path in sorted(files.values()):
        name, more = name_of(path)
        if name in found:
            raise ValueError(f"{path} and {found[name]} are both the font {name!r}: take one of them away.")
        found[name] = path
        if more:
            collections[path] = more
    return dict(sorted(found.items())), collections


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The font, or the first of a collection."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("`build fonts` needs fontTools: install it with `pip install bigtrain[fonts]`.") from error
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            yield font
    except Exception as error:  # fontTools raises nearly anything on a damaged file
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a font ({type(error).__name__}: {error}): take it away or repair it.")


def name_of(path: Path) -> tuple[str, int]:
    """Family and style, such as "IPAexGothic Regular", and how many more fonts its file holds."""
    with opened(path) as font:
        names = (font["name"].getBestFamilyName(), font["name"].getBestSubFamilyName())
        more = font.reader.numFonts - 1 if path.suffix.lower() == ".ttc" else 0
    return " ".join(" ".join(filter(None, names)).split()) or path.stem, more


def lacked(path: Path, characters: str) -> str:
    """The characters that a font does not map, or maps to a glyph without ink or that cannot be drawn."""
    with opened(path) as font:
        mapped = font.getBestCmap() or {}
    return "".join(c for c in characters if ord(c) not in mapped or is_blank(path, c))


def is_blank(path: Path, character: str) -> bool:
    """Whether the box from the base line to the ends of the ink is flat, by the outline alone."""
    face = face_of(path, 64)
    try:
        left, top, right, bottom = face.getbbox(character)
    except OSError:  # the hinting instructions of this glyph are broken
        return True
    return top == bottom or left == right


@functools.lru_cache(maxsize=1024)
def face_of(path: Path, em: int) -> ImageFont.FreeTypeFont:
    """A font at a size; the basic layout is the same with and without the optional library for complex scripts."""
    try:
        return ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise unreadable(path, error) from error


def rendered(path: Path, character: str, size: int) -> bytes:
    """A PNG of size x size, 8 bits of grey: black on white, the middle of the ink in the middle of the picture."""
    for em in range(round(EM_SHARE * size), 0, -1):
        ink = ink_of(path, character, em)
        if max(ink.size) <= size:
            break
    image = Image.new("L", (size, size), 255)
    at = ((size - ink.width) // 2, (size - ink.height) // 2)
    image.paste(ImageOps.invert(ink), at)
    return png(image)


def ink_of(path: Path, character: str, em: int) -> Image.Image:
    """The character white on black, cut to its ink; Pillow's own box reaches to the base line."""
    face = face_of(path, em)
    left, top, right, bottom = map(int, face.getbbox(character))
    image = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, fill=255, font=face)
    return image.crop(image.getbbox())
