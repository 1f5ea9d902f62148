"""The memory that a process holds while it trains, under DDP and ZeRO-1, 2 and 3.

    python tests/benchmarks/training.py --part memory [--depth 16] [--processes 4]

starts this file under each configuration of recipes/accelerate. Memory is resident memory less what the process had
before the network was made; what is freed goes back to the system at once, so it is what tensors hold.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from bigtrain.data.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.models.architecture import Architecture
from bigtrain.models.classifier import Classifier
from bigtrain.models.network import normalised
from bigtrain.models.vit import ViT
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import RunSettings
from bigtrain.training.run_setup import Setup
from bigtrain.training.stage import Stage
from recipes.pretrain import Config

ROOT = Path(__file__).parents[2]
# bytes a weight of P processes: weights 4, gradients 4, AdamW's moments 8; DeepSpeed has one more copy of its share of
# the weights, and of its gradients
EXPECTED: dict[str, Callable[[int], float]] = {
    "cpu2": lambda P: 4 + 4 + 8,
    "zero1": lambda P: 4 + 4 + (8 + 4 + 4) / P,
    "zero2": lambda P: 4 + (4 + 8 + 4 + 4) / P,
    "zero3": lambda P: (4 + 4 + 8 + 4 + 4) / P,
}
PIXELS, BATCH = 64, 4  # few tokens: activations are not what is measured


def compare(folder: Path, shards: str, depth: int, processes: int) -> None:
    """Train some steps under each configuration and print a row for each."""
    print("| launch | weights | GB in a step | ratio to DDP | expected | GB while it starts | s a step |")
    print("|---|---|---|---|---|---|---|")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for config in EXPECTED:
        line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
        line += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"), str(Path(__file__))]
        out = folder / config
        line += ["--shards", shards, "--out", str(out), "--depth", str(depth)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{config} failed: {done.stderr[-3000:]}")
        found[config] = measured = json.loads((out / "memory.json").read_text())
        share, expected = measured["step"] / found["cpu2"]["step"], EXPECTED[config](processes) / 16
        gb = [f"{measured[when] / 1e9:.2f}" for when in ("step", "start")]
        name = "DDP" if config == "cpu2" else f"ZeRO-{config[-1]}"
        print(
            f"| {name} | {measured['weights'] / 1e6:.0f} M | {gb[0]} | {share:.2f} | {expected:.2f} | {gb[1]} | "
            f"{measured['seconds']:.1f} |",
            flush=True,
        )


def resident(kind: str) -> int:
    """VmRSS: bytes now; VmHWM: the most since `forget_peak`."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith(kind + ":"))


def give_back_freed_memory() -> None:
    """Undo bigtrain.data.memory: each large tensor is mapped by itself, and unmapped when it is freed."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    mallopt(M_TRIM_THRESHOLD, 1 << 20)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def train(shards: str, out: str, depth: int, steps: int = 5) -> None:
    """What each process runs; peak memory is measured from the third step on."""
    settings = RunSettings(out=out, log_every=1, checkpoint_every=10**9)
    setup = Setup.begin(RunFolder(out, Config(run=settings)), "fp32", {})
    shard_set = ShardSet(shards)
    before = resident("VmRSS")
    forget_peak()
    torch.manual_seed(0)
    model = Classifier(ViT(Architecture("vit_large_patch16_224", PIXELS, depth=depth).build()), 2, "token")
    weights = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    plan = shard_set.plan(np.arange(BATCH * steps), BATCH)
    stream = setup.stream(shard_set, plan, Resized(PIXELS))
    stage = Stage(
        "memory", setup, trained=model, optimizer=optimizer, stream=stream, steps=stream.plan.batches_per_epoch
    )
    at_start = resident("VmHWM") - before
    for step in stage:
        give_back_freed_memory()
        if stage.step == 2:
            forget_peak()
            began = time.monotonic()
        for batch in step.parts():
            image_B3HW = normalised(batch.views["image"], (0.5,) * 3, (0.5,) * 3)
            class_B = torch.zeros(len(image_B3HW), dtype=torch.long)
            loss_B = F.cross_entropy(stage.module(image_B3HW), class_B, reduction="none")
            step.backward(batch.mean(loss_B, setup.accelerator.num_processes))
        step.update()
    own = {"step": resident("VmHWM") - before, "start": at_start, "seconds": (time.monotonic() - began) / (steps - 2)}
    ranks = gather_object([own])
    if setup.accelerator.is_main_process:
        most = {key: max(rank[key] for rank in ranks) for key in own}
        (Path(out) / "memory.json").write_text(json.dumps({"weights": weights, **most}))
    setup.heartbeat.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--shards", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--depth", type=int, required=True)
    train(**vars(parser.parse_args()))
