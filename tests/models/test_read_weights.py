"""Files of weights as their owners publish them and as trainers leave them: what is taken, and what is said of it."""

import argparse
import json
import pathlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from bigtrain.models.architecture import Architecture
from bigtrain.models.load_network import load_network

TINY = "vit_tiny_patch16_224"
SMALL = Architecture(TINY, 48, depth=2)
WEIGHTS = timm.create_model(TINY, img_size=48, depth=2, num_classes=0).state_dict()
RAW = {key: value - 1 for key, value in WEIGHTS.items()}  # beside the ones that are to be taken


def below(prefix, weights=WEIGHTS):
    return {prefix + key: value for key, value in weights.items()}


def renamed(weights, **names):
    """The weights with the first part of some keys called otherwise."""
    return {
        ".".join([names.get(key.split(".")[0], key.split(".")[0]), *key.split(".")[1:]]): v
        for key, v in weights.items()
    }


MASK = {"mask_token": torch.zeros(1, 192)}
MAE = {**MASK, "decoder_embed.weight": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.zeros(1)}
HEADS = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
OPTIONS = {"args": argparse.Namespace(lr=0.1, output=pathlib.Path("/x")), "epoch": np.int64(3), "loss": np.float64(0.5)}
OPTIMIZER = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}}}
FILES = {  # name: what torch.save is given, the file's ending, what is said
    "bare": (WEIGHTS, ".pth", "30 keys matched"),
    "Hugging Face's .bin": (WEIGHTS, ".bin", "30 keys matched"),
    "upper case": (WEIGHTS, ".PTH", "30 keys matched"),
    "compiled": (below("_orig_mod."), ".pt", "below _orig_mod"),
    "compiled, then DDP": (below("module._orig_mod."), ".pth", "below module._orig_mod"),
    "Lightning": ({"state_dict": below("model."), "hyper_parameters": {"lr": 0.1}, **OPTIONS}, ".ckpt", "below model"),
    "Lightning with parts": (
        {"state_dict": {**below("net.backbone."), "net.head.weight": torch.zeros(3, 3), "loss.center": torch.zeros(3)}},
        ".ckpt", "below net.backbone, loss, net beside it left out"),
    "timm's train.py": ({"state_dict": WEIGHTS, **OPTIONS, **OPTIMIZER}, ".pth.tar", "30 keys matched"),
    "an average beside it": (
        {"state_dict": RAW, "state_dict_ema": WEIGHTS, **OPTIONS}, ".pth.tar", "average state_dict_ema is taken"),
    "DINO": ({"student": below("module.backbone.", RAW), "teacher": below("backbone."), **OPTIONS, **OPTIMIZER}, ".pth",
             "average teacher is taken, not the raw weights student"),
    "student and teacher in one": (
        {"state_dict": below("student.encoder.", RAW) | below("teacher.encoder.")}, ".ckpt", "below teacher.encoder"),
    "MAE with its decoder": ({"model": WEIGHTS | MAE}, ".pth", "left out: decoder_blocks.0.norm1.weight"),
    "finetuned MAE": ({"model": renamed(WEIGHTS, norm="fc_norm") | HEADS}, ".pth", "its fc_norm serves as norm"),
    "a classifier": (WEIGHTS | HEADS, ".pth", "left out: head.bias, head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    """The weights are found wherever they lie, and it is said what was taken."""
    held, suffix, said = FILES[name]
    path = tmp_path / f"weights{suffix}"
    torch.save(held, path)
    network = load_network(path, SMALL)
    assert said in network.report
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[key], WEIGHTS[key]) for key in WEIGHTS)


def test_safetensors_with_prefix(tmp_path, monkeypatch):
    """A prefix is found in .safetensors too, and ~ is the home folder."""
    save_file(below("encoder."), tmp_path / "v.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "below encoder" in load_network("~/v.safetensors", SMALL).report


@pytest.mark.parametrize("registers", [False, True])
def test_facebooks_dinov2(tmp_path, registers):
    """Facebook's DINOv2 has a mask token, and positions and registers that timm's network names otherwise."""
    arch = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    net = timm.create_model(arch, img_size=42, depth=2, num_classes=0).eval()
    theirs = dict(net.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    if registers:
        position_ND = torch.cat([torch.full((1, 1, 384), 0.5), theirs["pos_embed"]], dim=1)
        theirs |= {"register_tokens": theirs.pop("reg_token"), "pos_embed": position_ND}
        theirs["cls_token"] = theirs["cls_token"] - 0.5
    torch.save(theirs, tmp_path / "v.pth")
    loaded = load_network(tmp_path / "v.pth", Architecture(arch, 42, depth=2)).backbone.state_dict()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(loaded[key], value)


def test_positions_of_another_grid(tmp_path):
    """Positions of another grid are resampled, and that is said; patches of another size are refused."""
    torch.save(timm.create_model(TINY, img_size=96, depth=2, num_classes=0).state_dict(), tmp_path / "v.pth")
    assert "positions resampled from 6 x 6 to 3 x 3" in load_network(tmp_path / "v.pth", SMALL).report
    torch.save(timm.create_model(TINY, patch_size=8, depth=2, num_classes=0).state_dict(), tmp_path / "v.pth")
    with pytest.raises(ValueError, match="has patches of 8 x 8 pixels, and the network of 16 x 16"):
        load_network(tmp_path / "v.pth", SMALL)


def test_relative_positions(tmp_path):
    """Tables of relative positions are resampled as timm does it."""
    torch.manual_seed(0)
    given = timm.create_model("beit_base_patch16_224", img_size=96, num_classes=0).eval()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save(given.state_dict(), tmp_path / "v.pth")
    loaded = load_network(tmp_path / "v.pth", Architecture("beit_base_patch16_224", 48))
    given.set_input_size((48, 48))
    image_B3HW = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected_BND = given.fc_norm(given.forward_features(image_B3HW))[:, 1:]
        torch.testing.assert_close(loaded.vit(image_B3HW)[0].tokens_BND, expected_BND, rtol=1e-3, atol=1e-3)


def test_weights_key(tmp_path):
    """Which of several weights is taken can be said, by their place or by their prefix; else it is asked for."""
    path = tmp_path / "v.pth"
    torch.save({"state_dict": RAW, "state_dict_ema": WEIGHTS}, path)
    loaded = load_network(path, SMALL, weights_key="state_dict")
    assert torch.equal(loaded.backbone.state_dict()["cls_token"], RAW["cls_token"])
    with pytest.raises(ValueError, match="has no weights 'nope'; it has state_dict, state_dict_ema"):
        load_network(path, SMALL, weights_key="nope")
    torch.save({"a": WEIGHTS, "b": RAW}, path)
    with pytest.raises(ValueError, match=r"several sets of weights \(a, b\): choose one with --weights-key"):
        load_network(path, SMALL)
    torch.save(below("encoder_q.") | below("encoder_k.", RAW), path)
    with pytest.raises(ValueError, match=r"several such networks \(encoder_k, encoder_q\)"):
        load_network(path, SMALL)
    assert "of the file's weights, encoder_q" in load_network(path, SMALL, weights_key="encoder_q").report


def test_which_of_several(tmp_path):
    """One of several networks is taken for its name, by whole words, or refused; never by chance."""
    path = tmp_path / "v.safetensors"
    for others, taken in (("student.", "teacher."), ("model.", "model_ema."), ("semantic.", "ema.")):
        save_file(below(others, RAW) | below(taken), path)
        loaded = load_network(path, SMALL)
        assert torch.equal(loaded.backbone.state_dict()["cls_token"], WEIGHTS["cls_token"])
        raw = load_network(path, SMALL, weights_key=others.rstrip("."))
        assert torch.equal(raw.backbone.state_dict()["cls_token"], RAW["cls_token"])
    save_file(below("teacher.clip.") | below("teacher.dino.", RAW), path)
    with pytest.raises(ValueError, match=r"several such networks \(teacher.clip, teacher.dino\)"):
        load_network(path, SMALL)
    with pytest.raises(ValueError, match="has no weights 'nope'; it has teacher"):
        load_network(path, SMALL, weights_key="nope")


def test_numbers_beside_weights(tmp_path):
    """Counters that are tensors hide no state_dict."""
    torch.save({"state_dict": WEIGHTS, "epoch": torch.tensor(3), "best": torch.tensor(0.5)}, tmp_path / "v.pth")
    assert load_network(tmp_path / "v.pth", SMALL).report.startswith("30 keys matched")


def test_relative_positions_file(tmp_path):
    """A file of a network with relative positions is built for the pictures to come, as a name is."""
    weights = timm.create_model("vit_relpos_small_patch16_224", num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "v.safetensors")
    arch = Architecture("vit_relpos_small_patch16_224")
    assert load_network(tmp_path / "v.safetensors", arch, image_size=64).vit.grid_size == (4, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_args": {"img_size": 48, "depth": 2, "num_heads": 6}}, "with other num_heads than timm defines"),
        ({"model_args": {"img_size": 48, "depth": 2, "in_chans": 3}, "mean": [0.1] * 3, "std": [0.2] * 3}, ""),
    ],
)
def test_timm_folder(tmp_path, config, message):
    """A folder whose network differs in what no shape tells is refused; older ones keep their pixels at the top."""
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY, **config}))
    if message:
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path)
    else:
        assert load_network(tmp_path).mean == (0.1, 0.1, 0.1)


def test_broken_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY}))
    with pytest.raises(ValueError, match="names 5, which lies outside of its folder"):
        load_network(tmp_path)


def test_mistyped_folder(tmp_path, monkeypatch):
    """A path below a folder that is there is no model of the hub."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/nope does not exist"):
        load_network("runs/nope")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Sign in", "is a web page, not weights"),
        (b"\x80\x02junk", "is cut short or damaged"),
    ],
)
def test_no_weights(tmp_path, content, message):
    """What was downloaded in place of weights is called what it is."""
    (tmp_path / "v.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "v.pth", SMALL)


def test_half_a_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "v.pth")
    whole = (tmp_path / "v.pth").read_bytes()
    (tmp_path / "v.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is cut short or damaged"):
        load_network(tmp_path / "v.pth", SMALL)


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, "a ResNet"),
        ({"text_model.a": torch.zeros(3), "text_model.b": torch.zeros(3)}, "a text tower"),
        ({"stages.0.a": torch.zeros(3), "stages.1.b": torch.zeros(3)}, "a network of stages"),
    ],
)
def test_weights_of_others(tmp_path, weights, kind):
    """Weights of another network are refused by what their names look like."""
    torch.save(weights, tmp_path / "v.pth")
    with pytest.raises(ValueError, match=f"0 keys match, 30 missing .*Its names look like those of {kind}"):
        load_network(tmp_path / "v.pth", SMALL)


