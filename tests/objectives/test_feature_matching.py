"""Targets of distillation alike in all directions, and the loss, by hand."""

import pytest
import torch

from bigtrain.objectives.feature_matching import Standardised, even_basis, matching_loss


@pytest.mark.parametrize("width", [1, 2, 8, 64, 12, 100])
def test_even_basis(width):
    """An orthonormal basis whose entries are of one size; nearly, where the width is no power of two."""
    basis = even_basis(width)
    torch.testing.assert_close(basis @ basis.T, torch.eye(width, dtype=torch.float64))
    assert basis.abs().max() <= (2 / width) ** 0.5 + 1e-9
    if width & (width - 1) == 0:
        torch.testing.assert_close(basis.abs(), torch.full_like(basis, width**-0.5))


@pytest.mark.parametrize("width", [8, 12])
def test_standardised(width):
    """Targets become centred, of variance near 1 in every dimension, and keep their shape up to one scale."""
    generator = torch.Generator().manual_seed(0)
    stretch = torch.logspace(0, 2, width)
    target_TD = torch.randn(4000, width, generator=generator) * stretch @ torch.randn(width, width, generator=generator)
    target_TD = target_TD + 7
    made = Standardised(target_TD.mean(dim=0), target_TD.T.cov(correction=0))
    standard_TD = made(target_TD)
    assert standard_TD.mean(dim=0).abs().max() < 1e-2
    variance_D = standard_TD.var(dim=0)
    assert variance_D.mean() == pytest.approx(1, abs=1e-2)
    if width == 8:
        torch.testing.assert_close(variance_D, torch.ones(8), rtol=1e-2, atol=1e-2)
    apart = torch.cdist(target_TD[:50], target_TD[:50])
    ratio = (torch.cdist(standard_TD[:50], standard_TD[:50]) / apart)[~torch.eye(50, dtype=torch.bool)]
    assert ratio.max() / ratio.min() < 1.05  # float32, of eigenvalues from 1 to 10^4


def test_matching_loss():
    """0 for equal features; .9 (1 - cos) + .1 smooth L1 of the patches, and 1 - cos of the pooled ones, by hand."""
    target_BND, target_BD = torch.tensor([[[1.0, 0], [0, 2]]]), torch.tensor([[3.0, 4]])
    torch.testing.assert_close(matching_loss(target_BND, target_BND, target_BD, target_BD), torch.zeros(1))
    predicted_BND = torch.tensor([[[0.0, 1], [0, 4]]])  # cos 0 and 1; smooth L1 (.5 + .5) / 2 and 1.5 / 2
    pooled_BD = torch.tensor([[4.0, -3]])  # cos 0
    expected = (0.9 * 1 + 0.1 * 0.5 + 0 + 0.1 * 0.75) / 2 + 1
    torch.testing.assert_close(matching_loss(predicted_BND, target_BND, pooled_BD, target_BD), torch.tensor([expected]))
