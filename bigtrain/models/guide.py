"""The attention that guides a mask: of [CLS], of the mean token or of a pooling query to the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtrain.models.attended import Attended
from bigtrain.models.attention import Sequences
from bigtrain.models.families import Place

if TYPE_CHECKING:
    from bigtrain.models.vit import ViT


def last_attention(vit: ViT, x_TD: Tensor, sequences: Sequences, places: Sequence[Place]) -> list[Tensor]:
    """The attention of [CLS], or of the mean token, to the patches in the last block; one tensor (B, N) a view."""
    block: Any = vit.backbone.blocks[-1]
    if getattr(block, "window_size", 0):
        raise ValueError("the last block attends within windows, which guides no mask: use --keep random.")
    prefix, result = vit.prefix_tokens, []
    queries = slice(0, 1) if vit.guide == "[CLS]" else slice(prefix, None)
    depth = len(vit.backbone.blocks) - 1
    split = [count * length for count, length in sequences]
    subtracted = getattr(block, "_compute_lambda", getattr(getattr(block, "attn", None), "_compute_lambda", None))
    for shape, place, part in zip(sequences, places, x_TD.split(split), strict=True):
        attended = Attended()
        with torch.no_grad():
            if vit.is_packed:
                q_THd, k_THd, _ = vit.qkv(block, part)
                attended.note(*(x.unflatten(0, shape).transpose(1, 2) for x in (q_THd, k_THd)))
            else:
                with attended:
                    vit.family.block(vit.backbone, depth, part.unflatten(0, shape), place)
        result.append(attended.to_patches(queries, slice(prefix, None), shape[0], subtracted))
    return result


def pooling_attention(vit: ViT, x_TD: Tensor, sequences: Sequences) -> list[Tensor]:
    """The attention of the pooling layer's query to the patches; one tensor (B, N) a view."""
    net, prefix, result = vit.backbone, vit.prefix_tokens, []
    skipped = 0 if net.pool_include_prefix else prefix
    for shape, part in zip(sequences, x_TD.split([count * length for count, length in sequences]), strict=True):
        with torch.no_grad(), Attended() as attended:
            net.attn_pool(part.unflatten(0, shape)[:, skipped:])
        result.append(attended.to_patches(slice(None), slice(prefix - skipped, None), shape[0]))
    return result
