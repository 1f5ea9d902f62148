"""Our FLOPs are those that PyTorch counts in real passes; peaks are those of the datasheets."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bigtrain.methods.defend.network import masked_student
from bigtrain.models.architecture import Architecture
from bigtrain.models.flops import trained_flops, vit_forward_flops
from bigtrain.models.vit import ViT

NINE = Architecture("vit_small_patch14_dinov2", 112, 14, 9)
PASSES = [  # architecture, image (height, width), patches that are seen
    (Architecture("vit_tiny_patch16_224", 32, 8, 3), (32, 32), None),
    (Architecture("vit_tiny_patch16_224", 32, 8, 3), (48, 32), 7),
    (Architecture("vit_small_patch14_reg4_dinov2", 28, 14, 2), (56, 42), 5),  # registers, layer scale
    (Architecture("vit_giant_patch14_reg4_dinov2", 28, 14, 1), (28, 28), None),  # SwiGLU, packed
    (Architecture("aimv2_large_patch14_224", 28, 14, 1), (28, 28), None),  # SwiGLU, in three matrices; no [CLS]
    (Architecture("vit_medium_patch16_gap_240", 32, 16, 2), (32, 64), 3),  # no prefix at all
    (Architecture("vit_xsmall_patch16_clip_224", 32, 16, 2), (32, 32), None),  # a norm before the blocks
    (Architecture("deit_tiny_distilled_patch16_224", 32, 16, 2), (32, 32), 2),
]
CPU_SDPA = {  # which the counter does not know by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


def counted(vit, size, visible=None, *, backward=False, images=1, kernel=SDPBackend.MATH):
    """What PyTorch counts in a pass over random images."""
    patches = size[0] // vit.patch_size * (size[1] // vit.patch_size)
    visible_BN = None
    if visible is not None:
        visible_BN = (torch.arange(patches) < visible).expand(images, -1)
    image_B3HW = torch.randn(images, 3, *size)
    with sdpa_kernel(kernel), FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
        (encoded,) = vit(image_B3HW, visible_BN=visible_BN)
        if backward and encoded.tokens_BND.requires_grad:
            encoded.tokens_BND.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("architecture", "size", "visible"), PASSES)
def test_flops_equal_pytorch(architecture, size, visible):
    """Forward and training FLOPs are those that PyTorch counts."""
    vit = ViT(architecture.build())
    assert vit_forward_flops(vit, size, visible) == counted(vit, size, visible)
    assert trained_flops(vit, size, visible) == counted(vit, size, visible, backward=True)
    assert counted(vit, size, visible, images=2) == 2 * vit_forward_flops(vit, size, visible)


@pytest.mark.parametrize("decoder_blocks", [1, 2])
def test_decoder_flops(decoder_blocks):
    """Hidden patches cost in the decoder's blocks alone, as PyTorch counts."""
    vit = masked_student(Architecture("vit_tiny_patch16_224", 32, 8, 3), drop_path=0, decoder_blocks=decoder_blocks)
    assert trained_flops(vit, 32, 8) == counted(vit, (32, 32), 8, backward=True)


@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "vit_small_patch16_224", NINE], ids=str)
def test_a_masked_step_is_cheap(architecture):
    """A student's step with half of the patches hidden, and completed by its last block, costs below 0.6 of one that
    sees all, at the paper's sizes and with nine blocks (the preset's six: 0.61)."""
    given = Architecture(architecture) if isinstance(architecture, str) else architecture
    with torch.device("meta"):
        student = masked_student(given, decoder_blocks=1)
    size, patches = given.image_size or 224, math.prod(student.backbone.patch_embed.grid_size)
    assert trained_flops(student, size, patches // 2) < 0.6 * trained_flops(student, size)


@pytest.mark.parametrize("tuned", [0, 1, 2, 4])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_frozen_blocks(model, tuned):
    """Blocks below the first that learns cost nothing in the backward pass."""
    vit = ViT(Architecture(model, 28, 14, 4).build()).requires_grad_(False)
    vit.backbone.blocks[4 - tuned :].requires_grad_(True)
    expected = counted(vit, (28, 28), backward=True)
    assert trained_flops(vit, 28) == expected
    blocks = (vit_forward_flops(vit, 28) - 2 * 4 * vit.backbone.patch_embed.proj.weight.numel()) // 4
    assert expected == vit_forward_flops(vit, 28) + 2 * tuned * blocks


@pytest.mark.parametrize(
    "learns",
    [
        "patch_embed",
        "pos_embed",
        "cls_token",
        "blocks.1.attn.proj",
        "blocks.0.norm2",
        "blocks.1.attn.qkv.bias",
        "norm.",
    ],
)
def test_single_trainable(learns):
    """A network of which one part alone learns costs what PyTorch counts."""
    vit = ViT(PASSES[0][0].build()).requires_grad_(False)
    for name, parameter in vit.backbone.named_parameters():
        parameter.requires_grad_(name.startswith(learns))
    assert trained_flops(vit, 32) == counted(vit, (32, 32), backward=True)


def test_masked_student():
    """A masked student with fixed positions costs what PyTorch counts."""
    student = masked_student(PASSES[0][0])
    assert trained_flops(student, 32, 8) == counted(student.eval(), (32, 32), 8, backward=True)


def test_fused_attention():
    """The scores that fused attention computes again in the backward pass do not count."""
    architecture, size, _ = PASSES[0]
    vit = ViT(architecture.build())
    assert counted(vit, size, kernel=SDPBackend.FLASH_ATTENTION) == vit_forward_flops(vit, size)
    again = 3 * 2 * 17**2 * 192  # blocks x 2 T^2 D
    assert counted(vit, size, backward=True, kernel=SDPBackend.FLASH_ATTENTION) == trained_flops(vit, size) + again


def test_recomputed_activations():
    """Recomputed activations do not count."""
    vit = ViT(PASSES[0][0].build())
    expected = trained_flops(vit, 32)
    vit.recompute = True
    assert trained_flops(vit, 32) == expected < counted(vit, (32, 32), backward=True)


def test_vit_b16_published():
    """The FLOPs of ViT-B/16 are those worked out by hand and those published."""
    with torch.device("meta"):
        vit = ViT(Architecture("vit_base_patch16_224").build())
    n, t, d = 196, 197, 768
    patches = 2 * n * 3 * 16**2 * d
    forward = patches + 12 * (2 * t * 12 * d**2 + 4 * t**2 * d)
    assert vit_forward_flops(vit, 224) == vit_forward_flops(vit, (224, 224), 196) == forward
    assert trained_flops(vit, 224) == 3 * forward - patches
    # 17.6 G multiply-adds (DeiT-B, Touvron et al. 2021, and fvcore's 17.58, which counts norms too)
    assert vit_forward_flops(vit, 224) / 1e9 == pytest.approx(35.2, rel=0.003)
    assert trained_flops(vit, 224) / 1e9 == pytest.approx(105.5, rel=0.004)


def test_bad_patches():
    """More patches than there are, and sizes that the patch does not divide, are refused."""
    vit = ViT(PASSES[0][0].build())
    with pytest.raises(ValueError, match="17 visible patches were given, of 16 in 32 x 32 pixels"):
        vit_forward_flops(vit, 32, 17)
    with pytest.raises(ValueError, match="patch size 8 does not divide"):
        trained_flops(vit, (32, 30))
