"""The preset's data: shards of the embedded Fashion-MNIST sample, made by the ordinary builder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigtrain.data.schema import MANIFEST_FILE
from bigtrain.runtime.settings import read_settings

HERE = Path(__file__).parent
PRESET = HERE.parent / "fashion.toml"
SHARDS = Path("data") / "fashion"
OUT = Path("runs") / "fashion"


def with_preset(config_class: type, argv: Sequence[str], *, description: str) -> Any:
    """Settings as given; without --train those of the preset, on the embedded data."""
    config: Any = read_settings(config_class, argv, description=description)
    if config.train:
        return config
    return with_embedded_data(read_settings(config_class, argv, PRESET, description=description))


def is_embedded(config: Any) -> bool:
    return (config.train, config.test) == (str(SHARDS / "train"), str(SHARDS / "test"))


def with_embedded_data(config: Any) -> Any:
    """Fill in the sample's shards, the embedded teacher and a run folder where none were named."""
    given = {
        "train": str(SHARDS / "train"),
        "test": str(SHARDS / "test"),
        "teacher": str(HERE / "teacher" / "teacher.safetensors"),
    }
    default = type(config)()
    given = {name: value for name, value in given.items() if getattr(config, name) == getattr(default, name)}
    return replace(config, **given, run=replace(config.run, out=config.run.out or str(OUT)))


def build_embedded_shards() -> None:
    """Build the sample's shards, once; of several processes the first builds, and the others wait for it."""
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(f"running the preset fashion, on the embedded sample of Fashion-MNIST in {SHARDS}", flush=True)
    for split in ("train", "test"):
        out = SHARDS / split
        if first and not (out / MANIFEST_FILE).is_file():
            options = ["--root", str(HERE / "sample"), "--dataset", "fashion_mnist", "--split", split]
            done = subprocess.run([sys.executable, "-m", "shards", "build", "mnist", *options, "--out", str(out)])
            if done.returncode:
                raise ValueError(f"the shards of the embedded sample could not be built in {out}: see the line above.")
        wait_for(out / MANIFEST_FILE)


def wait_for(path: Path, *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} did not appear within {timeout_s:.0f} s: the first process could not build it.")
        time.sleep(0.1)
