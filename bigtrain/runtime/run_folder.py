"""The run folder: the only truth that a restart needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from bigtrain.runtime.config import result_settings

CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"


class RunFolder:
    """A folder that holds one run: opening it again with the same settings continues, with others is refused."""

    def __init__(self, path: str | Path, config: Any) -> None:
        self.path = Path(path)
        self.config = config

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return (self / RESULTS_FILE).is_file()

    def check(self) -> None:
        """Refuse a folder that holds another configuration's run, naming the settings that differ."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: name a folder, which may be new.")
        if not (self / CONFIG_FILE).is_file():
            if self.path.is_dir() and any(p.suffix != ".tmp" for p in self.path.iterdir()):
                raise ValueError(f"--out {self.path} holds other files and no run: name a new folder.")
            return
        there = json.loads((self / CONFIG_FILE).read_text())["settings"]
        here = result_settings(self.config)
        differ = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differ:
            pairs = ", ".join(f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in differ)
            raise ValueError(
                f"--out {self.path} holds a run with other settings: {pairs}. Name another folder, or give that run's "
                "settings to continue it."
            )

    def resolved(self, name: str) -> Any:
        """What an "auto" setting came to when the run began, so that a restart elsewhere keeps to it; None before."""
        config = self / CONFIG_FILE
        return json.loads(config.read_text())["resolved"][name] if config.is_file() else None

    def create(self, **resolved: Any) -> None:
        """Write settings, what the "auto" ones came to, and versions, once. Called on one rank, after `check`."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self / CONFIG_FILE).is_file():
            record = {
                "settings": result_settings(self.config),
                "resolved": resolved,
                "git_sha": _git_sha(),
                "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
            }
            write_json(self / CONFIG_FILE, record)

    def finish(self, results: Any) -> None:
        """Write results.json, which makes the run a finished one; its checkpoints have served. Called on one rank."""
        write_json(self / RESULTS_FILE, results)
        shutil.rmtree(self / "checkpoints", ignore_errors=True)


def write_json(path: Path, record: Any) -> None:
    """Write JSON so that the file is there whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _git_sha() -> str | None:
    """The commit of the checkout this package lies in, "-dirty" where files differ; None for an installed package."""
    top = Path(__file__).parents[2]
    if not (top / ".git").exists():
        return None
    describe = ["git", "-C", str(top), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None
