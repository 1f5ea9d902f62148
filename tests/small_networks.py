"""Small networks whose every part has an effect."""

import pytest
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.vit import ViT


@pytest.fixture
def network():
    """network(model, ...) -> (its timm backbone, with all weights random, and our ViT on the same backbone)."""

    def build(model="vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2, seed=0, **options):
        torch.manual_seed(seed)
        backbone = Architecture(model, image_size, patch_size, depth).build(**options).eval()
        for name, parameter in backbone.named_parameters():  # timm starts layer scales near 0, tokens and biases at 0
            spread = torch.randn_like(parameter) * (0.3 if parameter.squeeze().ndim < 2 else 0.05)
            parameter.data = spread + (1 if name.endswith(("norm1.weight", "norm2.weight", "gamma")) else 0)
        return backbone, ViT(backbone)

    return build
