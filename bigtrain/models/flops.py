"""What a ViT costs and what a GPU could do: the two numbers behind model FLOPs utilisation (MFU).

    MFU = the model's FLOPs in a second / the device's peak        Chowdhery et al. 2022 (PaLM), appendix B

Only matrix products count, with 2 FLOPs a multiply-add; norms, softmax, biases and activations do not. Nor does what
an implementation does twice, such as recomputed activations: MFU is about the model, not about the way it is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from bigtrain.models.architecture import check_image_size
from bigtrain.models.vit import ViT

ImageSize = int | tuple[int, int]


def vit_forward_flops(vit: ViT, image_size: ImageSize, visible: int | None = None) -> int:
    """FLOPs of one image's forward pass.

        patch embedding   2 N 3 p^2 D      for all N patches: hidden ones are dropped after it
        in each block     2 T |W|          for W of qkv, projection and MLP, |W| the numbers in it
                          2 T^2 D  twice   scores q k^T, and the mix of v by them; D = heads x width of a head

    with T = prefix tokens + visible patches; in decoder blocks, all patches. ViT-B/16 at 224: N = 196, T = 197,
    D = 768, 12 blocks: 35.1e9.
    A pass over several views is the sum of them. The attention that guides a mask is not counted. Of a network whose
    blocks are not packed (models/families.py) the FLOPs are those that torch counts.

    Args:
        vit: its modules give the numbers.
        image_size: the side of the image, or (height, width).
        visible: how many patches are seen; None: all.
    """
    return _flops(vit, image_size, visible)[0]


def trained_flops(vit: ViT, image_size: ImageSize, visible: int | None = None) -> int:
    """FLOPs of one image's forward and backward pass, by what of the network learns (`requires_grad`).

    Backward, a product x W of F FLOPs costs F for the gradient of W, if W learns, and F for that of x, if anything
    before it learns; a product of attention, whose factors are both computed, costs 2 F if anything before it learns.
    So forward and backward cost together

        everything learns    3 x forward - patch embedding: the pixels need no gradient
        the last k blocks    forward + 2 x these blocks: those below the first that learns cost nothing backward
        nothing              forward

    ViT-B/16 at 224: 105.1e9, where 3 x forward would be 105.4e9.
    """
    return sum(_flops(vit, image_size, visible))


def _flops(vit: ViT, image_size: ImageSize, visible: int | None) -> tuple[int, int]:
    """Forward, and backward: one walk through the modules, which timm registers in the order of their use."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_image_size((height, width), vit.patch_size)
    if not vit.is_packed:
        return _counted(vit, (height, width), visible)
    net: Any = vit.backbone
    patches = height // vit.patch_size * (width // vit.patch_size)
    if visible is not None and not 0 <= visible <= patches:
        raise ValueError(f"{visible} visible patches were given, of {patches} in {height} x {width} pixels.")
    seen = net.num_prefix_tokens + (patches if visible is None else visible)

    weight = net.patch_embed.proj.weight
    forward = 2 * patches * weight.numel()
    backward = forward * weight.requires_grad
    behind = ("blocks.", "norm.", "fc_norm.")
    # whether a gradient is asked of what enters a module, as something before it learns
    gradient = any(p.requires_grad for name, p in net.named_parameters() if not name.startswith(behind))
    for depth, block in enumerate(net.blocks):
        is_decoder = depth >= len(net.blocks) - vit.decoder_blocks
        tokens = net.num_prefix_tokens + patches if is_decoder else seen
        for module in block.modules():
            if module is block.attn.attn_drop:  # between q k^T and its product with v
                attention = 2 * 2 * tokens**2 * block.attn.attn_dim
                forward += attention
                backward += attention * 2 * gradient
            if isinstance(module, nn.Linear):
                product = 2 * tokens * module.weight.numel()
                forward += product
                backward += product * (gradient + module.weight.requires_grad)
            gradient |= any(p.requires_grad for p in module.parameters(recurse=False))
    return forward, backward


def _counted(vit: ViT, size: tuple[int, int], visible: int | None) -> tuple[int, int]:
    """Forward as torch counts it; backward by the share of the blocks from the first that learns."""
    patches = size[0] // vit.patch_size * (size[1] // vit.patch_size)
    seen_1N = None if visible in (None, patches) else (torch.arange(patches) < visible)[None]
    image_13HW = torch.zeros(1, 3, *size)
    forward = _counted_flops(vit, lambda: vit(image_13HW.to(next(vit.parameters()).device), visible_BN=seen_1N))
    learns = [any(p.requires_grad for p in block.parameters()) for block in vit.backbone.blocks]
    share = 1 - learns.index(True) / len(learns) if any(learns) else 0.0
    return forward, round(2 * forward * share)


def counted_flops(module: nn.Module, image_size: int) -> int:
    """FLOPs of one image's forward pass through any network, 2 for a multiply-add, as torch counts them."""
    image_13HW = torch.zeros(1, 3, image_size, image_size, device=next(module.parameters()).device)
    return _counted_flops(module, lambda: module(image_13HW))


def _counted_flops(module: nn.Module, run: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    was_training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    module.train(was_training)
    return counter.get_total_flops()


_PEAK_TFLOPS: dict[str, tuple[float | None, float | None, float | None, float | None]] = {
    # torch.cuda.get_device_name without the vendor: fp32, tf32, bf16, fp16
    r"V100-SXM2-\d+GB": (15.7, None, None, 125),
    r"V100-PCIE-\d+GB": (14, None, None, 112),
    r"T4": (8.1, None, None, 65),
    r"A10G": (35, 35, 70, 70),
    r"A100-(SXM4|PCIE)-\d+GB|A100-SXM-80GB|A100 80GB PCIe": (19.5, 156, 312, 312),
    r"L4": (30.3, 60, 121, 121),
    r"L40S": (91.6, 183, 362, 362),
    r"GeForce RTX 3090": (35.6, 35.6, 71, 71),
    r"GeForce RTX 4090": (82.6, 82.6, 165.2, 165.2),
    r"RTX A6000": (38.7, 77.4, 154.8, 154.8),
    r"H100 80GB HBM3|H200|GH200 (120GB|480GB|144G HBM3e)": (67, 494.5, 989.5, 989.5),
    r"H100 PCIe": (51, 378, 756.5, 756.5),
    r"H100 NVL|H200 NVL": (60, 417.5, 835.5, 835.5),
    r"B200": (75, 1100, 2250, 2250),
}


def peak_flops(device_name: str, precision: Literal["fp32", "tf32", "bf16", "fp16"]) -> float | None:
    """The dense peak of an NVIDIA GPU in FLOPs a second, by its torch.cuda.get_device_name; None if it is not known.

    From NVIDIA's papers, where they give figures "with sparsity", half of these: the datasheets of V100 (2020), T4,
    A10G (for AWS), A100, L4, L40S, H100 (SXM, PCIe and NVL), H200, GH200 and HGX B200; the whitepapers of GA102
    (RTX 3090 and A6000) and Ada (RTX 4090). bf16 and fp16 multiply in tensor cores and add in float32, which halves
    the rate of GeForce cards. fp32 is without tensor cores, tf32 is what `torch.backends.cuda.matmul.allow_tf32`
    makes of float32. V100 and T4 have neither tf32 nor bf16. A variant that is not in the table (laptops, Ti, a
    slice of a GPU) is unknown.
    """
    short = re.sub(r"^(NVIDIA |Tesla )", "", device_name)
    for pattern, (fp32, tf32, bf16, fp16) in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, short):
            tflops = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}[precision]
            return None if tflops is None else tflops * 1e12
    return None
