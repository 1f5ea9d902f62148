"""A network written in another library's form gives there what it gives here."""

import pytest
import timm
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network, as_vit
from bigtrain.models.save_as import save_as

NAMES = {  # timm's name: patch size
    "vit_tiny_patch16_224": 16,
    "vit_small_patch14_dinov2": 14,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_small_patch16_dinov3": 16,
    "vit_small_patch16_dinov3_qkvb": 16,
    "vit_small_plus_patch16_dinov3_qkvb": 16,
    "vit_base_patch16_clip_quickgelu_224": 16,
    "vit_base_patch32_clip_224": 32,
    "vit_base_patch16_siglip_224": 16,
}


def made(name):
    torch.manual_seed(0)
    architecture = Architecture(name, 3 * NAMES.get(name, 16), depth=2)
    net = architecture.build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return Network(as_vit(net, "auto"), architecture, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("name", NAMES)
def test_transformers(tmp_path, name):
    """transformers loads every key, and its forward pass is ours; so does bigtrain, with the same pixels."""
    transformers = pytest.importorskip("transformers")
    network = made(name)
    save_as("hf", network, tmp_path / "out", "# A card")
    theirs, about = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not about["unexpected_keys"] and {key.split(".")[0] for key in about["missing_keys"]} <= {"pooler"}
    side = network.image_size
    image_B3HW = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected_BTD = theirs.eval()(pixel_values=image_B3HW).last_hidden_state
        if "clip" in name:
            expected_BTD = theirs.post_layernorm(expected_BTD)
        (ours,) = network.vit(image_B3HW)
        tokens_BND = ours.tokens_BND
        torch.testing.assert_close(tokens_BND, expected_BTD[:, network.vit.prefix_tokens :], rtol=3e-4, atol=3e-4)
        again = load_network(tmp_path / "out")
        torch.testing.assert_close(again.vit(image_B3HW)[0].tokens_BND, tokens_BND, rtol=1e-4, atol=1e-4)
    assert (again.mean, again.std) == (network.mean, network.std)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_timm(tmp_path, name):
    """timm loads the folder by itself, and so does bigtrain, with the same pixels."""
    network = made(name)
    save_as("timm", network, tmp_path / "out", "# A card")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    side = network.image_size
    image_B3HW = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected_BD = network.backbone(image_B3HW)
        torch.testing.assert_close(theirs(image_B3HW), expected_BD, rtol=1e-4, atol=1e-4)
        again = load_network(tmp_path / "out")
        torch.testing.assert_close(again.backbone(image_B3HW), expected_BD, rtol=1e-4, atol=1e-4)
    assert (again.mean, again.std) == (network.mean, network.std) == (tuple(theirs.pretrained_cfg["mean"]), network.std)
    assert (tmp_path / "out" / "README.md").read_text() == "# A card"


def test_no_such_model():
    with pytest.raises(ValueError, match="transformers has no network like beit_base_patch16_224: use --save-as timm"):
        save_as("hf", made("beit_base_patch16_224"), None, "")
