"""What the training runtime costs: pairs taken in turn, reported as ratios, median (least .. most).

    OMP_NUM_THREADS=1 python tests/benchmarks/training.py --part overhead|checkpoint|scaling|memory|caches [--rounds 5]

overhead: a step of bigtrain.training.stage.Stage / a bare PyTorch loop with the same network, pictures and batches.
checkpoint: saving and loading / torch.save with fsync and torch.load of the same state.
scaling: images/s of recipes/pretrain.py with two processes / with one.
memory: what a process holds under ZeRO-1, 2 and 3 / under DDP (sharing.py).
caches: ten epochs of distillation (recipes/defend.py) with caches of views and tokens / without, --vs another checkout.

Pictures are generated here. --small is a smoke test: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import sharing
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import RandomResizedCrop
from bigtrain.models.architecture import Architecture
from bigtrain.models.classifier import Classifier
from bigtrain.models.load_network import AUGREG_MEAN as MEAN
from bigtrain.models.load_network import AUGREG_STD as STD
from bigtrain.models.network import normalised
from bigtrain.models.vit import ViT
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import RunSettings
from bigtrain.training.optim import decay_groups, schedule, set_schedule
from bigtrain.training.run_setup import Setup
from bigtrain.training.stage import Stage
from bigtrain.training.trunk import class_numbers
from recipes.pretrain import Config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LR = 1e-4
CASES = [("vit_tiny_patch16_224", 96, 32), ("vit_small_patch16_224", 224, 8)]  # network, pixels, images a process
GPU_CASES = [("vit_large_patch16_224", 224, 64)]  # large enough that 16 cores keep up with decoding
SMALL = [("vit_tiny_patch16_224", 32, 8)]


def build(folder: Path, count: int) -> str:
    """A shard set of `count` JPEGs of 320 x 240, some 20 kB each, of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "pictures" / ("one", "other")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((320, 240))
        noise = rng.integers(-12, 13, (240, 320, 1))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)
    options = ["--root", str(folder / "pictures"), "--out", str(folder / "shards")]
    subprocess.run(
        [sys.executable, "-m", "shards", "build", "folder", *options], check=True, cwd=ROOT, capture_output=True
    )
    return str(folder / "shards")


def shown(values: Iterable[float], digits: int = 3) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} .. {ordered[-1]:.{digits}f})"


# --- overhead


def steps_of_stage(stage: Stage, label_of: dict[str, int]) -> Iterator[None]:
    """recipes/pretrain.py's loop."""
    for step in stage:
        factor = schedule("cosine", stage.step, total=stage.steps, warmup=0)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=0.05)
        for part in step.parts():
            class_B = class_numbers(stage.stream.shard_set, part, label_of)
            with stage.setup.autocast():
                logits_BC = stage.module(normalised(part.views["image"], MEAN, STD))
            loss_B = F.cross_entropy(logits_BC.float(), class_B, reduction="none")
            step.backward(part.mean(loss_B, 1))
        step.update(lr=factor * LR)
        yield


