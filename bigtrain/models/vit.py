"""Any timm `vit_*` as teacher or student: several image sizes in one packed pass, visible patches only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from bigtrain.models.lean_timm import timm  # isort: skip  # first: the imports below load timm

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.choices import LOCAL, Backend
from bigtrain.models.attention import Sequences, attention
from bigtrain.models.timm_names import check_vit_name

NO_PLAIN_VIT = "{} is not a plain vision transformer: take a timm model vit_*, such as vit_base_patch16_224."


def check_tag(name: str) -> None:
    """Refuse a tag that names no weights of this network, as in resnet18.nope."""
    base, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")] if tag else []
    if tag and tag not in tags:
        raise ValueError(f"timm has no weights {tag!r} of {base}; it has {', '.join(tags) or 'none'}.")


def is_vit_name(name: str) -> bool:
    """Whether timm defines this network among its vision transformers."""
    return timm.models.model_entrypoint(name).__module__.endswith(("vision_transformer", "deit"))


def is_plain_vit(net: nn.Module) -> TypeGuard[VisionTransformer]:
    """Whether our packed pass computes what this network's own would: blocks of attention and MLP, nothing else."""
    return isinstance(net, VisionTransformer) and all(
        type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
        for block in net.blocks
    )


class Encoded(NamedTuple):
    """What a ViT gives for B images of one size: N patch tokens of D features; if masked, of the visible patches, or
    of all where it has decoder blocks."""

    blocks_LBND: Tensor  # patch tokens of the last L blocks, first to last; the last one after the final norm
    class_BD: Tensor | None  # the [CLS] token after the final norm
    attention_BN: Tensor | None  # attention of [CLS] to each patch in the last block, mean over heads; float32

    @property
    def tokens_BND(self) -> Tensor:
        return self.blocks_LBND[-1]

    @property
    def guide_BN(self) -> Tensor:
        """What guides a mask: the attention of [CLS], or ones where it was not asked for."""
        return self.tokens_BND.new_ones(self.tokens_BND.shape[:2]) if self.attention_BN is None else self.attention_BN


@dataclass(frozen=True)
class Architecture:
    """A timm model by name, and what differs from its definition; 0 means as defined."""

    model: str
    image_size: int = 0
    patch_size: int = 0
    depth: int = 0

    def build(self, *, drop_path: float = 0.0, plain: bool = True) -> Any:
        """The network without a classifier, with random weights.

        Args:
            plain: False: any network of timm's vision transformers, such as those whose own forward pass is enough.

        Raises:
            ValueError: timm has no such model or weights, or it is not a plain ViT.
        """
        check_vit_name(self.model)
        check_tag(self.model)
        given: dict[str, Any] = {"img_size": self.image_size, "patch_size": self.patch_size, "depth": self.depth}
        given = {name: value for name, value in given.items() if value}
        refusal = NO_PLAIN_VIT.format(self.model)
        if not is_vit_name(self.model):
            raise ValueError(refusal)
        net = timm.create_model(
            self.model, pretrained=False, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path, **given
        )
        if not is_plain_vit(net):
            if plain:
                raise ValueError(refusal)
            return net
        # our pass has no use for it, and DDP wants a gradient for every weight
        net.attn_pool = None  # type: ignore[assignment]
        return net


def asked_for(source: str, arch: str, image_size: int = 0, patch_size: int = 0, depth: int = 0) -> Architecture | None:
    """What settings ask for: a timm name with other sizes, or the network of a local file; None: the file knows."""
    if Path(source).suffix in LOCAL:
        return Architecture(arch, image_size) if arch else None
    return Architecture(arch or source, image_size, patch_size, depth)


