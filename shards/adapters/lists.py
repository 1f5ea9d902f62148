"""The lists that owners give beside their pictures, and whether lists and pictures agree."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from bigtrain.text import alike, clean, decoded

FEW = 3


def few(names: Sequence[str]) -> str:
    """The first few names, for a sentence."""
    return ", ".join(f"'{clean(name)}'" for name in names[:FEW]) + (", ..." if len(names) > FEW else "")


def warn(sentence: str) -> None:
    print(f"bigtrain-shards: {sentence}", file=sys.stderr)


def warn_of_alike(names: Iterable[str], where: Path | str) -> None:
    """Tell of classes that a person would take for one; single letters, as in a set of characters, are meant so."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if len(name) > 1:
            groups.setdefault(alike(name), []).append(name)
    if many := [group for group in groups.values() if len(group) > 1]:
        pairs = "; ".join(few(group) for group in many[:FEW])
        warn(f"{where} has classes whose names are nearly the same ({pairs}): if they are one class, rename them.")


def warn_of_one_hot(shown: Collection[Sequence[str]], samples: int, where: Path | str) -> None:
    """Tell where all samples show the same classes, several of them, as one-hot vectors of two would."""
    if samples > 1 and len(shown) == 1 and len(together := next(iter(shown))) > 1:
        warn(
            f"all {samples} samples of {where} show the same {len(together)} classes: if their labels are one-hot "
            "vectors, write the number of the class instead, and start again."
        )


def rows(path: Path, form: str, layout: str) -> list[list[str]]:
    """The lines of a list, each of as many words as its form names: "id class", say. Empty lines are skipped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --root must be {layout}.")
    found = []
    for number, line in enumerate(decoded(path.read_bytes(), "surrogateescape").split("\n"), 1):
        words = line.split()
        if words and len(words) != len(form.split()):
            raise ValueError(f"line {number} of {path} is {line[:80].strip()!r}, where {form!r} should be.")
        if words:
            found.append(words)
    return found


def table(path: Path, form: str, layout: str) -> dict[str, list[str]]:
    """The lines of a list by their first word, which must be unique."""
    listed = rows(path, form, layout)
    found = {words[0]: words[1:] for words in listed}
    if len(found) < len(listed):
        twice, _ = Counter(words[0] for words in listed).most_common(1)[0]
        raise ValueError(f"{path} has several lines for {twice!r}: get it from its owners.")
    return found


def read_mat(path: Path, names: Sequence[str], layout: str) -> list[np.ndarray]:
    """Variables of a MATLAB file, without their dimensions of length 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --root must be {layout}.")
    from scipy.io import loadmat  # here, for it takes a third of a second

    try:
        found = loadmat(path, squeeze_me=True, variable_names=names)
        return [np.atleast_1d(found[name]) for name in names]
    except Exception as error:  # scipy raises nearly anything on a damaged file
        raise ValueError(
            f"{path} is no MATLAB file with {' and '.join(names)} ({type(error).__name__}: {error}): "
            "get it from its owners."
        ) from error


def agree(
    listed: Iterable[str], there: Iterable[str], listing: Path | str, folder: Path, what: str = "pictures"
) -> None:
    """Refuse a listed picture that is not in the folder, and one in the folder that is not listed."""
    named, found = set(listed), set(there)
    if missing := sorted(named - found):
        raise FileNotFoundError(
            f"{listing} names {len(missing)} {what} that are not in {folder} ({few(missing)}): get them from their "
            "owners, or take their lines away."
        )
    if unlisted := sorted(found - named):
        raise ValueError(
            f"{folder} has {len(unlisted)} {what} that {listing} does not name ({few(unlisted)}): get the list from "
            "its owners, or take these files away."
        )


def compare(listed: Collection[str], there: Iterable[str], listing: str, folder: Path, *, is_whole: bool) -> None:
    """`agree` for data sets that are often used in part: say once what is listed and not there and, where the list
    should be whole, what is there and not listed.

    Listed pictures that are missing are left to the build, which names each of them and skips a few.
    """
    named, found = set(listed), set(there)
    missing = sorted(named - found)
    unlisted = sorted(found - named) if is_whole else []
    if missing and len(missing) == len(named):
        raise FileNotFoundError(
            f"{listing} names {len(missing)} pictures ({few(missing)}), and {folder} holds none of them: "
            "--root must be the folder of this list's own pictures."
        )
    if missing:
        warn(
            f"{len(missing)} of the {len(named)} pictures that {listing} names are missing from {folder} "
            f"({few(missing)}): they are skipped if --max-skipped allows so many."
        )
    if unlisted:
        warn(
            f"{len(unlisted)} pictures in {folder} are not named in {listing} ({few(unlisted)}): "
            "they have no labels and are left out."
        )


def class_of(number: str, classes: dict[str, str], listing: Path | str, of: str) -> str:
    """The class that a list gives to a picture by its number."""
    if number not in classes:
        raise ValueError(
            f"{listing} gives {of} the class {number}, which is none of the {len(classes)} that there are."
        )
    return classes[number]
