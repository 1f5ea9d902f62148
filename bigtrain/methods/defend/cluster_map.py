"""The targets of dense tuning: which prototype each patch belongs to, balanced over the batch (DEFEND 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bigtrain.methods.defend.network import TokenQueue
from bigtrain.models.vit import Packed
from bigtrain.objectives.sinkhorn import sinkhorn

if TYPE_CHECKING:
    from accelerate import Accelerator


def cluster_map(
    source: nn.Module,
    queue: TokenQueue,
    images: Sequence[Packed],
    weight_B: Tensor,
    accelerator: Accelerator,
    autocast: torch.autocast,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """The optimal cluster map Q of each image over its patch grid, balanced over the tokens of all ranks.

    Args:
        source: the tuner, or its moving average.
        queue: tokens of earlier batches that join Sinkhorn once it is full; this batch's are appended.
        images: a step's images behind the tuner's frozen blocks, in the parts that go through the network at once.
        weight_B: 0 where an image is padding.

    Returns:
        Soft assignments (B, h, w, K), float32, without gradient.
    """
    with torch.no_grad(), autocast:
        seen = [source(image) for image in images]
        z_TD = torch.cat([z_bND.flatten(0, 1) for (z_bND,), _ in seen]).float()
        scores = [cosines_bNK.flatten(0, 1).float() for _, (cosines_bNK,) in seen]
        valid_T = (weight_B > 0).repeat_interleave(len(z_TD) // len(weight_B))
        if older := len(queue.z_QD) and queue.full():
            older_TD = queue.share(accelerator.process_index, accelerator.num_processes)
            scores = [source(older_TD)[1][0].float(), *scores]
    scores_NK = torch.cat(scores)
    first = len(scores_NK) - len(z_TD) if older else 0
    valid_N = torch.cat([valid_T.new_ones(first), valid_T])
    q_TK = sinkhorn(scores_NK, epsilon, iterations, valid_N=valid_N)[first:]
    if len(queue.z_QD):
        z_TD, valid_T = accelerator.gather(z_TD), accelerator.gather(valid_T)
        queue.push(z_TD[valid_T & z_TD.isfinite().all(dim=1)])  # a non-finite one would spoil every later step
    return q_TK.unflatten(0, (len(weight_B), *images[0].places[0].grid))
