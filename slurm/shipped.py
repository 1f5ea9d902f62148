"""Files that come with bigtrain, by name: recipes, sweeps and clusters, wherever it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

FOLDERS = {".py": ("recipes", ""), "sweep": ("slurm", "sweeps"), "cluster": ("slurm", "clusters")}


def shipped(given: Path, kind: str) -> Path:
    """The file as given, or else the one of this name that comes with bigtrain: `defend` is recipes/defend.py.

    Args:
        kind: of FOLDERS.
    """
    package, inner = FOLDERS[kind]
    spec = find_spec(package)
    if given.is_file() or spec is None or not spec.submodule_search_locations:
        return given
    found = (
        Path(next(iter(spec.submodule_search_locations))) / inner / f"{given.stem}{'.py' if kind == '.py' else '.toml'}"
    )
    is_named = given.parent in (Path(), Path(package) / inner)
    return found if is_named and found.is_file() else given


def names(kind: str) -> list[str]:
    """What `shipped` finds of a kind."""
    package, inner = FOLDERS[kind]
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    suffix = ".py" if kind == ".py" else ".toml"
    return sorted(file.stem for place in places for file in (Path(place) / inner).glob(f"[!_]*{suffix}"))
