"""Distillation of features: targets made alike in all directions, and how far a student is from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEAKEST = 1e-7  # of the largest eigenvalue
COSINE_SHARE = 0.9  # of a map's loss; the rest is smooth L1 (RADIO, Ranzinger et al. 2024a, 3.3)


class Standardised(nn.Module):
    """PHI-S: a rotation and one scale under which every dimension of a target has variance 1 (Ranzinger et al. 2024b,
    section 3.2).

        y' = phi^-1 H U^T (y - mu),  phi^2 = mean of the eigenvalues,  U their eigenvectors

    H is orthonormal with entries of one size, so that each output has an equal part of every eigenvector: a Hadamard
    matrix where the width is a power of 2, else the cosine basis (DCT-II), whose entries are nearly so.
    One scale for all, so that errors keep their proportion to each other in the teacher's own space.

    Args:
        mean_D, covariance_DD: of the targets over the data.
    """

    def __init__(self, mean_D: Tensor, covariance_DD: Tensor) -> None:
        super().__init__()
        eigenvalue_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
        largest = vectors_DD.gather(0, vectors_DD.abs().argmax(dim=0, keepdim=True))
        vectors_DD = vectors_DD * largest.sign()  # which is arbitrary otherwise
        vectors_DD[:, eigenvalue_D < WEAKEST * eigenvalue_D.max()] = 0  # directions that rounding alone has made
        phi = eigenvalue_D.clamp(min=0).mean().sqrt().clamp(min=1e-12)
        self.mean_D: Tensor
        self.matrix_DD: Tensor
        self.register_buffer("mean_D", mean_D.float())
        self.register_buffer("matrix_DD", (even_basis(len(mean_D)) @ vectors_DD.T / phi).float())

    def forward(self, target: Tensor) -> Tensor:
        """Targets (..., D)."""
        return (target.float() - self.mean_D) @ self.matrix_DD.T


def even_basis(width: int) -> Tensor:
    """An orthonormal matrix whose entries are of one size, or nearly: float64 (width, width)."""
    if width & (width - 1) == 0:
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) < width:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        return hadamard / width**0.5
    place = torch.arange(width, dtype=torch.float64)
    basis = torch.cos(torch.pi / width * (place[None] + 0.5) * place[:, None]) * (2 / width) ** 0.5
    basis[0] /= 2**0.5
    return basis


def matching_loss(predicted_BND: Tensor, target_BND: Tensor, predicted_BD: Tensor, target_BD: Tensor) -> Tensor:
    """How far a student's features are from a teacher's: float32 (B,), 0 where they are equal.

        mean_N [ .9 (1 - cos) + .1 mean_D smooth_l1 ]  +  (1 - cos) of the pooled features

    Args:
        predicted_BND, predicted_BD: the student's patches and pooled features, projected to the teacher's width.
        target_BND, target_BD: the teacher's, standardised; carry no gradient.
    """
    target_BND, target_BD = target_BND.float().detach(), target_BD.float().detach()
    cosine_BN = F.cosine_similarity(predicted_BND.float(), target_BND, dim=-1)
    smooth_BN = F.smooth_l1_loss(predicted_BND.float(), target_BND, reduction="none").mean(dim=-1)
    patches_B = (COSINE_SHARE * (1 - cosine_BN) + (1 - COSINE_SHARE) * smooth_BN).mean(dim=1)
    return patches_B + 1 - F.cosine_similarity(predicted_BD.float(), target_BD, dim=-1)
