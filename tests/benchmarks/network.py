"""What masking, packing and precision cost or save: pairs timed in turn in one process, reported as ratios.

python tests/benchmarks/network.py [--model vit_small_patch16_224] [--batch 8] [--rounds 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bigtrain.methods.defend.network import masked_student
from bigtrain.models.architecture import Architecture
from bigtrain.models.vit import ViT
from bigtrain.runtime.start import add_in_fixed_order

TINY = Architecture("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=6)
NATURAL = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def seconds(work: Callable[[], torch.Tensor]) -> float:
    begin = time.perf_counter()
    value = work()
    if value.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratio(name: str, one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor], rounds: int) -> None:
    """Time both in turn, after a warm-up, and print the ratio of each pair: median, least and most."""
    one(), other()
    pairs = [(seconds(one), seconds(other)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    ms = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
    print(f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} | {spread} |")


def step(vit: ViT, *views: torch.Tensor, dtype: torch.dtype = NATURAL, **options: object) -> torch.Tensor:
    """A forward and a backward pass."""
    vit.zero_grad()
    with torch.autocast(views[0].device.type, dtype, enabled=dtype is not torch.float32):
        loss = sum(encoded.tokens_BND.float().square().mean() for encoded in vit(*views, **options))
    loss.backward()
    return loss.detach()


def fixed(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Work with deterministic kernels."""
    add_in_fixed_order()
    try:
        return work()
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.cuda.get_device_name() + ", bf16" if device.type == "cuda" else "cpu, fp32"
    where = f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.model}, batch {options.batch}, {where}")
    print("| pair (a / b) | a ms | b ms | ratio a / b |\n|---|---|---|---|")

    student = masked_student(Architecture(options.model), drop_path=0).to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    patches = (224 // student.patch_size) ** 2
    half = torch.zeros(options.batch, patches, dtype=torch.bool, device=device)
    half[:, ::2] = True
    ratio(
        "student step: half of the patches / all",
        lambda: step(student, images, visible_BN=half),
        lambda: step(student, images),
        options.rounds,
    )
    for blocks in (1, 2):
        completing = masked_student(Architecture(options.model), drop_path=0, decoder_blocks=blocks).to(device)
        ratio(
            f"student step: half of the patches, the hidden ones predicted by {blocks} of its blocks / all",
            lambda vit=completing: step(vit, images, visible_BN=half),
            lambda: step(student, images),
            options.rounds,
        )
    crops = torch.randn(4 * options.batch, 3, 96, 96, device=device)
    ratio(
        "multi-crop step: one packed pass / two passes",
        lambda: step(student, images, crops),
        lambda: step(student, images) + step(student, crops),
        options.rounds,
    )
    by_sdpa = masked_student(Architecture(options.model), drop_path=0, attention="sdpa").to(device)
    tiny = masked_student(TINY, drop_path=0).to(device)
    small_images = torch.randn(64, 3, 32, 32, device=device)
    for name, vit, views in (
        (options.model, student, images),
        ("the preset's 2.7 M ViT, batch 64", tiny, small_images),
    ):
        ratio(
            f"{name}: bf16 / fp32",
            lambda vit=vit, views=views: step(vit, views, dtype=torch.bfloat16),
            lambda vit=vit, views=views: step(vit, views, dtype=torch.float32),
            options.rounds,
        )
    if device.type == "cuda":
        for name, views in (("student step", (images,)), ("multi-crop step", (images, crops))):
            ratio(
                f"{name}: attention by xformers / sdpa",
                lambda views=views: step(student, *views),
                lambda views=views: step(by_sdpa, *views),
                options.rounds,
            )
            for attention, vit in (("xformers", student), ("sdpa", by_sdpa)):
                ratio(
                    f"{name}, {attention}: deterministic / not",
                    lambda vit=vit, views=views: fixed(lambda: step(vit, *views)),
                    lambda vit=vit, views=views: step(vit, *views),
                    options.rounds,
                )


if __name__ == "__main__":
    main()
