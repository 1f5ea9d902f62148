"""Any network as a trunk: its features at a named layer, its file, its weights from elsewhere."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from bigtrain.data.decode import Picture
from bigtrain.data.views import CentreCrop
from bigtrain.methods.deep_novelty.network import Branches
from bigtrain.models.architecture import Architecture
from bigtrain.models.flops import counted_flops
from bigtrain.models.layers import PooledLayer, layers_of
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network, build_trunk, dropouts_of_fc, has_batch_norm, trunk_width
from tests.lite0 import lite0

ROOT = Path(__file__).parents[2]
PAPERS = [("vgg16", 4096), ("alexnet", 4096), ("resnet50", 2048), ("vit_tiny_patch16_224", 192)]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "width"), PAPERS)
@torch.no_grad()
def test_paper_network_widths(name, width):
    """The networks of the papers give features as wide as what their classifier sees."""
    trunk = build_trunk(Architecture(name, image_size=64)).eval()
    assert trunk_width(trunk) == width
    assert trunk(IMAGES).shape == (2, width)


def test_dropout_of_fc():
    """In training VGG applies dropout to the features of fc6 and fc7, at the rate set; a ResNet has no such layers."""
    trunk = build_trunk(Architecture("vgg11")).eval()
    with torch.no_grad():
        whole = trunk(IMAGES)
        for dropout in dropouts_of_fc(trunk):
            dropout.p = 0.5
        assert torch.equal(trunk(IMAGES), whole)
        fc6 = trunk.train().pre_logits.drop(torch.ones(1, 10_000))
        assert 0.45 < (fc6 == 0).float().mean() < 0.55
        assert (trunk(IMAGES) == 0).float().mean() > (whole == 0).float().mean() + 0.1
    assert len(dropouts_of_fc(build_trunk(Architecture("alexnet")))) == 2
    assert dropouts_of_fc(build_trunk(Architecture("resnet18"))) == []


@torch.no_grad()
def test_trunk_equals_timm():
    """The end of the trunk is what timm's own classifier is fed."""
    torch.manual_seed(0)
    whole = timm.create_model("resnet18", num_classes=5).eval()
    trunk = build_trunk(Architecture("resnet18")).eval()
    trunk.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    torch.testing.assert_close(whole.fc(trunk(IMAGES)), whole(IMAGES))


@torch.no_grad()
def test_alexnet_equals_torchvision():
    """AlexNet is torchvision's, up to fc7."""
    torch.manual_seed(0)
    whole = torchvision.models.alexnet().eval()
    trunk = build_trunk(Architecture("alexnet")).eval()
    trunk.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("classifier.6")})
    torch.testing.assert_close(whole.classifier[6](trunk(IMAGES)), whole(IMAGES))


@torch.no_grad()
def test_named_layer():
    """A named layer's output is averaged over spatial positions or tokens."""
    resnet = build_trunk(Architecture("resnet18")).eval()
    by_hand = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(IMAGES))))))
    torch.testing.assert_close(PooledLayer(resnet, "layer2")(IMAGES), by_hand.mean((2, 3)))
    vit = build_trunk(Architecture("vit_tiny_patch16_224", 64)).eval()
    tokens = vit.patch_embed(IMAGES)
    tokens = vit.blocks[0](vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens))))
    torch.testing.assert_close(PooledLayer(vit, "blocks.0")(IMAGES), tokens.mean(1))
    assert PooledLayer(build_trunk(Architecture("swin_tiny_patch4_window7_224", 224)), "layers.0")(
        torch.zeros(1, 3, 224, 224)
    ).shape == (1, 96)


def test_unknown_layer():
    """A layer that does not exist is refused, with the list of those that do."""
    trunk = build_trunk(Architecture("resnet18"))
    assert {"conv1", "layer1", "layer4.1.conv2", "global_pool"} <= set(layers_of(trunk))
    with pytest.raises(ValueError, match=r"no layer 'layer9'; it has conv1, .*layer4"):
        PooledLayer(trunk, "layer9")


