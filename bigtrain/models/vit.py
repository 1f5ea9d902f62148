"""Any ViT of timm whose blocks map tokens to tokens: several sizes of images at once, visible patches only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from bigtrain.models import lean_timm  # noqa: F401  # isort: skip  # first: the imports below load timm

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.choices import Backend
from bigtrain.models.architecture import check_blocks, check_image_size
from bigtrain.models.attention import Sequences, attention
from bigtrain.models.families import Place, family_of
from bigtrain.models.guide import last_attention, pooling_attention
from bigtrain.models.masking import Visible, put, take, visible_numbers


def is_packed(net: Any) -> bool:
    """Whether our packed pass computes what this network's own would: blocks of attention and MLP, nothing else."""
    return all(
        type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
        for block in net.blocks
    )


class Encoded(NamedTuple):
    """What a ViT gives for B images of one size: N patch tokens of D features; if masked, of the visible patches, or
    of all where it has decoder blocks."""

    blocks_LBND: Tensor  # patch tokens of the last L blocks, first to last; the last one after the final norm
    class_BD: Tensor | None  # the [CLS] token after the final norm
    attention_BN: Tensor | None  # attention of [CLS] (`ViT.guide`) to each patch, mean over heads; float32

    @property
    def tokens_BND(self) -> Tensor:
        return self.blocks_LBND[-1]

    @property
    def guide_BN(self) -> Tensor:
        """What guides a mask: the attention of `ViT.guide`, or ones where it was not asked for."""
        return self.tokens_BND.new_ones(self.tokens_BND.shape[:2]) if self.attention_BN is None else self.attention_BN


class Packed(NamedTuple):
    """Tokens of several views, one after another, before the block at `depth`."""

    x_TD: Tensor
    sequences: Sequences
    places: tuple[Place, ...]
    depth: int

    def only(self, views: slice) -> Packed:
        """Of some of the views."""
        split = self.x_TD.split([count * length for count, length in self.sequences])[views]
        return Packed(torch.cat(split), self.sequences[views], self.places[views], self.depth)