def bare_steps(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], stage: Stage) -> Iterator[None]:
    """A plain training loop: the same optimizer and learning rate, no log, no check of the loss."""
    device = stage.setup.accelerator.device
    optimizer = torch.optim.AdamW(decay_groups(model.to(device).named_parameters(), base_lr=LR), lr=LR)
    for step, (image_B3HW, class_B) in enumerate(batches):
        image_B3HW, class_B = image_B3HW.to(device, non_blocking=True), class_B.to(device, non_blocking=True)
        set_schedule(optimizer, lr_factor=schedule("cosine", step, total=stage.steps, warmup=0), weight_decay=0.05)
        with stage.setup.autocast():
            logits_BC = model(normalised(image_B3HW, MEAN, STD))
        F.cross_entropy(logits_BC.float(), class_B).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def seconds(work: Iterator[None], steps: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process for some steps."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(work)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - cpu


def overhead(options: argparse.Namespace) -> None:
    """Turns of each contender, ten of which make a round, in which a row is logged. A turn is one step; ten on a GPU,
    which is synchronised after each turn, not after each step."""
    on_gpu = torch.cuda.is_available()
    cases = SMALL if options.small else GPU_CASES if on_gpu else CASES
    turns, per_turn = (3 if options.small else 10), (10 if on_gpu else 1)
    taken = (2 + turns * options.rounds) * per_turn
    print(
        "| step | ms: Stage | bare, same stream | bare, tensors | Stage / bare, stream | CPU | / bare, tensors | CPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        shard_set = ShardSet(build(Path(temporary), 512))
        workers = len(os.sched_getaffinity(0)) // 2 - 1 if on_gpu else 0  # for each of two streams
        settings = RunSettings(
            out=f"{temporary}/run", log_every=turns * per_turn, checkpoint_every=10**9, workers=workers
        )
        setup = Setup.begin(RunFolder(settings.out, Config(run=settings)), "bf16" if on_gpu else "fp32", {})
        label_of = {name: number for number, name in enumerate(shard_set.classes)}
        for name, size, batch in cases:
            torch.manual_seed(0)
            model = Classifier(ViT(Architecture(name, size).build()), 2, "token")
            bare, bare_too = copy.deepcopy(model), copy.deepcopy(model)
            plan = shard_set.plan(np.arange(len(shard_set)), batch)
            epochs = -(-taken // plan.batches_per_epoch)

            def stream(plan=plan, size=size) -> Stream:
                return setup.stream(shard_set, plan, RandomResizedCrop(size))

            def pairs(epochs=epochs, stream=stream) -> Iterator[tuple[Tensor, Tensor]]:
                for batch in stream().batches(epochs=epochs):
                    yield batch.views["image"], class_numbers(shard_set, batch, label_of)

            image_N3HW, class_N = map(torch.cat, zip(*islice(pairs(), taken), strict=True))
            tensors = DataLoader(TensorDataset(image_N3HW, class_N), batch_size=batch, pin_memory=on_gpu)
            optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), base_lr=LR), lr=LR)
            stage = Stage(
                name, setup, trained=model, optimizer=optimizer, stream=stream(), steps=epochs * plan.batches_per_epoch
            )
            contenders = [
                steps_of_stage(stage, label_of),
                bare_steps(bare, pairs(), stage),
                bare_steps(bare_too, tensors, stage),
            ]
            for contender in contenders * 2:  # warm-up
                seconds(contender, per_turn)
            timed = [[seconds(contender, per_turn) for contender in contenders] for _ in range(turns * options.rounds)]
            timed_RSCT = np.array(timed).reshape(options.rounds, turns, len(contenders), 2) / per_turn
            check_same(model, bare, bare_too)
            report(f"{name} at {size}, batch {batch}", timed_RSCT)


def check_same(*models: nn.Module) -> None:
    """All contenders have trained the same network, but for rounding."""
    first, *others = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    moved = (first - others[0]).norm() / first.norm(), (first - others[1]).norm() / first.norm()
    if max(moved) > 1e-2:
        raise SystemExit(f"the contenders have trained different networks: they are {moved} apart")


def report(name: str, timed_RSCT: np.ndarray) -> None:
    """R rounds, S turns, C contenders, T = (clock, CPU)."""
    ms_C = 1000 * np.median(timed_RSCT[..., 0], axis=(0, 1))
    sum_RCT = timed_RSCT.sum(axis=1)
    ratios = [shown(sum_RCT[:, 0, kind] / sum_RCT[:, other, kind]) for other in (1, 2) for kind in (0, 1)]
    print(f"| {name} | " + " | ".join([*(f"{ms:.1f}" for ms in ms_C), *ratios]) + " |", flush=True)


