"""Safe keys, and paths that cannot leave their folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

META = re.compile(r"__[^/]*__(/|\.|$)")  # what WebDataset passes over: __meta__.json and the like
MAX_PART = 80  # characters of one part of a key, so that <key>.mask.png fits in a plain tar header


def safe_key(name: str) -> str:
    """A key of letters, digits, "_", "-" and "/" for any name; other names get another key.

    A name that is a key already stays as it is. Any other is made into one and ends in 8 digits of its own sha256, so
    that "a b" and "a.b" do not become the same key.
    """
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part)[:MAX_PART] for part in name.split("/") if part]
    key = "/".join(parts)
    key = f"k{key}" if META.match(key) else key
    if key == name and key:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{key}-{digest}" if key else digest


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name` for a name that a dataset's own list gives; a name that leaves the folder is refused."""
    path = PurePosixPath(name)
    if "\\" in name:
        raise ValueError(
            f"{name!r} has backslashes: correct the list that names it, so that its parts stand between /."
        )
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(
            f"{name!r} lies outside of {folder}, and nothing outside is read: correct the list "
            "that names it, or give the folder that holds all its files."
        )
    return folder / path


def below(folder: Path, resolved: Path, name: str) -> str:
    """The name in `folder` of an absolute path that lies under it, its links followed or not; any other as it is.

    What comes out may still have ".." in it, which `inside` refuses.
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    for base in (folder, resolved):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    path = path.parent.resolve() / path.name
    return path.relative_to(resolved).as_posix() if path.is_relative_to(resolved) else name