def test_network_file_round_trip(tmp_path):
    """A network's file gives it back with its heads, and refuses another architecture."""
    torch.manual_seed(0)
    trunk = build_trunk(Architecture("resnet18"))
    heads, classes = {"known": nn.Linear(512, 2)}, {"known": ("ant", "bee")}
    saved = Network(trunk, Architecture("resnet18"), (0.1,) * 3, (0.2,) * 3, heads, classes)
    saved.save(tmp_path / "network.safetensors")
    loaded = load_network(str(tmp_path / "network.safetensors"))
    assert (loaded.architecture, loaded.mean, loaded.std) == (saved.architecture, saved.mean, saved.std)
    assert loaded.classes == classes and not loaded.trunk.training
    for module, other in ((trunk, loaded.trunk), (heads["known"], loaded.heads["known"])):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in module.state_dict().items())
    with pytest.raises(ValueError, match="of model resnet18, and model vgg16 was asked for: leave --arch out"):
        load_network(str(tmp_path / "network.safetensors"), Architecture("vgg16"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_state_dict(tmp_path, suffix):
    """Weights under timm's own names are read with the architecture they fit, which must be named."""
    torch.manual_seed(0)
    state = timm.create_model("resnet18").state_dict()  # with the classifier of its own task
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = load_network(str(path), Architecture("resnet18"))
    assert torch.equal(loaded.trunk.conv1.weight, state["conv1.weight"])
    with pytest.raises(ValueError, match="name it, as in --arch resnet50"):
        load_network(str(path))
    with pytest.raises(ValueError, match="does not fit the network"):
        load_network(str(path), Architecture("vgg16"))


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model 'resnet5000'; near it: .*alexnet"):
        load_network("resnet5000")
    with pytest.raises(ValueError, match="does not exist"):
        load_network(str(tmp_path / "nothing.pth"))
    assert load_network("resnet18", pretrained=False).report == "random weights"
    code = "from bigtrain.models.load_network import load_network; load_network('resnet18')"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.stderr.strip().splitlines()[-1].startswith("ValueError: the weights of 'resnet18' cannot be downloaded (")
    )


@pytest.mark.skipif("BIGTRAIN_TEST_DATA" not in os.environ, reason="needs real pictures")
@torch.no_grad()
def test_imagenet_accuracy():
    """On 64-pixel pictures top-1 accuracy over ImageNet's 1000 classes is about 25%; it must exceed 15%."""
    network = lite0()
    wnids, view = network.classes["imagenet"], CentreCrop(128, 128)
    pictures, shown = [], []
    with tarfile.open(Path(os.environ["BIGTRAIN_TEST_DATA"], "tiny-imagenet-120.tar.gz")) as tar:
        for member in tar:
            wnid = Path(member.name).name.split("_")[0]
            if member.isfile() and "/train/" in member.name and wnid in wnids and shown.count(wnid) < 2:
                pictures.append(Picture(tar.extractfile(member).read()))
                shown.append(wnid)
            if len(shown) == 100:
                break
    images = torch.from_numpy(np.stack([view(picture, np.random.default_rng(0))["image"] for picture in pictures]))
    logits = network.heads["imagenet"](network.trunk(network.normalise(images)))
    assert np.mean([wnids[n] == wnid for n, wnid in zip(logits.argmax(1).tolist(), shown, strict=True)]) > 0.15


def test_two_branches():
    """Two branches are one trunk with two heads, whose biases start at zero."""
    torch.manual_seed(0)
    branches = Branches(build_trunk(Architecture("resnet18")).eval(), {"known": 3, "reference": 5}).eval()
    images = {"known": IMAGES, "reference": torch.randn(4, 3, 64, 64)}
    logits = branches(images)
    assert {name: tuple(value.shape) for name, value in logits.items()} == {"known": (2, 3), "reference": (4, 5)}
    assert branches.first_class == {}  # each head has its own columns
    for name, image_B3HW in images.items():
        alone = F.linear(branches.trunk(image_B3HW), branches.heads[name].weight, branches.heads[name].bias)
        torch.testing.assert_close(logits[name], alone, atol=1e-5, rtol=1e-4)
    assert all(not head.bias.any() for head in branches.linear_heads().values())
    assert 0.008 < branches.heads["reference"].weight.detach().std() < 0.012


def test_joint_heads():
    """In joint mode all heads answer for each image."""
    torch.manual_seed(0)
    branches = Branches(build_trunk(Architecture("resnet18")).eval(), {"known": 3, "reference": 5}, joint=True).eval()
    logits = branches({"known": IMAGES, "reference": IMAGES})
    assert logits["known"].shape == logits["reference"].shape == (2, 8)
    assert branches.first_class == {"known": 0, "reference": 3}
    features = branches.trunk(IMAGES)
    by_hand = torch.cat([branches.heads["known"](features), branches.heads["reference"](features)], dim=1)
    torch.testing.assert_close(logits["known"], by_hand, atol=1e-5, rtol=1e-4)


def test_flops_are_counted_as_products():
    # 3 x 3 x 3 x 8 weights at 64 x 64 positions, and 8 x 2 after the mean: 2 per multiply-add
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert counted_flops(net, 64) == 2 * (27 * 8 * 64 * 64 + 8 * 2) and net.training


def test_which_networks_have_batch_norm():
    assert has_batch_norm(build_trunk(Architecture("resnet18")))
    assert not has_batch_norm(build_trunk(Architecture("vgg16")))


@pytest.mark.parametrize(
    ("name", "layers", "indices"),
    [
        ("resnet18", ["layer2", "layer4"], [2, 4]),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.11"], [3, 11]),
        ("vit_small_patch14_reg4_dinov2", ["blocks.0", "blocks.10"], [0, 10]),
        ("swin_tiny_patch4_window7_224", ["layers.1", "layers.3"], [1, 3]),  # channels last
    ],
)
@torch.no_grad()
def test_maps(name, layers, indices):
    """Unpooled maps of any layers, channels first and without prefix tokens, are those of timm's own pass."""
    network = load_network(name, pretrained=False)
    size = timm.get_pretrained_cfg(name).input_size[-1]
    image_B3HW = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = network.backbone.forward_intermediates(
        image_B3HW, indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
    )
    found = network.maps(layers)(image_B3HW)
    assert [m.shape for m in found] == [m.shape for m in expected]
    for found_BDhw, expected_BDhw in zip(found, expected, strict=True):
        torch.testing.assert_close(found_BDhw, expected_BDhw, rtol=1e-4, atol=1e-4)


def test_no_map():
    """A layer that has no map is refused by name, and so is one that is not there."""
    network = load_network("resnet18", pretrained=False)
    with pytest.raises(ValueError, match=r"layer 'global_pool' gives \(1, 512\), which is no map"):
        network.maps(["global_pool"])(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="no layer 'nowhere'; it has conv1"):
        network.maps(["nowhere"])
