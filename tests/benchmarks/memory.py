"""Peak memory of a DEFEND run by the number of pictures: the same few steps on N and on 8 N pictures.

    python tests/benchmarks/memory.py [--pictures 2000]

Pictures are random noise of 64 x 64; each run is a process of its own, and its peak is what the system accounts to it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT

ROOT = Path(__file__).parents[2]


def build(folder: Path, count: int) -> None:
    """A shard set of `count` pictures of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "pictures" / ("known", "novel")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    options = ["--root", str(folder / "pictures"), "--out", str(folder / "shards")]
    subprocess.run(
        [sys.executable, "-m", "shards", "build", "folder", *options], check=True, cwd=ROOT, capture_output=True
    )


def peak_mib(*flags: str) -> float:
    """Peak resident memory of one run."""
    process = subprocess.Popen([sys.executable, str(ROOT / "recipes" / "defend.py"), *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run failed with status {status}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    count = parser.parse_args().pictures
    architecture = Architecture("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        half = (0.5,) * 3
        Network(ViT(architecture.build()), architecture, half, half).save(folder / "teacher.safetensors")
        torch.manual_seed(0)
        found = {}
        for pictures in (count, 8 * count):
            build(folder / str(pictures), pictures)
            shards = str(folder / str(pictures) / "shards")
            flags = f"--train {shards} --test {shards} --known known --teacher {folder / 'teacher.safetensors'} --out"
            sizes = "--image-size 32 --crop-size 16 --tune-epochs 1 --distil-epochs 1 --neighbours-bank 500"
            found[pictures] = peak_mib(*flags.split(), str(folder / f"run-{pictures}"), *sizes.split())
    print(json.dumps({f"{pictures} pictures": f"{mib:.0f} MiB" for pictures, mib in found.items()}))


if __name__ == "__main__":
    main()
