"""Balanced assignment of tokens to prototypes by optimal transport (DEFEND 3.1; Cuturi 2013; SwAV 2020)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn(scores_NK: Tensor, epsilon: float = 0.05, iterations: int = 3, *, valid_N: Tensor | None = None) -> Tensor:
    """Soft assignments Q that use every prototype equally, as far as `iterations` carry.

        Q = diag(u) exp(S / epsilon) diag(v);  each iteration scales columns to equal sums, then rows to sum 1

    It equals POT's `ot.sinkhorn` with uniform marginals, cost -S and as many iterations, times N. N counts the tokens
    of all ranks: columns are summed over the process group where there is one, so W ranks give what one would.

    Args:
        scores_NK: scores of this rank's tokens x prototypes (cosines).
        epsilon: entropic regularisation, > 0.
        valid_N: bool; tokens that are padding are False: they weigh nothing and get an assignment of 0.

    Returns:
        assignment_NK, float32, without gradient; each valid row sums to 1.
    """
    log_q_NK = scores_NK.float() / epsilon
    if valid_N is not None:
        log_q_NK = log_q_NK.masked_fill(~valid_N[:, None], float("-inf"))
    for _ in range(iterations):
        log_q_NK = log_q_NK - _column_logsumexp(log_q_NK)
        log_q_NK = log_q_NK - log_q_NK.logsumexp(dim=1, keepdim=True)
        if valid_N is not None:  # a row of -inf alone has no sum to divide by
            log_q_NK = log_q_NK.masked_fill(~valid_N[:, None], float("-inf"))
    return log_q_NK.exp()


def _column_logsumexp(log_q_NK: Tensor) -> Tensor:
    """log sum_N exp(.) for each column over all ranks: (1, K)."""
    over_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    peak_1K = log_q_NK.amax(dim=0, keepdim=True)
    if over_ranks:
        dist.all_reduce(peak_1K, op=dist.ReduceOp.MAX)
    sum_1K = (log_q_NK - peak_1K).exp().sum(dim=0, keepdim=True)
    if over_ranks:
        dist.all_reduce(sum_1K, op=dist.ReduceOp.SUM)
    return peak_1K + sum_1K.log()