def test_normalisation(tmp_path):
    """A file is normalised as its architecture is, unless something else is asked for; it is said how."""
    save_file(WEIGHTS, tmp_path / "v.safetensors")
    assert load_network(tmp_path / "v.safetensors", SMALL).mean == (0.5, 0.5, 0.5)
    dino = load_network(tmp_path / "v.safetensors", Architecture("vit_tiny_patch16_224.augreg_in21k", 48, depth=2))
    assert dino.mean == (0.5, 0.5, 0.5)
    other = load_network(tmp_path / "v.safetensors", SMALL, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert "pixels normalised by mean 0.1 0.2 0.3, std 1 1 1" in other.described
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1, num_classes=0).state_dict()
    save_file(theirs, tmp_path / "d.safetensors")
    loaded = load_network(tmp_path / "d.safetensors", Architecture("vit_small_patch14_dinov2", 28, depth=1))
    assert loaded.mean == (0.485, 0.456, 0.406)


def test_facebooks_dinov3(tmp_path):
    """Facebook's DINOv3 has storage tokens, a mask of biases, periods of its rotations, and scales of other names."""
    net = timm.create_model("vit_small_patch16_dinov3", img_size=48, depth=2, num_classes=0)
    theirs = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, value in net.state_dict().items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        theirs[key] = value
    for block in range(2):
        theirs |= {f"blocks.{block}.attn.qkv.{name}": torch.zeros(1152) for name in ("bias", "bias_mask")}
    torch.save({"teacher": below("backbone.", theirs)}, tmp_path / "v.pth")
    loaded = load_network(tmp_path / "v.pth", Architecture("vit_small_patch16_dinov3", 48, depth=2))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(loaded.backbone.state_dict()[key], value)


def test_openais_clip(tmp_path):
    """OpenAI's CLIP keeps both towers in one file, under names of its own."""
    name = "vit_base_patch32_clip_quickgelu_224"
    net = timm.create_model(name, depth=2, num_classes=0)
    names = {
        "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias", "attn.proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2.",
        "blocks.": "transformer.resblocks.", "norm_pre.": "ln_pre.", "patch_embed.proj.": "conv1.",
    }  # fmt: skip
    theirs = {"transformer.resblocks.0.ln_1.weight": torch.zeros(512), "logit_scale": torch.tensor(4.6)}
    for key, value in net.state_dict().items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        key = f"visual.{'ln_post' + key[4:] if key.startswith('norm.') else key}"
        theirs[key] = value
    theirs["visual.class_embedding"] = theirs.pop("visual.cls_token").flatten()
    theirs["visual.positional_embedding"] = theirs.pop("visual.pos_embed")[0]
    theirs["visual.proj"] = torch.zeros(768, 512)
    torch.save(theirs, tmp_path / "v.pt")
    loaded = load_network(tmp_path / "v.pt", Architecture(name, depth=2))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(loaded.backbone.state_dict()[key], value)
