"""What a training step reaches: images/s and share of the device's own matrix rate, beside plain loops of timm parts.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --device cpu|cuda [--models vit_small_patch16_224] [--rounds 5]

Five steps: supervised training, masked distillation with the teacher computed and from its cache, dense tuning,
scoring. Contenders take turns in one process; figures are medians, ratios those of each turn, with least and most. MFU
is of the rate that a large matrix product reaches here, measured first. "host" is the share of a step in which this
process launches, measured where the device has nothing queued (on a CPU it is all). Losses of ours and of the plain
loop are compared over three steps from the same weights, with the same masks and without drops.

--parts: each part of a distillation step alone. --ablation: our gains switched off one at a time. --stream: the same
from shards, with workers, with and without the view cache. --small: a smoke test, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from bigtrain.data.row_cache import RowCache
from bigtrain.methods.defend.equations import distillation_loss, multi_crop_loss
from bigtrain.methods.defend.masks import visible_count, visible_patches
from bigtrain.methods.defend.network import DenseTuner, masked_student, unit_rows
from bigtrain.models.architecture import Architecture
from bigtrain.models.classifier import Classifier
from bigtrain.models.flops import trained_flops, vit_forward_flops
from bigtrain.models.network import normalised
from bigtrain.models.vit import Encoded, ViT
from bigtrain.objectives.sinkhorn import sinkhorn
from bigtrain.objectives.token_distances import patch_distance
from bigtrain.runtime.start import add_in_fixed_order
from bigtrain.training.compiling import prepare_compiling
from bigtrain.training.optim import adamw, decay_groups
from bigtrain.training.teacher_tokens import MOST_THREADS
from bigtrain.training.token_rows import TokenRows
from bigtrain.training.update import Update

MEAN = STD = (0.5, 0.5, 0.5)
CROPS, CROP, PROTOTYPES, TUNED = 4, 96, 160, 2
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class How:
    """What of our gains is on."""

    compiled: bool
    fused: bool = True
    waits: bool = False  # for the device, in each step
    attention: Any = "auto"
    frozen_once: bool = True
    deterministic: bool = True


class Bench:
    """One network at one size, and the steps that are timed."""

    def __init__(self, options: argparse.Namespace, model: str) -> None:
        self.device, self.batch, self.size = torch.device(options.device), options.batch, options.size
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.architecture = Architecture(model, options.size)
        self.rng, self.folder = np.random.default_rng(0), tempfile.mkdtemp()
        shape = (self.batch, 3, self.size, self.size)
        self.image = self.pinned(self.rng.integers(0, 256, shape, dtype=np.uint8))
        self.crops = self.pinned(self.rng.integers(0, 256, (self.batch, CROPS, 3, CROP, CROP), dtype=np.uint8))
        top_left = self.rng.integers(0, self.size // 2, (self.batch, CROPS, 2))
        self.boxes = self.pinned(np.concatenate([top_left, top_left + self.size // 2], axis=2).astype(np.float32))
        self.seed, self.class_B = torch.arange(self.batch).to(self.device), torch.zeros(self.batch).long()
        torch.manual_seed(0)
        self.teacher = ViT(self.architecture.build()).to(self.device).eval().requires_grad_(False)
        self.patches = self.teacher.grid_size[0] ** 2
        self.visible = visible_count(self.patches, 0.5)

    def pinned(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def pixels(self, tensor: Tensor) -> Tensor:
        return normalised(tensor.to(self.device, non_blocking=True), MEAN, STD)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def optimizer(self, module: nn.Module, fused: bool) -> torch.optim.Optimizer:
        groups = decay_groups(module.named_parameters(), base_lr=1e-4)
        return adamw(groups, self.device, lr=1e-4) if fused else torch.optim.AdamW(groups, lr=1e-4)

    def ended(self, module: nn.Module, how: How) -> Callable[[Tensor], Tensor]:
        """Backward and update, as a stage does it."""
        update = Update(self.accelerator, module, self.optimizer(module, how.fused))

        def end(loss: Tensor) -> Tensor:
            update.backward(loss)
            problem = update.take().problem
            if how.waits:
                int(problem)
            return loss.detach()

        return end

    def plainly_ended(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

        def end(loss: Tensor) -> Tensor:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return end

    def student(self, attention: Any = "auto") -> ViT:
        torch.manual_seed(1)
        return masked_student(self.architecture, drop_path=0.0, attention=attention).to(self.device).train()

    # --- ours, as the recipes do it

    def supervised(self, how: How) -> Step:
        model = Classifier(self.student(how.attention).requires_grad_(True), 10, "token").to(self.device)
        end, class_B = self.ended(model, how), self.class_B.to(self.device)
        if how.compiled:
            model.compile(dynamic=False)

        def step() -> Tensor:
            with self.autocast():
                logits_BC = model(self.pixels(self.image))
            return end(F.cross_entropy(logits_BC.float(), class_B))

        return step

    def distilled(self, how: How, *, cached: bool) -> Step:
        teacher, student = copy.deepcopy(self.teacher), self.student(how.attention)
        teacher.attention_backend = how.attention
        end, encode, rows = self.ended(student, how), teacher, None
        if how.compiled:
            student.compile(dynamic=False)
            encode = torch.compile(teacher, dynamic=False)
        if cached:
            kept = TokenRows("fp32" if self.dtype is torch.float32 else "bf16", 1, self.patches, teacher.width, True)
            row_B = kept.pack(self.seen(teacher, self.pixels(self.image))).cpu().numpy()
            rows = RowCache(Path(self.folder), "tokens", {}, rows=self.batch, row_bytes=kept.row_bytes)
            rows.prepare(is_own=True)
            for place in range(self.batch):
                rows.write(place, row_B[place])
            threads = ThreadPoolExecutor(MOST_THREADS)

        def step() -> Tensor:
            image_B3HW = self.pixels(self.image)
            if rows is not None:
                row = torch.empty(self.batch, kept.row_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                assert all(list(threads.map(rows.read, range(self.batch), row.numpy())))
                seen = kept.unpack(row.to(self.device, non_blocking=True))
            else:
                seen = self.seen(encode, image_B3HW)
            visible_BN = visible_patches(seen.guide_BN, self.seed)
            with self.autocast():
                (predicted,) = student(image_B3HW, visible_BN=visible_BN, visible_count=self.visible)
            return end(distillation_loss(predicted.blocks_LBND, seen.blocks_LBND, visible_BN).mean())

        return step

    @torch.no_grad()
    def seen(self, teacher: Any, image_B3HW: Tensor) -> Encoded:
        with self.autocast():
            return teacher(image_B3HW, with_attention=True)[0]

    def tuned(self, how: How) -> Step:
        tuner = self.tuner(how.attention)
        end = self.ended(tuner, how)
        if how.compiled:
            tuner.compile(dynamic=False)
        boxes, grid = self.boxes.to(self.device), self.teacher.grid_size

        def step() -> Tensor:
            image_B3HW, crop_RB3hw = self.pixels(self.image), self.pixels(self.crops.flatten(0, 1))
            with self.autocast():
                if how.frozen_once:
                    with torch.no_grad():
                        begun = tuner(image_B3HW, crop_RB3hw, frozen=True)
                    image, crops = begun.only(slice(0, 1)), begun.only(slice(1, None))
                else:
                    image, crops = image_B3HW, crop_RB3hw
                with torch.no_grad():
                    _, (scores_BNK,) = tuner(image)
                q_BhwK = sinkhorn(scores_BNK.flatten(0, 1).float()).unflatten(0, (self.batch, *grid))
                _, cosines = tuner(crops)
            shape = self.crops  # (B, V, 3, h, w)
            loss_B = multi_crop_loss(cosines, q_BhwK, [shape], [boxes], patch_size=self.teacher.patch_size)
            end(loss_B.mean())
            with torch.no_grad():
                tuner.prototypes.weight_KD.copy_(unit_rows(tuner.prototypes.weight_KD))
            return loss_B.mean().detach()

        return step

    def tuner(self, attention: Any = "auto") -> DenseTuner:
        torch.manual_seed(2)
        vit = copy.deepcopy(self.teacher)
        vit.attention_backend = attention
        return DenseTuner(vit, PROTOTYPES, TUNED).to(self.device)

    def scored(self, how: How) -> Step:
        student = self.student(how.attention).eval()

        @torch.no_grad()
        def step() -> Tensor:
            image_B3HW = self.pixels(self.image)
            with self.autocast():
                (given,), (found,) = self.teacher(image_B3HW), student(image_B3HW)
            return patch_distance(found.blocks_LBND, given.blocks_LBND).mean()

        return step

    # --- plain loops of timm parts

    def plain_supervised(self) -> Step:
        net, head = self.student().backbone, nn.Linear(self.teacher.width, 10).to(self.device)
        head.load_state_dict(Classifier(self.student(), 10, "token").head.state_dict())
        end, class_B = self.plainly_ended(nn.ModuleList([net, head])), self.class_B.to(self.device)

        def step() -> Tensor:
            with self.autocast():
                logits_BC = head(net.forward_features(self.pixels(self.image))[:, 0])
            return end(F.cross_entropy(logits_BC.float(), class_B))

        return step

    def plain_distilled(self) -> Step:
        teacher, net = copy.deepcopy(self.teacher.backbone), self.student().backbone
        end, prefix = self.plainly_ended(net), net.num_prefix_tokens

        def attention_of_class(block: Any, x_BTD: Tensor) -> Tensor:
            qkv = block.attn.qkv(block.norm1(x_BTD)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = qkv[0][:, :, :1] @ qkv[1].transpose(-1, -2) * block.attn.scale
            return logits.float().softmax(-1).mean(1)[:, 0, prefix:]

        def step() -> Tensor:
            image_B3HW = self.pixels(self.image)
            with torch.no_grad(), self.autocast():
                x_BTD = teacher._pos_embed(teacher.patch_embed(image_B3HW))
                for block in teacher.blocks[:-1]:
                    x_BTD = block(x_BTD)
                attention_BN = attention_of_class(teacher.blocks[-1], x_BTD)
                target_BND = teacher.norm(teacher.blocks[-1](x_BTD))[:, prefix:]
            visible_BN = visible_patches(attention_BN, self.seed)
            with self.autocast():
                x_BTD = net._pos_embed(net.patch_embed(image_B3HW))
                seen_BnD = x_BTD[:, prefix:][visible_BN].unflatten(0, (self.batch, -1))
                x_BTD = net.norm(net.blocks(torch.cat([x_BTD[:, :prefix], seen_BnD], 1)))[:, prefix:]
            target_BnD = target_BND[visible_BN].unflatten(0, (self.batch, -1))
            difference = F.normalize(target_BnD.float(), dim=-1) - F.normalize(x_BTD.float(), dim=-1)
            return end(difference.square().sum(-1).mean())

        return step

    def plain_tuned(self, *, all_in_graph: bool) -> Step:
        """(A) frozen blocks without a graph, the image and its crops in passes of their own; (B) all blocks in it."""
        tuner = self.tuner()
        net, head, prototypes = tuner.vit.backbone, tuner.head, tuner.prototypes
        net.requires_grad_(all_in_graph)
        net.pos_embed.requires_grad_(False)  # resampling it has no deterministic backward pass on a GPU
        net.blocks[-TUNED:].requires_grad_(True)
        end, prefix = self.plainly_ended(tuner), net.num_prefix_tokens
        boxes, grid = self.boxes.to(self.device), self.teacher.grid_size

        def step() -> Tensor:
            with self.autocast():
                with torch.no_grad():
                    scores_BNK = prototypes(head(net.forward_features(self.pixels(self.image))[:, prefix:]))
                q_BhwK = sinkhorn(scores_BNK.flatten(0, 1).float()).unflatten(0, (self.batch, *grid))
                cosines = prototypes(head(net.forward_features(self.pixels(self.crops.flatten(0, 1)))[:, prefix:]))
            loss_B = multi_crop_loss([cosines], q_BhwK, [self.crops], [boxes], patch_size=self.teacher.patch_size)
            end(loss_B.mean())
            with torch.no_grad():
                prototypes.weight_KD.copy_(unit_rows(prototypes.weight_KD))
            return loss_B.mean().detach()

        return step

    def plain_scored(self) -> Step:
        """The bare forward passes, of pictures that are on the device."""
        teacher, net, image_B3HW = self.teacher.backbone, self.student().eval().backbone, self.pixels(self.image)

        @torch.no_grad()
        def step() -> Tensor:
            with self.autocast():
                given, found = teacher.forward_features(image_B3HW), net.forward_features(image_B3HW)
            return (
                (F.normalize(given.float(), dim=-1) - F.normalize(found.float(), dim=-1))[:, 1:].square().sum(-1).mean()
            )

        return step

    def flops(self) -> dict[str, float]:
        """Of an image, in each kind of step."""
        whole, student = vit_forward_flops(self.teacher, self.size), self.student()
        tuner = self.tuner()
        masked = trained_flops(student, self.size, self.visible)
        tuned = whole + CROPS * trained_flops(tuner.vit, CROP)
        head = sum(p.numel() for p in tuner.head.parameters() if p.ndim == 2) * 2
        tuned += head * (self.patches + 3 * CROPS * (CROP // self.teacher.patch_size) ** 2)
        return {
            "supervised": trained_flops(student.requires_grad_(True), self.size), "distillation": whole + masked,
            "distillation, tokens cached": masked, "dense tuning": tuned, "scoring": 2 * whole,
        }  # fmt: skip


def seconds(step: Step, device: torch.device, steps: int) -> tuple[float, float]:
    """A step's, and of it the share in which the host launches; measured at the first step, before a queue is full."""
    begin = time.perf_counter()
    step()
    host = time.perf_counter() - begin
    for _ in range(steps - 1):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    whole = (time.perf_counter() - begin) / steps
    return whole, min(1.0, host / whole)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large product of random numbers."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device, 5)[0] for _ in range(6)]
    return 2 * side**3 / statistics.median(times[1:])


