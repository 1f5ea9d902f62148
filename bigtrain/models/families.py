"""timm's families of ViTs: what each does before its blocks, and what a block must know of where its tokens lie.

In all of them a block maps tokens to tokens, so that hidden patches can be left out: rotary positions (RoPE) and
relative ones are then those of the visible patches. A block of `Block` and `Attention` alone, as in most of timm's
vit_*, needs neither: such networks are packed by models/vit.py. The blocks of the others are timm's own, run on one
size of pictures after another.

    family                       networks, for example
    VisionTransformer, DeiT      DINO, DINOv2, CLIP, SigLIP, DeiT, AIMv2, parallel and differential blocks
    Eva                          EVA-02, DINOv3, PE, vit_*_rope_*: rotary positions
    NaFlexVit                    naflexvit_*
    Beit, VisionTransformerRelPos   relative positions, which belong to one size of pictures
    VisionTransformerSAM         samvit_*: windows of the grid, which need all of it
    hybrids                      vit_*_r50_*: their convolutions see beyond a patch, so that none can be hidden
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bigtrain.models.lean_timm import timm  # isort: skip  # first: the imports below load timm

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from bigtrain.models.attended import Attended


class Place(NamedTuple):
    """Where the patches of B images of one size lie."""

    grid: tuple[int, int]
    rope: Tensor | None = None  # rotations of all patches: (N, d), or (blocks, heads, N, d)
    kept_Bn: Tensor | None = None  # the numbers of the visible patches; None: all


class Family:
    """VisionTransformer and DeiT; the other families say what differs."""

    why_unmasked = ""  # why no patch can be hidden; "": any can
    has_fixed_size = False

    def stem(self, net: Any) -> Any:
        return net.patch_embed

    def class_token(self, net: Any) -> Tensor | None:
        return net.cls_token

    def embed(self, net: Any, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """Patches, positions (resampled where the size is not the network's own), prefix tokens: (B, prefix + N, D)."""
        patches_BhwD = net.patch_embed(images_B3HW)
        return net.norm_pre(net._pos_embed(patches_BhwD)), Place(tuple(patches_BhwD.shape[1:3]))

    def positions(self, net: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
        """What is added to the patches of a grid, (1, N, D), on the device of `like`."""
        return net._pos_embed(like.new_zeros(1, *grid, net.embed_dim))[:, net.num_prefix_tokens :]

    def block(self, net: Any, depth: int, x_BTD: Tensor, place: Place) -> Tensor:
        """Run one block on tokens that lie there: (B, T, D)."""
        return net.blocks[depth](x_BTD)


class Hybrid(Family):
    why_unmasked = "its convolutions see beyond a patch"


class Rotary(Family):
    """Eva: EVA-02, DINOv3, PE, RoPE ViTs."""

    def embed(self, net: Any, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """As of `Family`: (B, T, D)."""
        patches_BhwD = net.patch_embed(images_B3HW)
        tokens_BTD, rope = net._pos_embed(patches_BhwD)
        return net.norm_pre(tokens_BTD), Place(tuple(patches_BhwD.shape[1:3]), rope)

    def positions(self, net: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
        """As of `Family`: (1, N, D)."""
        tokens_1TD, _ = net._pos_embed(like.new_zeros(1, *grid, net.embed_dim))
        return tokens_1TD[:, net.num_prefix_tokens :]

    def block(self, net: Any, depth: int, x_BTD: Tensor, place: Place) -> Tensor:
        """As of `Family`: (B, T, D)."""
        rope = place.rope
        if rope is None:
            return net.blocks[depth](x_BTD)
        if rope.ndim == 4:  # each block has rotations of its own, (H, N, d)
            rope = rope[depth] if place.kept_Bn is None else rope[depth][:, place.kept_Bn].transpose(0, 1)
        elif place.kept_Bn is not None:
            rope = rope[place.kept_Bn].unsqueeze(1)  # (B, 1, n, d)
        return net.blocks[depth](x_BTD, rope=rope)


class NaFlex(Rotary):
    def stem(self, net: Any) -> Any:
        return net.embeds

    def class_token(self, net: Any) -> Tensor | None:
        return net.embeds.cls_token

    def embed(self, net: Any, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """As of `Family`: (B, T, D)."""
        embedded = net._forward_embeds(images_B3HW, None, None, None)
        grid = net.embeds.dynamic_feat_size(tuple(images_B3HW.shape[-2:]))
        return embedded["patches"], Place(grid, embedded["rope_embeds"])

    def positions(self, net: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
        """As of `Family`: (1, N, D)."""
        position_1ND = like.new_zeros(1, grid[0] * grid[1], net.embed_dim)
        add = {"learned": "_apply_learned_pos_embed", "factorized": "_apply_factorized_pos_embed"}
        if name := add.get(net.embeds.pos_embed_type):
            getattr(net.embeds, name)(position_1ND, grid_size=list(grid))  # in place
        return position_1ND


class Relative(Family):
    """Beit and VisionTransformerRelPos: attention has a bias for each pair of places."""

    has_fixed_size = True

    def embed(self, net: Any, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """As of `Family`: (B, T, D)."""
        x_BTD = net.patch_embed(images_B3HW)
        if net.cls_token is not None:
            x_BTD = torch.cat([net.cls_token.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        if getattr(net, "pos_embed", None) is not None:
            x_BTD = x_BTD + net.pos_embed
        return x_BTD, Place(net.patch_embed.grid_size)

    def positions(self, net: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
        """As of `Family`: (1, N, D)."""
        position_1ND = like.new_zeros(1, grid[0] * grid[1], net.embed_dim)
        own = getattr(net, "pos_embed", None)
        return position_1ND if own is None else position_1ND + own[:, net.num_prefix_tokens :]

    def block(self, net: Any, depth: int, x_BTD: Tensor, place: Place) -> Tensor:
        """As of `Family`: (B, T, D)."""
        block = net.blocks[depth]
        if place.kept_Bn is None:
            return self._run(net, block, x_BTD)
        prefix = torch.arange(net.num_prefix_tokens, device=x_BTD.device).expand(x_BTD.shape[0], -1)
        seen_BT = torch.cat([prefix, place.kept_Bn + net.num_prefix_tokens], dim=1)
        bias_HTT = self._bias(net, block.attn)
        bias_BHTT = bias_HTT[:, seen_BT[:, :, None], seen_BT[:, None, :]].transpose(0, 1).contiguous()
        with Attended(bias_BHTT):
            return self._run(net, block, x_BTD)

    def _run(self, net: Any, block: Any, x_BTD: Tensor) -> Tensor:
        if isinstance(net, Beit):
            return block(x_BTD, shared_rel_pos_bias=net.rel_pos_bias() if net.rel_pos_bias is not None else None)
        return block(x_BTD, shared_rel_pos=net.shared_rel_pos.get_bias() if net.shared_rel_pos is not None else None)

    def _bias(self, net: Any, attention: Any) -> Tensor:
        if isinstance(net, Beit):
            shared = 0 if net.rel_pos_bias is None else net.rel_pos_bias()
            own = 0 if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()[0]
            return own + shared
        module = net.shared_rel_pos if attention.rel_pos is None else attention.rel_pos
        return module.get_bias()[0]


class Windowed(Family):
    """VisionTransformerSAM; the neck after its blocks, which mixes patches, is left out."""

    why_unmasked = "its windows need the whole grid of patches"

    def class_token(self, net: Any) -> Tensor | None:
        return None

    def embed(self, net: Any, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """As of `Family`: (B, T, D)."""
        x_BhwD = net.patch_embed(images_B3HW)
        grid = tuple(x_BhwD.shape[1:3])
        if net.pos_embed is not None:
            x_BhwD = x_BhwD + timm.layers.resample_abs_pos_embed_nhwc(net.pos_embed, grid)
        return net.norm_pre(x_BhwD).flatten(1, 2), Place(grid)

    def block(self, net: Any, depth: int, x_BTD: Tensor, place: Place) -> Tensor:
        """As of `Family`: (B, T, D)."""
        return net.blocks[depth](x_BTD.unflatten(1, place.grid)).flatten(1, 2)


FAMILIES: dict[type[nn.Module], Family] = {
    VisionTransformer: Family(),
    VisionTransformerDistilled: Family(),
    Eva: Rotary(),
    NaFlexVit: NaFlex(),
    Beit: Relative(),
    VisionTransformerRelPos: Relative(),
    VisionTransformerSAM: Windowed(),
}
HYBRID = Hybrid()
MODULES = ("vision_transformer", "deit", "eva", "naflexvit", "beit", "vision_transformer_relpos",
           "vision_transformer_sam", "vision_transformer_hybrid")  # fmt: skip
"""The modules of timm that define them."""
TAKE_ANY_SIZE = ("vision_transformer", "deit", "eva", "vision_transformer_hybrid")
"""Of these, what takes several sizes of pictures if `dynamic_img_size` asks for it; NaFlexViT and SAM always do."""


def family_of(net: nn.Module) -> Family | None:
    """How a network's tokens are embedded and its blocks run; None: its blocks do not map tokens to tokens."""
    family = FAMILIES.get(type(net))
    stem: Any = getattr(net, "patch_embed", None)
    return HYBRID if type(family) is Family and not isinstance(stem, timm.layers.PatchEmbed) else family
