"""Weights in and out: every key is accounted for, nothing runs code, and AugReg's arrays land where timm puts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigtrain.models.architecture import Architecture
from bigtrain.models.augreg import from_augreg
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT
from bigtrain.models.weights import load_matching

TOP = Path(__file__).parents[2]
SMALL = Architecture("vit_tiny_patch16_224", 32, 8, 2)
HALF = (0.5, 0.5, 0.5)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_load(network, tmp_path, dtype):
    """What is saved is what is loaded, in float32 and float16, frozen and in eval mode."""
    net, vit = network()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    Network(vit, SMALL, mean, std).save(tmp_path / "v.safetensors", dtype)
    loaded = load_network(str(tmp_path / "v.safetensors"))
    assert same(loaded.vit.backbone.state_dict(), {k: v.to(dtype).float() for k, v in net.state_dict().items()})
    assert (loaded.architecture, loaded.mean, loaded.std) == (SMALL, mean, std)
    assert not loaded.vit.training
    assert not any(p.requires_grad for p in loaded.vit.parameters())
    assert loaded.report.startswith(f"{len(net.state_dict())} keys matched")
    assert next(iter(load_file(tmp_path / "v.safetensors").values())).dtype == dtype
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_save_same_bytes(network, tmp_path):
    """The same network is saved as the same bytes."""
    for name in "ab":
        Network(network()[1], SMALL, HALF, HALF).save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_other_architecture(network, tmp_path):
    """An architecture other than the file's own is refused."""
    Network(network()[1], SMALL, HALF, HALF).save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"holds a network of depth 2, and depth 3 was asked for: leave --arch out"):
        load_network(str(tmp_path / "v.safetensors"), Architecture("vit_tiny_patch16_224", 32, 8, 3))


@pytest.fixture
def file_of(tmp_path):
    """file_of(state) -> a .safetensors file of plain tensors, as others write it."""

    def write(state, name="other.safetensors"):
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_key_mismatches(network, file_of):
    """Missing, unexpected and misshapen keys are named."""
    state = network()[0].state_dict()
    state["nrom.bias"] = state.pop("norm.bias")
    state["norm.weight"] = torch.ones(5)
    with pytest.raises(ValueError) as caught:
        load_network(file_of(state), SMALL)
    said = str(caught.value)
    assert f"{len(state) - 1} keys match" in said
    for part in ("1 missing (norm.bias)", "1 unexpected (nrom.bias)", "norm.weight (5,) for (192,)", "--arch"):
        assert part in said


def test_other_depth(network, file_of):
    """Weights of a network of another depth are refused, whether deeper or shallower."""
    deeper = file_of(network(depth=3)[0].state_dict())
    with pytest.raises(ValueError, match=r"12 unexpected \(blocks\.2\."):
        load_network(deeper, SMALL)
    with pytest.raises(ValueError, match=r"12 missing \(blocks\.3\."):
        load_network(deeper, Architecture("vit_tiny_patch16_224", 32, 8, 4))


def test_classifier_left_out(network, file_of):
    """The classifier of pretraining is left out and reported, but no other key beginning like it."""
    net = network()[0]
    state = {**net.state_dict(), "head.weight": torch.ones(10, 192), "head.bias": torch.ones(10)}
    loaded = load_network(file_of(state), SMALL)
    assert "left out: head.bias, head.weight" in loaded.report
    assert same(loaded.vit.backbone.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match=r"1 unexpected \(header\)"):
        load_network(file_of({**state, "header": torch.ones(1)}), SMALL)


def test_pooling_head_left_out(file_of):
    """A pooling head that is not the network's is left out with the classifier, and the tokens are still timm's."""
    theirs = timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=1)
    loaded = load_network(file_of(theirs.state_dict()), Architecture("vit_base_patch16_siglip_gap_224", 32, depth=1))
    assert "left out: attn_pool.kv.bias" in loaded.report
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval().forward_features(image)
        torch.testing.assert_close(loaded.vit(image)[0].tokens_BND, expected, rtol=1e-4, atol=1e-4)


