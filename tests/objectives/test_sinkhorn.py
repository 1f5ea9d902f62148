"""Sinkhorn against POT, in one process and in two."""

import numpy as np
import ot
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bigtrain.objectives.sinkhorn import sinkhorn


def cosines(tokens=60, prototypes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, prototypes, generator=generator) * 2 - 1


def pot(scores_NK, epsilon, iterations):
    tokens, prototypes = scores_NK.shape
    a, b = np.full(tokens, 1 / tokens), np.full(prototypes, 1 / prototypes)
    cost = -scores_NK.double().numpy()
    plan = ot.sinkhorn(a, b, cost, reg=epsilon, numItermax=iterations, stopThr=0, warn=False)
    return plan * tokens


@pytest.mark.parametrize("iterations", [1, 3, 50])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_the_assignment_is_that_of_pot(iterations, epsilon):
    scores_NK = cosines()
    expected = pot(scores_NK, epsilon, iterations)
    np.testing.assert_allclose(sinkhorn(scores_NK, epsilon, iterations).numpy(), expected, atol=2e-5)


def test_marginals():
    """Rows sum to one, and after many iterations columns have equal sums."""
    assignment_NK = sinkhorn(cosines(), iterations=200)
    torch.testing.assert_close(assignment_NK.sum(dim=1), torch.ones(60))
    torch.testing.assert_close(assignment_NK.sum(dim=0), torch.full((7,), 60 / 7))


def test_one_iteration_by_hand():
    # exp(S) = [[1, 2], [3, 2]]; columns to sum 1: [[1/4, 1/2], [3/4, 1/2]]; rows to sum 1
    scores_NK = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log()
    expected = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]])
    torch.testing.assert_close(sinkhorn(scores_NK, epsilon=1.0, iterations=1), expected)


def test_padding():
    """Tokens that are padding take no part."""
    scores_NK, valid_N = cosines(), torch.arange(60) % 3 > 0
    assignment_NK = sinkhorn(scores_NK, valid_N=valid_N)
    torch.testing.assert_close(assignment_NK[valid_N], sinkhorn(scores_NK[valid_N]), rtol=1e-6, atol=1e-7)
    assert not assignment_NK[~valid_N].any()
    everything = sinkhorn(scores_NK, valid_N=torch.ones(60, dtype=torch.bool))
    assert torch.equal(everything, sinkhorn(scores_NK))
    assert not sinkhorn(scores_NK, valid_N=torch.zeros(60, dtype=torch.bool)).any()


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(scale, dtype):
    scores_NK = (cosines() * scale).to(dtype)
    scores_NK[:, 0] = -scale  # a prototype that nothing is near to
    assignment_NK = sinkhorn(scores_NK)
    assert assignment_NK.dtype == torch.float32
    assert assignment_NK.isfinite().all()
    torch.testing.assert_close(assignment_NK.sum(dim=1), torch.ones(60))


def test_no_gradient():
    """The assignment carries no gradient."""
    assert not sinkhorn(cosines().requires_grad_()).requires_grad


def one_rank(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    scores_NK, valid_N = cosines(), torch.arange(60) % 4 > 0
    mine = slice(0, 20) if rank == 0 else slice(20, 60)  # ranks may have different numbers of tokens
    whole, masked = sinkhorn(scores_NK[mine]), sinkhorn(scores_NK[mine], valid_N=valid_N[mine])
    nothing_here = sinkhorn(scores_NK[mine], valid_N=torch.full((len(scores_NK[mine]),), rank == 1))
    torch.save([whole, masked, nothing_here], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """Two processes give what one gives, also where one of them has nothing but padding."""
    mp.spawn(one_rank, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    parts = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    whole, masked, second = (torch.cat(pair) for pair in parts)
    scores_NK, valid_N = cosines(), torch.arange(60) % 4 > 0
    torch.testing.assert_close(whole, sinkhorn(scores_NK), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(masked, sinkhorn(scores_NK, valid_N=valid_N), rtol=1e-6, atol=1e-7)
    assert not second[:20].any()  # a rank with nothing but padding
    torch.testing.assert_close(second[20:], sinkhorn(scores_NK[20:]), rtol=1e-6, atol=1e-7)