# --- checkpoint


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A ViT and AdamW with moments."""
    model = ViT(Architecture(name).build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def torch_save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with path.open("wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def clocked(work: Callable[[], object]) -> float:
    gc.collect()
    os.sync()  # flush the writes of earlier turns
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def checkpoint(options: argparse.Namespace) -> None:
    """Save and load in turn; both write to the same disk, keep one file, and read what is still in the page cache."""
    accelerator = Accelerator(cpu=True)
    print(
        "| state | MB | waits s | until whole s | torch.save + fsync s | waits / that | load s | torch.load s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ["vit_tiny_patch16_224"] if options.small else ["vit_small_patch16_224", "vit_base_patch16_224"]:
        (model, optimizer), (other, others) = trained(name), trained(name)
        times = []
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            file = Path(temporary) / "state.pt"
            checkpoints = Checkpoints(Path(temporary) / "ours", accelerator, model, optimizer, keep=1)

            def resume(folder=checkpoints.folder, other=other, others=others) -> None:
                found = Checkpoints(folder, accelerator, other, others)
                found.load()
                found.load_moments(other)

            for step in range(options.rounds + 1):
                checkpoints.settle()
                turn = [clocked(lambda step=step: checkpoints.save(step, {}, model))]  # noqa: B023
                turn.append(clocked(checkpoints.settle))
                turn.append(clocked(lambda: torch_save(file, model, optimizer)))  # noqa: B023
                turn.append(clocked(resume))
                turn.append(clocked(lambda: torch_load(file, other, others)))  # noqa: B023
                times.append(turn)
            mb = file.stat().st_size / 1e6
        time_R5 = np.array(times[1:])  # the first allocates the copies
        waits, until, theirs, load, their_load = np.median(time_R5, axis=0)
        print(
            f"| {name} + AdamW | {mb:.0f} | {waits:.2f} | {waits + until:.2f} | {theirs:.2f} | "
            f"{shown(time_R5[:, 0] / time_R5[:, 2], 2)} | {load:.2f} | {their_load:.2f} | "
            f"{shown(time_R5[:, 3] / time_R5[:, 4], 2)} |",
            flush=True,
        )


# --- scaling


def started(recipe: str, out: Path, processes: int, flags: Sequence[str], top: Path = ROOT) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
    line += ["--config_file", str(top / "recipes" / "accelerate" / ("cpu2.yaml" if processes > 1 else "cpu.yaml"))]
    line += [str(top / "recipes" / recipe), "--out", str(out), *flags]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(top)}
    return subprocess.Popen(line, cwd=out.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def images_per_s(run: subprocess.Popen[bytes], out: Path, batch: int) -> float:
    """From the first row of the log to the last."""
    if run.wait():
        raise SystemExit(f"the run in {out} failed with status {run.returncode}")
    rows = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]
    return (rows[-1]["step"] - rows[0]["step"]) * batch / (rows[-1]["time"] - rows[0]["time"])


def scaling(options: argparse.Namespace) -> None:
    """One process; two that share a batch twice as large; two runs of one process at once, what the cores can do."""
    print("| network | images/s: 1 process | 2 | two runs | 2 / 1 | two runs / 1 | 2 / two runs |")
    print("|---|---|---|---|---|---|---|")
    for name, size, batch in SMALL if options.small else CASES:
        epochs = 6 if size < 224 else 3  # of 4 steps of two processes
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            build(folder / "val", 16)
            shards = build(folder, 8 * batch)
            flags = ["--train", shards, "--val", str(folder / "val" / "shards"), "--model", name, "--precision", "fp32"]
            flags += ["--image-size", str(size), "--log-every", "2"]
            found = []
            for turn in range(options.rounds):

                def begin(
                    out: str, processes: int, epochs: int, turn=turn, flags=flags, folder=folder, batch=batch
                ) -> tuple[subprocess.Popen[bytes], Path, int]:
                    whole, path = batch * processes, folder / f"{turn}-{out}"
                    more = ["--batch", str(whole), "--epochs", str(epochs)]
                    return started("pretrain.py", path, processes, [*flags, *more]), path, whole

                one = images_per_s(*begin("one", 1, epochs // 2))
                two = images_per_s(*begin("two", 2, epochs))
                at_once = [begin("left", 1, epochs // 2), begin("right", 1, epochs // 2)]
                found.append((one, two, sum(images_per_s(*run) for run in at_once)))
        one_R, two_R, runs_R = np.array(found).T
        speeds = " | ".join(f"{np.median(speed_R):.1f}" for speed_R in (one_R, two_R, runs_R))
        ratios = " | ".join(shown(r, 2) for r in (two_R / one_R, runs_R / one_R, two_R / runs_R))
        print(f"| {name} at {size}, batch {batch} a process | {speeds} | {ratios} |", flush=True)


def caches(options: argparse.Namespace) -> None:
    """Ten epochs of distillation, from the run's begin to its last step: with caches, without, and in another checkout;
    on the embedded sample, and for a ViT-S/16 at 224 pixels on generated JPEGs."""
    checkouts = [options.vs] if options.vs else []
    heads = ["network", "images/s: cached", "not", *["there"] * len(checkouts), "cached / not"]
    print("| " + " | ".join([*heads, *["cached / there"] * len(checkouts)]) + " |")
    print("|---|---|---|---|" + "---|---|" * len(checkouts))
    epochs = 3 if options.small else 10
    with tempfile.TemporaryDirectory() as temporary:
        common = ["--no-tune", "--distil-epochs", str(epochs), "--precision", options.precision, "--threads", "2"]
        shards = build(Path(temporary), 192)
        large = ["--train", shards, "--known", "one", "--teacher", "vit_small_patch16_224"]
        large += ["--no-pretrained", "--image-size", "224", "--distil-batch", "8", "--score-batch", "8"]
        cases = {
            "the preset's ViT": (16, ["--test-limit", "40"]),
            "ViT-S/16 at 224": (8, [*large, "--test-limit", "8"]),
        }
        for name, (batch, flags) in list(cases.items())[: 1 if options.small else 2]:
            found = []
            for turn in range(options.rounds):
                speeds = []
                for kind, top, room in [
                    ("with", ROOT, "16"),
                    ("none", ROOT, "0"),
                    *(("there", c, "2") for c in checkouts),
                ]:
                    out = Path(temporary) / f"{turn}-{kind}-{len(flags)}"
                    run = started("defend.py", out, 1, [*flags, *common, "--cache-gib", room], top)
                    speeds.append(images_per_s_of_all(run, out, batch))
                found.append(speeds)
            speed_CR = np.array(found).T
            ratios = [shown(speed_CR[0] / other_R, 2) for other_R in speed_CR[1:]]
            print(
                f"| {name} | " + " | ".join([*(f"{np.median(s_R):.1f}" for s_R in speed_CR), *ratios]) + " |",
                flush=True,
            )


def images_per_s_of_all(run: subprocess.Popen[bytes], out: Path, batch: int) -> float:
    """From the run's begin, before anything is computed for its cache, to the last step."""
    if run.wait():
        raise SystemExit(f"the run in {out} failed with status {run.returncode}")
    rows = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]
    return rows[-1]["step"] * batch / (rows[-1]["time"] - (out / "config.json").stat().st_mtime)


def memory(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        sharing.compare(Path(temporary), build(Path(temporary), 32), options.depth, options.processes)


PARTS = {"overhead": overhead, "checkpoint": checkpoint, "scaling": scaling, "memory": memory, "caches": caches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="checkpoint: on which disk")
    parser.add_argument("--vs", type=Path, help="caches: another checkout of this project")
    parser.add_argument("--precision", default="fp32", help="caches")
    parser.add_argument("--depth", type=int, default=16, help="memory: blocks of the ViT-L")
    parser.add_argument("--processes", type=int, default=4, help="memory: among which it is shared")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{options.part}: 1 thread a process, torch {torch.__version__}, load before {load}", flush=True)
    PARTS[options.part](options)
    print(f"load after {Path('/proc/loadavg').read_text().split()[0]}")


if __name__ == "__main__":
    main()