def test_failed_load_changes_nothing():
    """Loading weights that do not fit leaves the network as it was."""
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=r"1 missing \(bias\)"):
        load_matching(module, {"weight": torch.zeros(2, 2)}, "file")
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"epoch": 3, "model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_pth_files_of_all_habits_load(network, tmp_path, wrap, prefix):
    state = network()[0].state_dict()
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / "v.pth")
    assert same(load_network(str(tmp_path / "v.pth"), SMALL).vit.backbone.state_dict(), state)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_malicious_pickle(tmp_path):
    """A pickle that runs code is refused without running it, in .pth and .npz files."""
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "v.pth")
    with pytest.raises(ValueError, match=r"without running code: it holds objects of posix.mkdir"):
        load_network(str(tmp_path / "v.pth"), SMALL)
    np.savez(tmp_path / "v.npz", cls=np.array([Malicious(tmp_path / "ran")], dtype=object))
    with pytest.raises(ValueError, match="npz of plain arrays"):
        load_network(str(tmp_path / "v.npz"), SMALL)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"junk"])
@pytest.mark.parametrize("name", ["v.safetensors", "v.pth", "v.npz"])
def test_missing_or_broken_file(tmp_path, name, content):
    """A missing file and a broken file are each refused in a sentence."""
    with pytest.raises(ValueError, match=r"does not exist: give a file of weights"):
        load_network(str(tmp_path / name), SMALL)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read|is empty|is cut short or damaged"):
        load_network(str(tmp_path / name), SMALL)


def test_pth_without_state_dict(tmp_path):
    """A .pth file without a state_dict is refused."""
    torch.save({"epoch": 3}, tmp_path / "v.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        load_network(str(tmp_path / "v.pth"), SMALL)


def test_architecture_needed(network, file_of):
    """A file without an architecture is an error that asks for one."""
    with pytest.raises(ValueError, match=r"name it, as in --arch resnet50 or --arch vit_base_patch16_224"):
        load_network(file_of(network()[0].state_dict()))


def test_resample_positions(network, file_of):
    """Positions are resampled to another image size as timm does it."""
    net = network("vit_small_patch14_reg4_dinov2", 56, 14)[0]
    loaded = load_network(file_of(net.state_dict()), Architecture("vit_small_patch14_reg4_dinov2", 84, 14, 2))
    net.set_input_size(img_size=(84, 84))
    torch.testing.assert_close(loaded.vit.backbone.pos_embed, net.pos_embed)
    assert loaded.vit.backbone.pos_embed.shape[1] == 36


def in_jax_layout(net, path, prefix=""):
    """The arrays of an AugReg .npz by the description of its format: dense kernels (in, out), heads apart."""
    arrays, heads = {}, net.blocks[0].attn.num_heads
    width = net.embed_dim // heads

    def put(name, weight=None, bias=None, kernel="kernel"):
        if weight is not None:
            arrays[f"{prefix}{name}/{kernel}"] = weight.detach().numpy()
        arrays[f"{prefix}{name}/bias"] = bias.detach().numpy()

    arrays[f"{prefix}cls"] = net.cls_token.detach().numpy()
    arrays[f"{prefix}Transformer/posembed_input/pos_embedding"] = net.pos_embed.detach().numpy()
    put("embedding", net.patch_embed.proj.weight.permute(2, 3, 1, 0), net.patch_embed.proj.bias)
    put("Transformer/encoder_norm", net.norm.weight, net.norm.bias, kernel="scale")
    put("head", net.head.weight.T, net.head.bias)
    for number, block in enumerate(net.blocks):
        at = f"Transformer/encoderblock_{number}"
        put(f"{at}/LayerNorm_0", block.norm1.weight, block.norm1.bias, kernel="scale")
        put(f"{at}/LayerNorm_2", block.norm2.weight, block.norm2.bias, kernel="scale")
        put(f"{at}/MlpBlock_3/Dense_0", block.mlp.fc1.weight.T, block.mlp.fc1.bias)
        put(f"{at}/MlpBlock_3/Dense_1", block.mlp.fc2.weight.T, block.mlp.fc2.bias)
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * net.embed_dim, (part + 1) * net.embed_dim)
            weight = block.attn.qkv.weight[rows].T.reshape(net.embed_dim, heads, width)
            bias = block.attn.qkv.bias[rows].reshape(heads, width)
            put(f"{at}/MultiHeadDotProductAttention_1/{name}", weight, bias)
        out = block.attn.proj.weight.T.reshape(heads, width, net.embed_dim)
        put(f"{at}/MultiHeadDotProductAttention_1/out", out, block.attn.proj.bias)
    np.savez(path, **arrays)
    return arrays


