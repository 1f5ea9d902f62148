"""Files that come with bigtrain, by name: recipes, sweeps and clusters, wherever it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

FOLDERS = {  # kind -> package, folder in it, what its files end in
    "recipe": ("recipes", "", ".py"),
    "sweep": ("slurm", "sweeps", ".toml"),
    "cluster": ("slurm", "clusters", ".toml"),
}


def shipped(given: Path, kind: str) -> Path:
    """The file as given, or else the one of this name that comes with bigtrain: `defend` is recipes/defend.py.

    Args:
        kind: of FOLDERS.
    """
    package, inner, suffix = FOLDERS[kind]
    is_named = given.parent in (Path(), Path(package) / inner)
    if given.is_file() or not is_named or given.stem not in shipped_names(kind):
        return given
    return folder_of(kind) / f"{given.stem}{suffix}"


def shipped_names(kind: str) -> list[str]:
    """What `shipped` finds of a kind."""
    return sorted(file.stem for file in folder_of(kind).glob(f"[!_]*{FOLDERS[kind][2]}"))


def folder_of(kind: str) -> Path:
    package, inner, _ = FOLDERS[kind]
    spec = find_spec(package)  # finds it, and imports nothing
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / inner