class ViT(nn.Module):
    """A timm ViT whose forward pass takes several sizes of images and masks, and returns tokens and attention.

    Blocks of attention and MLP alone are packed: all views go through their matrices at once. Other blocks are timm's
    own, run on one view after another (models/families.py).

    Set `recompute` to train in less memory: a block then keeps its input only, and is run again in the backward pass,
    with the same drops of paths (Chen et al. 2016). Same results, a third more computation.

    With `decoder_blocks` d the network completes what it does not see: hidden patches come back before its last d
    blocks, as a learnt mask token at their positions, so that only these blocks run on all patches (the decoder of
    masked autoencoders, He et al. 2022, here the network's own last blocks).

    With `projected_blocks` l its last l blocks' tokens are given in another width, through a linear layer each.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        attention: Backend = "auto",
        decoder_blocks: int = 0,
        projected_blocks: int = 0,
        projected_width: int = 0,
    ) -> None:
        super().__init__()
        if decoder_blocks:
            check_blocks("decoder_blocks", decoder_blocks, backbone)
        family = family_of(backbone)
        assert family is not None
        self.backbone, self.family, self.is_packed = backbone, family, is_packed(backbone)
        self.attention_backend = attention
        self.recompute = False
        self.decoder_blocks, self.projected_width = decoder_blocks, projected_width
        self.mask_token_D = nn.Parameter(torch.zeros(backbone.embed_dim)) if decoder_blocks else None
        self.projections = nn.ModuleList(
            nn.Linear(backbone.embed_dim, projected_width) for _ in range(projected_blocks)
        )

    @property
    def width(self) -> int:
        """D of the tokens that it gives."""
        return self.projected_width or self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        return self.family.stem(self.backbone).feat_ratio(as_scalar=True)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of the images that the network was made for."""
        stem = self.family.stem(self.backbone)
        return tuple(getattr(stem, "grid_size", None) or stem.pos_embed_grid_size)

    @property
    def guide(self) -> str:
        """Whose attention to the patches `with_attention` returns: it guides a mask."""
        if self.family.class_token(self.backbone) is not None:
            return "[CLS]"
        return "the pooling query" if getattr(self.backbone, "attn_pool", None) is not None else "the mean token"

    def forward(
        self,
        *views: Tensor | Packed,
        visible_BN: Tensor | Visible | None = None,
        visible_count: int | None = None,
        last: int = 1,
        with_attention: bool = False,
    ) -> tuple[Encoded, ...]:
        """Encode images of one or more sizes in one packed pass.

        Args:
            views: images (B, 3, H, W), each with its own B, H and W; sides are multiples of the patch size. Or what
                `begin` has made of them.
            visible_BN: with a single view: the patches to see, equally many in each image; the others are dropped,
                and completed by a network with decoder blocks, which then returns all patches. Or their numbers.
            visible_count: how many that are in each image; None: they are counted, for which the device is waited for.
            last: how many blocks' tokens to return; where patches are completed, no more than the decoder has.
            with_attention: also return the attention of `guide`: that of the pooling layer, else of the last block.

        Returns:
            One `Encoded` for each view.
        """
        where = visible_numbers(visible_BN, visible_count) if isinstance(visible_BN, Tensor) else visible_BN
        x_TD, sequences, places, begun = views[0] if isinstance(views[0], Packed) else self._packed(views, where)
        blocks: list[Any] = list(self.backbone.blocks)
        kept: list[Tensor] = []
        attended: list[Tensor] | None = None
        completed_from = self._check_last(last, is_masked=where is not None)
        for depth in range(begun, len(blocks)):
            if where is not None and depth == completed_from:
                x_BTD = self._complete(x_TD.unflatten(0, sequences[0]), where, places[0].grid)
                places = (places[0]._replace(kept_Bn=None),)
                sequences, x_TD = ((x_BTD.shape[0], x_BTD.shape[1]),), x_BTD.flatten(0, 1)
            if with_attention and depth == len(blocks) - 1 and self.guide != "the pooling query":
                attended = last_attention(self, x_TD, sequences, places)
            x_TD = self._run(depth, x_TD, sequences, places)
            if depth >= len(blocks) - last:
                kept.append(x_TD)
        kept[-1] = self._normed(kept[-1])
        if with_attention and attended is None:
            attended = pooling_attention(self, kept[-1], sequences)
        if len(self.projections):
            kept = [project(x_TD) for project, x_TD in zip(self.projections[-last:], kept, strict=True)]

        prefix = self.prefix_tokens
        encoded = []
        split = [count * length for count, length in sequences]
        for view, (shape, parts) in enumerate(
            zip(sequences, zip(*(x.split(split) for x in kept), strict=True), strict=True)
        ):
            blocks_LBTD = torch.stack(parts).unflatten(1, shape)
            encoded.append(
                Encoded(
                    blocks_LBND=blocks_LBTD[:, :, prefix:],
                    class_BD=blocks_LBTD[-1, :, 0] if self.guide == "[CLS]" else None,
                    attention_BN=attended[view] if attended else None,
                )
            )
        return tuple(encoded)

    @torch.no_grad()
    def begin(self, *views: Tensor, blocks: int) -> Packed:
        """All views after the first `blocks` blocks, in one packed pass without a graph: where these are frozen, views
        of several networks that share them need no second one."""
        x_TD, sequences, places, _ = self._packed(views, None)
        for depth in range(blocks):
            x_TD = self._run(depth, x_TD, sequences, places)
        return Packed(x_TD, sequences, places, blocks)

    def _packed(self, views: Sequence[Any], where: Visible | None) -> Packed:
        """The tokens of all views before the first block."""
        tokens, places = map(list, zip(*(self._embed(view) for view in views), strict=True))
        if where is not None:
            tokens[0], places[0] = self._keep(tokens[0], places[0], where)
        sequences: Sequences = tuple((x.shape[0], x.shape[1]) for x in tokens)
        return Packed(torch.cat([x.flatten(0, 1) for x in tokens]), sequences, tuple(places), 0)

    def _run(self, depth: int, x_TD: Tensor, sequences: Sequences, places: tuple[Place, ...]) -> Tensor:
        """One block."""
        block = self.backbone.blocks[depth]
        run = partial(self._block, block) if self.is_packed else partial(self._timm_block, depth, places)
        if self.recompute and torch.is_grad_enabled():  # a block without gradient keeps and repeats nothing
            return checkpoint(run, x_TD, sequences, use_reentrant=False)
        return run(x_TD, sequences)

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

    def _embed(self, images_B3HW: Tensor) -> tuple[Tensor, Place]:
        """Patches with their positions, prefix tokens: (B, prefix + N, D); and where they lie."""
        size = images_B3HW.shape[-2:]
        check_image_size(size, self.patch_size)
        if self.family.has_fixed_size and tuple(side // self.patch_size for side in size) != self.grid_size:
            own = [side * self.patch_size for side in self.grid_size]
            raise ValueError(
                f"the relative positions of {type(self.backbone).__name__} belong to pictures of {own[0]} x {own[1]} "
                f"pixels, and pictures or crops of {size[0]} x {size[1]} were given: use one size for all."
            )
        return self.family.embed(self.backbone, images_B3HW)

    @property
    def prefix_tokens(self) -> int:
        return getattr(self.backbone, "num_prefix_tokens", 0)

    def _normed(self, x_TD: Tensor) -> Tensor:
        """The final norms; SAM has a neck instead, which is no part of this pass."""
        for name in ("norm", "fc_norm"):
            norm = getattr(self.backbone, name, None)
            x_TD = x_TD if norm is None else norm(x_TD)
        return x_TD

    def _keep(self, tokens_BTD: Tensor, place: Place, where: Visible) -> tuple[Tensor, Place]:
        """The tokens of the visible patches, and their places."""
        if self.family.why_unmasked:
            raise ValueError(
                f"no patches of {type(self.backbone).__name__} can be hidden: {self.family.why_unmasked}. Take another "
                "--student, or --mask-ratio 0."
            )
        prefix = self.prefix_tokens
        visible_BnD = take(tokens_BTD[:, prefix:], where)
        return torch.cat([tokens_BTD[:, :prefix], visible_BnD], dim=1), place._replace(kept_Bn=where.kept_Bn)

    def _complete(self, x_BTD: Tensor, where: Visible, grid: tuple[int, int]) -> Tensor:
        """Put the visible patches back in their places, and mask tokens with their positions in the others."""
        prefix = self.prefix_tokens
        position_1ND = self.family.positions(self.backbone, grid, x_BTD)
        assert self.mask_token_D is not None
        masked_BND = (self.mask_token_D + position_1ND).to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)
        patches_BND = put(x_BTD[:, prefix:], masked_BND, where)
        return torch.cat([x_BTD[:, :prefix], patches_BND], dim=1)

    def _timm_block(self, depth: int, places: Sequence[Place], x_TD: Tensor, sequences: Sequences) -> Tensor:
        """A block of timm's own, on one view after another."""
        parts = x_TD.split([count * length for count, length in sequences])
        views = zip(parts, sequences, places, strict=True)
        run = partial(self.family.block, self.backbone, depth)
        return torch.cat([run(part.unflatten(0, shape), place).flatten(0, 1) for part, shape, place in views])

    def _block(self, block: Any, x_TD: Tensor, sequences: Sequences) -> Tensor:
        q_THd, k_THd, v_THd = self.qkv(block, x_TD)
        mixed_TD = attention(q_THd, k_THd, v_THd, sequences, backend=self.attention_backend).flatten(1)
        mixed_TD = block.attn.proj_drop(block.attn.proj(block.attn.norm(mixed_TD)))
        x_TD = x_TD + _drop_path(block.ls1(mixed_TD), block.drop_path1, sequences)
        return x_TD + _drop_path(block.ls2(block.mlp(block.norm2(x_TD))), block.drop_path2, sequences)

    def qkv(self, block: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, each (T, H, d)."""
        attn = block.attn
        q_THd, k_THd, v_THd = attn.qkv(block.norm1(x_TD)).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return attn.q_norm(q_THd), attn.k_norm(k_THd), v_THd


def _drop_path(x_TD: Tensor, drop: nn.Module, sequences: Sequences) -> Tensor:
    """Stochastic depth by sequence, not by token: timm's own would draw for each packed token."""
    probability = getattr(drop, "drop_prob", 0.0)
    if not drop.training or not probability:
        return x_TD
    keep_S = torch.rand(sum(count for count, _ in sequences), device=x_TD.device) >= probability
    parts = zip(keep_S.split([count for count, _ in sequences]), sequences, strict=True)
    keep_T = torch.cat([keep.repeat_interleave(length) for keep, (_, length) in parts])
    return x_TD * (keep_T[:, None].to(x_TD.dtype) / (1 - probability))