@pytest.fixture
def augreg(network, tmp_path):
    """A network with a classifier, and its weights as AugReg writes them."""
    net = network()[0]
    net.reset_classifier(10)
    nn.init.normal_(net.head.weight)
    in_jax_layout(net, tmp_path / "augreg.npz")
    return net, tmp_path / "augreg.npz"


def test_augreg_round_trip(augreg):
    """AugReg arrays become the network they came from, without its classifier."""
    net, path = augreg
    loaded = load_network(str(path), SMALL)
    expected = {key: value for key, value in net.state_dict().items() if not key.startswith("head")}
    assert same(loaded.vit.backbone.state_dict(), expected)
    assert "left out: head.bias, head.weight" in loaded.report
    assert (loaded.mean, loaded.std) == (HALF, HALF)


def test_augreg_equals_timm(augreg):
    """AugReg arrays load as timm itself loads them."""
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2)
    theirs.load_pretrained(str(augreg[1]))
    expected = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head")}
    assert same(load_network(str(augreg[1]), SMALL).vit.backbone.state_dict(), expected)


def test_augreg_mismatches(augreg, tmp_path):
    """AugReg arrays that are missing or unknown are reported, and a prefix `params/` is understood."""
    net, _ = augreg
    arrays = in_jax_layout(net, tmp_path / "whole.npz", prefix="params/")
    assert from_augreg(tmp_path / "whole.npz").keys() == net.state_dict().keys()
    at = "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    np.savez(tmp_path / "no_key.npz", **{key: a for key, a in arrays.items() if key != f"{at}/key/kernel"})
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight \(384, 192\) for \(576, 192\)"):
        load_network(str(tmp_path / "no_key.npz"), SMALL)
    np.savez(tmp_path / "more.npz", **arrays, **{"params/Transformer/encoderblock_1/Odd/kernel": np.ones(3)})
    with pytest.raises(ValueError, match=r"1 unexpected \(Transformer/encoderblock_1/Odd/kernel\)"):
        load_network(str(tmp_path / "more.npz"), SMALL)


def test_timm_name_offline(tmp_path):
    """A timm name without internet access or a cache is refused in one sentence."""
    code = "import sys; from bigtrain.models.load_network import load_network; load_network(sys.argv[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, "vit_tiny_patch16_224.augreg_in21k"]
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: the weights of 'vit_tiny_patch16_224.augreg_in21k' cannot be downloaded (")
    assert "give a local file" in last


def test_timm_name_with_architecture():
    """A timm name with an architecture beside it is refused."""
    with pytest.raises(ValueError, match=r"already names a network: leave it out"):
        load_network("vit_tiny_patch16_224.augreg_in21k", SMALL)


def test_embedded_description(network, tmp_path):
    """The description embedded in a file is JSON that says what the network is."""
    from safetensors import safe_open

    Network(ViT(network()[0]), SMALL, HALF, HALF).save(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        (about,) = (json.loads(text) for text in file.metadata().values())
    assert about["architecture"]["model"] == "vit_tiny_patch16_224"
