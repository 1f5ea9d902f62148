"""Broken weights are refused before a run begins."""

import pytest
import timm
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.load_network import load_network
from bigtrain.models.network import build_trunk
from bigtrain.models.read_weights import read_file
from bigtrain.models.sanity import check_sees

TINY = "test_vit"


@pytest.fixture
def file(tmp_path):
    """file(**what is beside the weights) -> a .pth of a tiny ViT, and its state."""

    def write(change=None, **beside):
        torch.manual_seed(0)
        state = timm.create_model(TINY, num_classes=0).state_dict()
        if change:
            change(state)
        torch.save({"state_dict": state, **beside} if beside else state, tmp_path / "net.pth")
        return tmp_path / "net.pth", state

    return write


def test_nan_weights(file):
    """NaN and infinite weights are named."""
    path, _ = file(lambda state: state["blocks.1.mlp.fc1.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"NaN or infinite \(blocks\.1\.mlp\.fc1\.weight\)"):
        load_network(path, Architecture(TINY))


@pytest.mark.parametrize(
    ("value", "sentence"), [(0.0, "all pictures the same features"), (1e38, "NaN or infinite features")]
)
def test_blind_network(file, value, sentence):
    """Weights that give every picture the same features, or overflow, are refused."""
    path, _ = file(lambda state: [weight.fill_(value) for weight in state.values()])
    network = load_network(path, Architecture(TINY))
    with pytest.raises(ValueError, match=sentence):
        check_sees(network, network.image_size)


def test_sees(file):
    """Random weights see something; a size that does not fit is refused."""
    network = load_network(file()[0], Architecture(TINY))
    check_sees(network, network.image_size)
    with pytest.raises(ValueError, match="does not take pictures of 33 pixels"):
        check_sees(network, 33)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_moving_average(file, name):
    """A moving average beside the raw weights is taken, and said."""
    average = {key: value + 1 for key, value in timm.create_model(TINY, num_classes=0).state_dict().items()}
    path, state = file(**{name: average})
    found, _, said = read_file(path)
    assert torch.equal(found["cls_token"], average["cls_token"]) and not torch.equal(
        found["cls_token"], state["cls_token"]
    )
    assert name in said and said in load_network(path, Architecture(TINY)).report


def test_wrong_tag():
    """A tag that timm does not have is answered with those that it has."""
    with pytest.raises(ValueError, match=r"no weights 'nope' of resnet18; it has .*a1_in1k"):
        build_trunk(Architecture("resnet18.nope"))


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_224", "vit_dwee_patch16_reg1_gap_256", "vit_relpos_small_patch16_224"]
)
def test_any_vit_as_network(name):
    """A ViT that is not plain is a network like any other."""
    assert build_trunk(Architecture(name, depth=1) if "dwee" in name else Architecture(name)) is not None
