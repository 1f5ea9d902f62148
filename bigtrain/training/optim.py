"""Parameter groups, schedules as functions of the step, moving averages of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bigtrain.choices import Schedule

FUSED = ("cpu", "cuda")  # devices with fused optimizers
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:patch_embed|pos_embed|cls_token|reg_token|dist_token|norm_pre)(?:\.|$)")


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, layer_decay: float = 1.0, **options: float
) -> list[dict[str, object]]:
    """Two parameter groups: matrices, which decay, and vectors (biases, norms, tokens), which do not.

    With a `layer_decay` below 1, two such groups for each layer of a ViT, whose rates fall towards the pixels, as in
    Clark et al. 2020 (ELECTRA), Bao et al. 2022 (BEiT) and He et al. 2022 (MAE):

        base_lr * layer_decay^distance
        distance: 0 after the blocks (norms, heads), depth - i for block i of 0 .. depth - 1, depth + 1 the embedding

    Args:
        named_parameters: of a ViT or a module around it, all of them: frozen ones too, which show how deep it is.
        layer_decay: above 0, at most 1.
        options: of every group, such as the `base_lr` that `set_schedule` starts from.

    Raises:
        ValueError: a layer decay out of range, or parameters without blocks to apply it to.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"a layer decay of {layer_decay} was given: use a number above 0, at most 1 (1: none).")
    at_distance: dict[int, list[nn.Parameter]] = {0: []}
    named = list(named_parameters)
    distances = _distances([name for name, _ in named]) if layer_decay < 1 else [0] * len(named)
    for (_, p), distance in zip(named, distances, strict=True):
        if p.requires_grad:
            at_distance.setdefault(distance, []).append(p)
    groups: list[dict[str, object]] = []
    for distance, parameters in sorted(at_distance.items()):
        rate = {"base_lr": options["base_lr"] * layer_decay**distance} if layer_decay < 1 else {}
        matrices = [p for p in parameters if p.squeeze().ndim > 1]
        vectors = [p for p in parameters if p.squeeze().ndim <= 1]
        groups.append({"params": matrices, "decays": True, **options, **rate})
        groups.append({"params": vectors, "decays": False, **options, **rate})
    return [group for group in groups if group["params"] or layer_decay == 1]


def adamw(
    groups: list[dict[str, object]], device: torch.device, *, lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> AdamW:
    """torch's AdamW (Loshchilov & Hutter 2019) in one fused kernel, which on a CPU takes a third of the time."""
    return AdamW(groups, lr=lr, betas=betas, fused=device.type in FUSED or None)


def sgd(module: nn.Module, device: torch.device, *, lr: float, momentum: float) -> torch.optim.SGD:
    """Momentum SGD over what learns in a module, all of which decays."""
    learns = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        [{"params": learns, "base_lr": lr, "decays": True}],
        lr=lr,
        momentum=momentum,
        fused=device.type in FUSED or None,
    )


def _distances(names: Sequence[str]) -> list[int]:
    """How many layers below its head each parameter of a ViT is."""
    blocks = [_BLOCK.search(name) for name in names]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    if not depth:
        raise ValueError("a layer decay below 1 was given for parameters without blocks.<number> in their names.")
    return [
        depth - int(block[1]) if block else (depth + 1 if _EMBEDDING.search(name) else 0)
        for name, block in zip(names, blocks, strict=True)
    ]


def scaled_lr(lr: float, global_batch: int, of_batch: int) -> float:
    """A rate that is meant for batches of `of_batch`, scaled linearly (Goyal et al. 2017); of_batch 0: as it is."""
    return lr * global_batch / of_batch if of_batch > 0 else lr


def schedule(kind: Schedule, step: int, *, total: int, warmup: int = 0) -> float:
    """A factor for the learning rate: linear from 0 over `warmup` steps, then constant or half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if kind == "constant" else cosine(step - warmup, total=total - warmup, start=1.0, end=0.0)


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def set_schedule(optimizer: torch.optim.Optimizer, *, lr_factor: float, weight_decay: float) -> None:
    """Set each group's learning rate to `base_lr` times a factor, and its weight decay where it decays."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float, taken: Tensor | bool = True) -> None:
    """Move an exponential moving average of a network's weights one step: m a + (1 - m) w.

    Args:
        taken: whether the step has changed the network, else the average stays; a tensor is not waited for.
    """
    if taken is False:
        return
    weight = (1 - momentum) * taken
    for a, w in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(w, weight)
    for kept, now in zip(average.buffers(), network.buffers(), strict=True):  # statistics of batch norm
        kept.copy_(torch.where(taken, now, kept) if isinstance(taken, Tensor) else now)
