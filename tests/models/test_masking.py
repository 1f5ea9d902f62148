"""Visible patches by their numbers: taken, put back, and the gradients of both."""

import pytest
import torch

from bigtrain.models.masking import put, take, visible_numbers


@pytest.fixture
def visible_BN():
    return torch.tensor([[True, False, True, False, False], [False, False, False, True, True]])


@pytest.mark.parametrize("count", [2, None])
def test_numbers(visible_BN, count):
    """The numbers of the visible patches, ascending, whether or not their count is given."""
    where = visible_numbers(visible_BN, count)
    assert where.kept_Bn.tolist() == [[0, 2], [3, 4]]
    assert where.rank_BN[visible_BN].tolist() == [0, 1, 0, 1]


def test_none_visible():
    """No patch may be visible at all: then all are the others."""
    others = torch.randn(2, 3, 4)
    where = visible_numbers(torch.zeros(2, 3, dtype=torch.bool), 0)
    assert take(others, where).shape == (2, 0, 4)


def test_take_and_put(visible_BN):
    """What is taken are the visible tokens in order; put back they are where they were, and others at the rest."""
    tokens_BND, others_BND = torch.randn(2, 2, 5, 3).unbind(0)
    where = visible_numbers(visible_BN, 2)
    taken_BnD = take(tokens_BND, where)
    assert taken_BnD.equal(tokens_BND[visible_BN].unflatten(0, (2, 2)))
    assert put(taken_BnD, others_BND, where).equal(torch.where(visible_BN[:, :, None], tokens_BND, others_BND))


def test_gradients(visible_BN):
    """Gradients are those of torch's own boolean indexing."""
    tokens_BND = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    others_BND = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    where = visible_numbers(visible_BN, 2)
    assert torch.autograd.gradcheck(lambda tokens: take(tokens, where), tokens_BND)
    assert torch.autograd.gradcheck(lambda tokens, others: put(tokens[:, :2], others, where), (tokens_BND, others_BND))
