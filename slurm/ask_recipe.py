"""Asking a recipe, without importing it, which settings it resolves flags to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bigtrain.choices import is_local
from bigtrain.data.schema import MANIFEST_FILE
from slurm.shipped import shipped, shipped_names
from slurm.sweep import Sweep, toml

SETS = ("train", "test", "val", "reference")  # settings that name a shard set


def ask_recipe(recipe: Path, flags: Sequence[str]) -> dict[str, Any]:
    """All settings of a recipe with these flags.

    Raises:
        ValueError: there is no such recipe, or it refuses the flags, in its own words.
    """
    recipe = shipped(recipe, "recipe")
    if not recipe.is_file():
        raise ValueError(f"there is no recipe {recipe}: name a script, or one of {', '.join(shipped_names('recipe'))}.")
    command = [sys.executable, str(recipe), *flags, "--print-config"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise ValueError(f"the recipe refuses these settings.\n{done.stderr.strip()}")
    try:
        settings: dict[str, Any] = json.loads(done.stdout)
        return settings
    except ValueError as error:
        raise ValueError(f"{recipe} is not a recipe: with --print-config it prints no settings.") from error


def missing_inputs(sweep: Sweep) -> list[str]:
    """A sentence for each file of weights and local shard set that is not here, and that no shared run will write."""
    found = dict[str, str]()
    for run in sweep.runs:
        for name, value in run.settings.items():
            if not isinstance(value, str) or not value or "://" in value or value in run.needs:
                continue
            if is_local(value) and not Path(value).expanduser().exists():
                found[value] = (
                    f"{sweep.path}: {name} is {value!r} in the run {run.name}, and there is no such file here."
                )
            elif name in SETS and not (Path(value) / MANIFEST_FILE).is_file():
                found[value] = (
                    f"{sweep.path}: {name} is {value!r} in the run {run.name}, and there is no shard set here."
                )
    return list(found.values())


def check_settings(sweep: Sweep) -> None:
    """Have each recipe of a sweep check one run for each set of setting names.

    Raises:
        ValueError: an unknown axis or setting, or a value that it refuses.
    """
    for run in {(run.recipe, *run.settings): run for run in reversed(sweep.runs)}.values():
        print(f"asking {run.recipe} for its settings", file=sys.stderr, flush=True)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "settings.toml"
            file.write_text(toml(run.settings))
            try:
                ask_recipe(Path(run.recipe), ["--config", str(file)])
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), str(sweep.path))) from error
