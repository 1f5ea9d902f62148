"""Low-rank updates: nothing at the start, merged without a difference, and little that learns."""

import pytest
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.lora import LowRank, add_low_rank, merge_low_rank
from bigtrain.models.vit import ViT


def test_update_by_hand():
    """W + (alpha / r) B A, worked out for rank 1."""
    update = LowRank(2, 3, rank=1, alpha=4)
    with torch.no_grad():
        update.down_RD.copy_(torch.tensor([[1.0, 2, 3]]))
        update.up_OR.copy_(torch.tensor([[1.0], [-1]]))
    expected_OD = torch.ones(2, 3) + 4 * torch.tensor([[1.0, 2, 3], [-1, -2, -3]])
    torch.testing.assert_close(update(torch.ones(2, 3)), expected_OD)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_merged(name):
    """A fresh update changes nothing; a trained one gives the same when merged, under the old names."""
    torch.manual_seed(0)
    side = 28 if "14" in name else 32
    vit = ViT(Architecture(name, side, depth=2).build()).eval()
    names = list(vit.state_dict())
    image_B3HW = torch.randn(2, 3, side, side)
    before = vit(image_B3HW)[0].tokens_BND.detach()
    add_low_rank(vit.backbone.blocks[-1:], 4)
    torch.testing.assert_close(vit(image_B3HW)[0].tokens_BND, before)
    learns = [key for key, p in vit.backbone.blocks[-1].named_parameters() if p.requires_grad]
    assert learns and all(key.endswith(("down_RD", "up_OR")) for key in learns)
    for key, parameter in vit.named_parameters():
        if key.endswith("up_OR"):
            torch.nn.init.normal_(parameter, std=0.1)
    trained = vit(image_B3HW)[0].tokens_BND.detach()
    assert (trained - before).abs().max() > 1e-3
    merge_low_rank(vit)
    assert set(vit.state_dict()) == set(names)
    torch.testing.assert_close(vit(image_B3HW)[0].tokens_BND, trained, rtol=1e-4, atol=1e-5)


def test_rank_too_high():
    vit = ViT(Architecture("vit_tiny_patch16_224", 32, depth=1).build())
    with pytest.raises(ValueError, match="--lora-rank is 192, and the tuned layers are 192 wide: use 1 to 191"):
        add_low_rank(vit.backbone.blocks, 192)
