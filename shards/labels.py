"""The classes of a sample: one reading of labels for all that carries them, .json, .cls and .txt members and tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bigtrain.files import read_lines
from bigtrain.text import class_name, decoded

CLASSES_FROM = ("members", "folder")
LABEL_EXTENSIONS = ("json", "cls", "txt")  # the first that a sample has
MAX_LABEL_BYTES = 64 << 20  # of a member that is read
MAX_NAME = 200  # characters; a longer .txt is a caption
WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")  # 3, and 3.0 as tables with gaps write it; 007 is a name


def classes_of(ext: str, data: bytes, class_names: Sequence[str] | None) -> list[str]:
    """Class names in a .json ("classes", "label" or "class"), .cls or .txt; numbers count in class_names from 0."""
    if ext == "json":
        try:
            record = json.loads(decoded(data))
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        record = record if isinstance(record, dict) else {}
        value = next((record[name] for name in ("classes", "label", "class") if name in record), None)
    else:
        value = decoded(data).strip()
        if "\n" in value or len(value) > MAX_NAME:
            raise ValueError("holds a text too long for a class name")
    return names_of(value, class_names)


def class_of_folder(key: str, class_names: Sequence[str] | None) -> list[str]:
    """The class of a/cat/0001 is cat; a key without a folder has none."""
    return names_of(PurePosixPath(key).parent.name, class_names)


def names_of(value: object, class_names: Sequence[str] | None = None) -> list[str]:
    """The classes of one label or of a list of labels as names, each once, sorted.

    A label is a name, without spaces around, or a whole number from 0, also as 3.0 or "3"; None, NaN and "" are none.

    Raises:
        ValueError: anything else, or a number twice in a list, as in a one-hot vector.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    numbers = [found[1] for one in values if not isinstance(one, bool) and (found := WHOLE.fullmatch(str(one).strip()))]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"has the classes {str(values)[:80]}, a number twice, and a list of classes names each once: a one-hot "
            "vector has to become the number of its class"
        )
    return sorted({name for one in values if (name := name_of(one, class_names)) is not None})


def name_of(label: object, class_names: Sequence[str] | None = None) -> str | None:
    """The name of one label, None where it is no label; a whole number counts in class_names from 0."""
    if isinstance(label, float) and math.isnan(label):
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError(f"has the class {label!r}, which is neither a name nor a whole number")
    text = as_text(str(label if label is not None else ""))
    if not text:
        return None
    if not (found := WHOLE.fullmatch(text)):
        if class_names is not None and text not in class_names:
            raise ValueError(f"has class {text!r}, which --class-names does not name")
        return text
    number = int(found[1])
    if class_names is not None and not 0 <= number < len(class_names):
        raise ValueError(f"has class {number}, and --class-names names 0 .. {len(class_names) - 1}")
    if number < 0:
        raise ValueError(f"has class {number}, and classes count from 0: leave the label empty where there is none")
    return class_names[number] if class_names is not None else str(number)


def as_text(name: str) -> str:
    """The name of a class, as `class_name` has it; one that is no UTF-8, which a name of a file need not be, is
    refused."""
    text = class_name(name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has the class {name!a}, which is not UTF-8 text: rename it") from error
    return text


def numbers_first(name: str) -> tuple[int, str]:
    """Sort 2 before 10, and numbers before names."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def read_class_names(path: Path) -> list[str]:
    names = [class_name(line) for line in read_lines(path)]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--class-names {path} must give each class a line of its own, no name twice.")
    return names