class ViT(nn.Module):
    """A timm VisionTransformer whose forward pass is packed, and returns tokens and attention.

    Set `recompute` to train in less memory: a block then keeps its input only, and is run again in the backward pass,
    with the same drops of paths (Chen et al. 2016). Same results, a third more computation.

    With `decoder_blocks` d the network completes what it does not see: hidden patches come back before its last d
    blocks, as a learnt mask token at their positions, so that only these blocks run on all patches (the decoder of
    masked autoencoders, He et al. 2022, here the network's own last blocks).
    """

    def __init__(self, backbone: VisionTransformer, *, attention: Backend = "auto", decoder_blocks: int = 0) -> None:
        super().__init__()
        if decoder_blocks:
            check_blocks("decoder_blocks", decoder_blocks, backbone)
        self.backbone = backbone
        self.attention_backend = attention
        self.recompute = False
        self.decoder_blocks = decoder_blocks
        self.mask_token_D = nn.Parameter(torch.zeros(backbone.embed_dim)) if decoder_blocks else None

    @property
    def width(self) -> int:
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_embed.patch_size[0]

    def forward(
        self, *views: Tensor, visible_BN: Tensor | None = None, last: int = 1, with_attention: bool = False
    ) -> tuple[Encoded, ...]:
        """Encode images of one or more sizes in one packed pass.

        Args:
            views: images (B, 3, H, W), each with its own B, H and W; sides are multiples of the patch size.
            visible_BN: with a single view: the patches to see, equally many in each image; the others are dropped,
                and completed by a network with decoder blocks, which then returns all patches.
            last: how many blocks' tokens to return; where patches are completed, no more than the decoder has.
            with_attention: also return the attention of [CLS] in the last block.

        Returns:
            One `Encoded` for each view.
        """
        tokens = [self._embed(view) for view in views]
        if visible_BN is not None:
            (tokens_BTD,) = tokens
            tokens = [self._keep(tokens_BTD, visible_BN)]
        sequences: Sequences = tuple((x.shape[0], x.shape[1]) for x in tokens)
        x_TD = torch.cat([x.flatten(0, 1) for x in tokens])

        blocks: list[Any] = list(self.backbone.blocks)
        kept: list[Tensor] = []
        class_attention: list[Tensor] | None = None
        completed_from = self._check_last(last, is_masked=visible_BN is not None)
        for depth, block in enumerate(blocks):
            if visible_BN is not None and depth == completed_from:
                x_BTD = self._complete(x_TD.unflatten(0, sequences[0]), visible_BN, views[0])
                sequences, x_TD = ((x_BTD.shape[0], x_BTD.shape[1]),), x_BTD.flatten(0, 1)
            if with_attention and depth == len(blocks) - 1:
                class_attention = self._class_attention(block, x_TD, sequences)
            if self.recompute and torch.is_grad_enabled():  # a block without gradient keeps and repeats nothing
                x_TD = checkpoint(self._block, block, x_TD, sequences, use_reentrant=False)
            else:
                x_TD = self._block(block, x_TD, sequences)
            if depth >= len(blocks) - last:
                kept.append(x_TD)
        kept[-1] = self.backbone.fc_norm(self.backbone.norm(kept[-1]))

        prefix = self.backbone.num_prefix_tokens
        encoded = []
        split = [count * length for count, length in sequences]
        for view, (shape, parts) in enumerate(
            zip(sequences, zip(*(x.split(split) for x in kept), strict=True), strict=True)
        ):
            blocks_LBTD = torch.stack(parts).unflatten(1, shape)
            encoded.append(
                Encoded(
                    blocks_LBND=blocks_LBTD[:, :, prefix:],
                    class_BD=blocks_LBTD[-1, :, 0] if self.backbone.has_class_token else None,
                    attention_BN=class_attention[view] if class_attention else None,
                )
            )
        return tuple(encoded)

    def _check_last(self, last: int, *, is_masked: bool) -> int | None:
        """Refuse a `last` beyond the blocks; return the one before which hidden patches come back, if any."""
        check_blocks("last", last, self.backbone)
        if not (self.decoder_blocks and is_masked):
            return None
        if last > self.decoder_blocks:
            raise ValueError(
                f"the last {last} blocks were asked for at hidden patches, which {self.decoder_blocks} complete."
            )
        return len(self.backbone.blocks) - self.decoder_blocks

    def _embed(self, images_B3HW: Tensor) -> Tensor:
        """Patches, positions (resampled where the size is not the network's own), prefix tokens: (B, prefix + N, D)."""
        check_image_size(images_B3HW.shape[-2:], self.patch_size)
        net: Any = self.backbone
        return net.norm_pre(net._pos_embed(net.patch_embed(images_B3HW)))

    def _keep(self, tokens_BTD: Tensor, visible_BN: Tensor) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        patches_BND = tokens_BTD[:, prefix:]
        visible_BnD = patches_BND[visible_BN].unflatten(0, (len(visible_BN), -1))
        return torch.cat([tokens_BTD[:, :prefix], visible_BnD], dim=1)

    def _complete(self, x_BTD: Tensor, visible_BN: Tensor, images_B3HW: Tensor) -> Tensor:
        """Put the visible patches back in their places, and mask tokens with their positions in the others."""
        net: Any = self.backbone
        prefix, grid = net.num_prefix_tokens, [side // self.patch_size for side in images_B3HW.shape[-2:]]
        position_1ND = net._pos_embed(x_BTD.new_zeros(1, *grid, net.embed_dim))[:, prefix:]
        masked_BND = (self.mask_token_D + position_1ND).to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
        patches_BND = masked_BND.masked_scatter(visible_BN[:, :, None], x_BTD[:, prefix:])
        return torch.cat([x_BTD[:, :prefix], patches_BND], dim=1)

    def _block(self, block: Any, x_TD: Tensor, sequences: Sequences) -> Tensor:
        q_THd, k_THd, v_THd = self._qkv(block, x_TD)
        mixed_TD = attention(q_THd, k_THd, v_THd, sequences, backend=self.attention_backend).flatten(1)
        mixed_TD = block.attn.proj_drop(block.attn.proj(block.attn.norm(mixed_TD)))
        x_TD = x_TD + _drop_path(block.ls1(mixed_TD), block.drop_path1, sequences)
        return x_TD + _drop_path(block.ls2(block.mlp(block.norm2(x_TD))), block.drop_path2, sequences)

    def _qkv(self, block: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        q_THd, k_THd, v_THd = attn.qkv(block.norm1(x_TD)).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return attn.q_norm(q_THd), attn.k_norm(k_THd), v_THd

    def _class_attention(self, block: Any, x_TD: Tensor, sequences: Sequences) -> list[Tensor]:
        """softmax over all tokens of q_CLS k^T / sqrt(d), mean over heads, at the patches; one tensor a view."""
        if not self.backbone.has_class_token:
            raise ValueError("this network has no [CLS] token, whose attention to its patches was asked for.")
        prefix, result = self.backbone.num_prefix_tokens, []
        with torch.no_grad():
            q_THd, k_THd, _ = self._qkv(block, x_TD)
        split = [count * length for count, length in sequences]
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):  # or einsum runs in half
            for shape, q, k in zip(sequences, q_THd.split(split), k_THd.split(split), strict=True):
                q_BHd, k_BTHd = q.unflatten(0, shape)[:, 0].float(), k.unflatten(0, shape).float()
                score_BHT = torch.einsum("bhd,bthd->bht", q_BHd, k_BTHd) * q_BHd.shape[-1] ** -0.5
                result.append(score_BHT.softmax(dim=-1).mean(dim=1)[:, prefix:])
        return result


def _drop_path(x_TD: Tensor, drop: nn.Module, sequences: Sequences) -> Tensor:
    """Stochastic depth by sequence, not by token: timm's own would draw for each packed token."""
    probability = getattr(drop, "drop_prob", 0.0)
    if not drop.training or not probability:
        return x_TD
    keep_S = torch.rand(sum(count for count, _ in sequences), device=x_TD.device) >= probability
    parts = zip(keep_S.split([count for count, _ in sequences]), sequences, strict=True)
    keep_T = torch.cat([keep.repeat_interleave(length) for keep, (_, length) in parts])
    return x_TD * (keep_T[:, None].to(x_TD.dtype) / (1 - probability))


def check_blocks(what: str, count: int, backbone: VisionTransformer, of: str = "network") -> None:
    """Refuse a number of blocks that a network does not have."""
    depth = len(backbone.blocks)
    if not 1 <= count <= depth:
        raise ValueError(f"{what} is {count}, and the {of} has {depth} blocks: use 1 to {depth}.")


def check_image_size(size: Sequence[int], patch_size: int) -> None:
    """Refuse images whose sides are no multiples of the patch."""
    if any(side % patch_size for side in size):
        lower = max(patch_size, max(size) // patch_size * patch_size)
        raise ValueError(
            f"patch size {patch_size} does not divide a picture or crop of {size[0]} x {size[1]} pixels: "
            f"use {lower} or {lower + patch_size}."
        )
