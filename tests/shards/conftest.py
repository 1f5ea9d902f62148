"""Small datasets in their official layouts, generated for each test."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.schema import Manifest
from shards.build import build
from shards.build_settings import Settings

Paint = Callable[..., bytes]
BuildFolder = Callable[..., Manifest]


@pytest.fixture
def paint() -> Paint:
    """An encoded picture of noise, another for another seed."""

    def painted(seed: int = 0, size: tuple[int, int] = (20, 12), kind: str = "JPEG", path: Path | None = None) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        return file.getvalue()

    return painted


@pytest.fixture
def animals(tmp_path: Path, paint: Paint) -> Path:
    """Three classes of seven pictures, one of them a level deeper."""
    root = tmp_path / "animals"
    for number, name in enumerate(["cat", "dog", "emu"]):
        for place in range(6):
            paint(10 * number + place, path=root / name / f"{name}{place}.jpg")
        paint(10 * number + 6, kind="PNG", path=root / name / "more" / "last.PNG")
    return root


@pytest.fixture
def build_folder() -> BuildFolder:
    """Build class folders: build_folder(root, out, workers=, max_skipped=, and whatever Settings has)."""

    def built(root: Path, out: Path, workers: int = 1, max_skipped: float = 0.01, **settings: object) -> Manifest:
        chosen = Settings("folder", str(root), "train", **{"samples_per_shard": 5, **settings})  # type: ignore[arg-type]
        return build(chosen, out, workers=workers, max_skipped=max_skipped)

    return built


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by its name."""
    return lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
