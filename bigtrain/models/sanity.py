"""Whether a network sees anything at all: broken weights are found before a run begins, not by its figures."""

from __future__ import annotations

import torch

from bigtrain.models.network import Network


def check_sees(network: Network, image_size: int) -> None:
    """Refuse a network that does not take images of this size, or that sees nothing in them: its features are NaN or
    infinite, or the same for every image."""
    noise_23HW = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    noise_23HW[1] = noise_23HW[1].mean()
    name = network.architecture.model
    try:
        with torch.no_grad():
            features_2D = network.backbone(network.normalise((noise_23HW * 255).to(torch.uint8)))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{name} does not take pictures of {image_size} pixels ({error}): give another --image-size, such as the "
            "one it was trained with."
        ) from error
    if not bool(features_2D.isfinite().all()):
        raise ValueError(f"{name} gives NaN or infinite features ({network.report}): its weights are broken.")
    if torch.equal(features_2D[0], features_2D[1]):
        raise ValueError(f"{name} gives all pictures the same features ({network.report}): its weights are broken.")
