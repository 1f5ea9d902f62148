"""The classes of a sample in shards that others made: from its .json, .cls or .txt, or from the folder in its key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bigtrain.files import read_lines

CLASSES_FROM = ("members", "folder")
LABEL_EXTENSIONS = ("json", "cls", "txt")  # the first that a sample has
MAX_NAME = 200  # characters; a longer .txt is a caption


def classes_of(ext: str, data: bytes, class_names: Sequence[str] | None) -> list[str]:
    """Class names in a .json ("classes", "label" or "class"), .cls or .txt; numbers count in class_names from 0."""
    if ext == "json":
        try:
            record = json.loads(data)
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        record = record if isinstance(record, dict) else {}
        value = next((record[name] for name in ("classes", "label", "class") if name in record), None)
        values = value if isinstance(value, list) else [] if value is None else [value]
    else:
        text = data.decode("utf-8").strip()
        if "\n" in text or len(text) > MAX_NAME:
            raise ValueError("holds a text too long for a class name")
        values = [int(text)] if text.isdecimal() else [text] if text else []
    return checked_names(values, class_names)


def class_of_folder(key: str, class_names: Sequence[str] | None) -> list[str]:
    """The class of a/cat/0001 is cat; a key without a folder has none."""
    folder = PurePosixPath(key).parent.name
    return checked_names([folder], class_names) if folder else []


def checked_names(values: Sequence[object], class_names: Sequence[str] | None) -> list[str]:
    """The classes as names, each once, sorted."""
    names = set()
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"has the class {value!r}, which is neither a name nor a whole number")
        if isinstance(value, int):
            if class_names is None and value < 0:
                raise ValueError(f"has class {value}, and classes count from 0")
            if class_names is not None and not 0 <= value < len(class_names):
                raise ValueError(f"has class {value}, and --class-names names 0 .. {len(class_names) - 1}")
            value = class_names[value] if class_names is not None else value
        elif class_names is not None and value not in class_names:
            raise ValueError(f"has class {value!r}, which --class-names does not name")
        names.add(as_text(str(value)))
    return sorted(names)


def as_text(name: str) -> str:
    """The name of a class; one that is no UTF-8, which a name of a file need not be, is refused."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has the class {name!a}, which is not UTF-8 text: rename it") from error
    return name


def numbers_first(name: str) -> tuple[int, str]:
    """Sort 2 before 10, and numbers before names."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def read_class_names(path: Path) -> list[str]:
    names = read_lines(path)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--class-names {path} must give each class a line of its own, no name twice.")
    return names
