"""The equations of PANDA: Reiss, Cohen, Bergman & Hoshen, CVPR 2021."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def compactness_loss(features_BD: Tensor, centre_D: Tensor) -> Tensor:
    """Compactness loss, PANDA eq. 1, over the features' width as in the authors' code:

        l_B = || phi(x) - c ||^2 / D

    Args:
        features_BD: of the network that is adapted.
        centre_D: c, the mean feature of the known images before adaptation; carries no gradient.

    Returns:
        loss_B: float32, >= 0.
    """
    return (features_BD.float() - centre_D.detach()).square().mean(dim=1)


def freeze_all_but(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Let only the parameters of some layers learn; the same module.

    Raises:
        ValueError: the network has no such layer, or nothing in it learns.
    """
    known = dict(network.named_modules())
    if unknown := [layer for layer in layers if layer not in known]:
        own = ", ".join(name for name in known if name and "." not in name)
        raise ValueError(f"--tuned-layers names {', '.join(unknown)}, and the network has {own}.")
    network.requires_grad_(False)
    for layer in layers:
        known[layer].requires_grad_(True)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"--tuned-layers {' '.join(layers)} have no weights to learn: name others.")
    return network