def shown(values: list[float], digits: int = 2) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} .. {ordered[-1]:.{digits}f})"


def in_turn(bench: Bench, steps: dict[str, Step], rounds: int, per_turn: int) -> dict[str, list[tuple[float, float]]]:
    for step in steps.values():
        seconds(step, bench.device, per_turn)  # warm-up
    turns = [{name: seconds(step, bench.device, per_turn) for name, step in steps.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in steps}


def loss_difference(ours: Step, plain: Step) -> float:
    """Largest relative difference over three steps from the same weights."""
    return max(abs(float(ours()) / float(plain()) - 1) for _ in range(3))


def compare(bench: Bench, how: How, rate: float, options: argparse.Namespace) -> None:
    cases: dict[str, tuple[Callable[[], Step], dict[str, Callable[[], Step]]]] = {
        "supervised": (lambda: bench.supervised(how), {"plain": bench.plain_supervised}),
        "distillation": (lambda: bench.distilled(how, cached=False), {"plain": bench.plain_distilled}),
        "distillation, tokens cached": (
            lambda: bench.distilled(how, cached=True), {"plain, teacher computed": bench.plain_distilled}),
        "dense tuning": (lambda: bench.tuned(how), {
            "plain A": lambda: bench.plain_tuned(all_in_graph=False),
            "plain B": lambda: bench.plain_tuned(all_in_graph=True)}),
        "scoring": (lambda: bench.scored(how), {"plain forward": bench.plain_scored}),
    }  # fmt: skip
    for name, (ours, plains) in cases.items():
        if options.only and name not in options.only:
            continue
        differs = loss_difference(ours(), next(iter(plains.values()))())
        found = in_turn(
            bench, {"ours": ours(), **{key: make() for key, make in plains.items()}}, options.rounds, options.turn
        )
        own, host = zip(*found["ours"], strict=True)
        speed = bench.batch / statistics.median(own)
        mfu = 100 * speed * bench.flops()[name] / rate
        ratios = "; ".join(
            f"{key} {shown([other / mine for (other, _), mine in zip(found[key], own, strict=True)])}" for key in plains
        )
        busy = f"{100 * statistics.median(host):.0f} %"
        cells = [name, f"{speed:.1f}", f"{mfu:.0f} %", busy, ratios, f"{differs:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def ablation(bench: Bench, how: How, options: argparse.Namespace) -> None:
    """Our gains off, one at a time."""
    print("| step | without | speed, of that with all gains |\n|---|---|---|")
    makers: dict[str, Callable[[How], Step]] = {
        "distillation": lambda h: bench.distilled(h, cached=False), "dense tuning": bench.tuned,
    }  # fmt: skip
    off = {"the fused optimizer": {"fused": False}, "frozen blocks once": {"frozen_once": False}}
    if bench.device.type == "cuda":
        off |= {
            "torch.compile": {"compiled": False}, "steps that do not wait": {"waits": True},
            "SDPA (xformers instead)": {"attention": "xformers", "compiled": False},
            "determinism (--no-deterministic)": {"deterministic": False},
        }  # fmt: skip
    for name, make in makers.items():
        for what, change in off.items():
            if "frozen_once" in change and name != "dense tuning":
                continue
            other = replace(how, **change)
            steps = {"all": make(how), "without": make(other)}
            if not other.deterministic:
                steps["without"] = freely(steps["without"])
            try:
                found = in_turn(bench, steps, options.rounds, options.turn)
            except (RuntimeError, ValueError) as error:
                print(f"| {name} | {what} | not here: {str(error).splitlines()[0][:100]} |")
                continue
            ratios = [a / b for (a, _), (b, _) in zip(found["all"], found["without"], strict=True)]
            print(f"| {name} | {what} | {shown(ratios)} |", flush=True)


def freely(step: Step) -> Step:
    """A step with kernels that may add up in any order."""

    def run() -> Tensor:
        torch.use_deterministic_algorithms(False)
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(True)

    return run


def parts(bench: Bench, how: How, options: argparse.Namespace) -> None:
    """Each part of a distillation step alone."""
    student, image_B3HW = bench.student(), bench.pixels(bench.image)
    seen = bench.seen(bench.teacher, image_B3HW)
    visible_BN = visible_patches(seen.guide_BN, bench.seed)
    end = bench.ended(student, how)
    with bench.autocast():
        (predicted,) = student(image_B3HW, visible_BN=visible_BN, visible_count=bench.visible)
    predicted_LBND = predicted.blocks_LBND.detach()

    def student_alone(visible: Tensor | None = visible_BN, count: int | None = bench.visible) -> Tensor:
        with bench.autocast():
            (found,) = student(image_B3HW, visible_BN=visible, visible_count=count)
        loss = found.tokens_BND.float().square().mean()
        loss.backward()
        student.zero_grad()
        return loss.detach()

    def optimizer_alone() -> Tensor:
        return end(sum(p.sum() for p in student.parameters() if p.requires_grad) * 0.0)  # type: ignore[operator]

    works: dict[str, Step] = {
        "copy and normalise": lambda: bench.pixels(bench.image),
        "teacher": lambda: bench.seen(bench.teacher, image_B3HW).tokens_BND,
        "mask": lambda: visible_patches(seen.guide_BN, bench.seed),
        "student, half of the patches, forward and backward": student_alone,
        "student, all patches": lambda: student_alone(None, None),
        "loss": lambda: distillation_loss(predicted_LBND, seen.blocks_LBND, visible_BN),
        "gradient's norm and optimizer": optimizer_alone,
    }
    found = in_turn(bench, works, options.rounds, options.turn)
    print("| part alone, not compiled | ms |\n|---|---|")
    for name, times in found.items():
        print(f"| {name} | {shown([1000 * s for s, _ in times], 1)} |", flush=True)
    half, whole = (kept_mb(student, work) for work in (student_alone, lambda: student_alone(None, None)))
    print(f"activations kept for the backward pass: half {half:.0f} MB, all {whole:.0f} MB, {half / whole:.2f}")


def kept_mb(network: nn.Module, work: Step) -> float:
    """What autograd keeps, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values()) / 1e6


def streamed(bench: Bench, how: How, options: argparse.Namespace) -> None:
    """Distillation from shards: epochs without the view cache, then with it."""
    from training import build

    from bigtrain.data.shard_set import ShardSet
    from bigtrain.data.stream import Stream
    from bigtrain.data.views import Resized

    print("| distillation from shards | images/s | waits for data |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        shard_set = ShardSet(build(Path(temporary), 4 * bench.batch * (8 if bench.device.type == "cuda" else 1)))
        plan = shard_set.plan(np.arange(len(shard_set)), bench.batch, seed=0)
        cache = RowCache(Path(temporary), "views", {}, rows=len(shard_set), row_bytes=3 * bench.size**2)
        cache.prepare(is_own=True)
        step = bench.distilled(how, cached=False)
        seconds(step, bench.device, 3)
        turns = {"decoded in each epoch": (None, 2), "first epoch with the cache": (cache, 1), "later ones": (cache, 2)}
        for name, (kept, epochs) in turns.items():
            waited, began = 0.0, time.perf_counter()
            stream = Stream(shard_set, plan, Resized(bench.size), workers=options.workers, cache=kept)
            for batch in stream.batches(epochs=epochs):
                waited += batch.wait_s
                bench.image = batch.views["image"]
                step()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            print(f"| {name} | {epochs * len(shard_set) / took:.1f} | {100 * waited / took:.0f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"])
    parser.add_argument("--only", nargs="+", help="of the steps, by name")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, help="steps of a turn")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name in ("parts", "ablation", "stream", "small"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch = options.batch or (128 if on_gpu else 8)
    options.turn = options.turn or (10 if on_gpu else 1)
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    if options.small:
        options.models, options.rounds, options.batch, options.turn = ["vit_tiny_patch16_224"], 1, 2, 1
    torch.set_num_threads(options.threads)
    how = How(compiled=on_gpu if options.compile is None else options.compile)
    if how.compiled:
        prepare_compiling("on")
    if on_gpu:
        add_in_fixed_order()
    device, dtype = torch.device(options.device), {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    rate = matrix_rate(device, dtype)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} thread(s)"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{name}, {options.precision}, {versions}; matrix products reach {rate / 1e12:.2f} TFLOP/s")
    for model in options.models:
        bench = Bench(options, model)
        print(f"\n{model} at {options.size}, batch {options.batch}{', compiled' if how.compiled else ''}\n")
        print("| step | images/s | MFU | host | ours is so many times faster than | losses differ by |")
        print("|---|---|---|---|---|---|")
        compare(bench, how, rate, options)
        for part, wanted in ((parts, options.parts), (ablation, options.ablation), (streamed, options.stream)):
            if wanted:
                print()
                part(bench, how, options)


if __name__ == "__main__":
    main()
