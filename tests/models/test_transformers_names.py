"""Vision models of Hugging Face's transformers, read from their folders: their own forward pass is the oracle."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.models.architecture import Architecture
from bigtrain.models.load_network import load_network
from bigtrain.models.transformers_names import architecture_of

transformers = pytest.importorskip("transformers")
SMALL = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 2}
MODELS = {  # name: config class, its settings, model class, timm's name
    "vit": ("ViTConfig", {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "image_size": 48,
                          "patch_size": 16, **SMALL}, "ViTModel", "vit_tiny_patch16_224"),
    "dinov2": ("Dinov2Config", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 42, "patch_size": 14,
                                **SMALL}, "Dinov2Model", "vit_small_patch14_dinov2"),
    "dinov2 with registers": (
        "Dinov2WithRegistersConfig",
        {"hidden_size": 384, "num_attention_heads": 6, "image_size": 42, "patch_size": 14, **SMALL},
        "Dinov2WithRegistersModel", "vit_small_patch14_reg4_dinov2"),
    "dinov3": ("DINOv3ViTConfig", {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
                                   "num_hidden_layers": 2, "image_size": 48, "patch_size": 16,
                                   "num_register_tokens": 4}, "DINOv3ViTModel", "vit_small_patch16_dinov3_qkvb"),
    "dinov3 gated": ("DINOv3ViTConfig", {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
                                         "num_hidden_layers": 2, "image_size": 48, "patch_size": 16,
                                         "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
                     "DINOv3ViTModel", "vit_small_plus_patch16_dinov3_qkvb"),
    "clip quick gelu": ("CLIPVisionConfig", {**CLIP, "image_size": 48, "patch_size": 16}, "CLIPVisionModel",
                        "vit_base_patch16_clip_quickgelu_224"),
    "clip gelu": ("CLIPVisionConfig", {**CLIP, "image_size": 64, "patch_size": 32, "hidden_act": "gelu"},
                  "CLIPVisionModel", "vit_base_patch16_clip_224"),
    "siglip": ("SiglipVisionConfig", {**CLIP, "image_size": 48, "patch_size": 16}, "SiglipVisionModel",
               "vit_base_patch16_siglip_224"),
}  # fmt: skip


def made(name):
    """One of transformers' models with random weights, biases and tokens."""
    config_name, settings, model_name, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def same_tokens(model, vit, tolerance=2e-4):
    side = model.config.image_size
    image_B3HW = torch.randn(2, 3, side, side)
    with torch.no_grad():
        theirs = model(pixel_values=image_B3HW)
        (ours,) = vit(image_B3HW)
    expected_BTD = theirs.last_hidden_state
    if "clip" in model.config.model_type:  # it leaves the final norm to [CLS] alone
        expected_BTD = model.post_layernorm(expected_BTD).detach()
    assert expected_BTD.std(dim=1).mean() > 0.03
    torch.testing.assert_close(ours.tokens_BND, expected_BTD[:, vit.prefix_tokens :], rtol=tolerance, atol=tolerance)
    if vit.guide == "the pooling query":
        pooled_BD = vit.backbone(image_B3HW)
        torch.testing.assert_close(pooled_BD, theirs.pooler_output, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_folder(tmp_path, name):
    """A folder that transformers saved loads by itself, and gives what transformers gives."""
    model = made(name)
    model.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    network = load_network(tmp_path)
    assert network.architecture.model == MODELS[name][3]
    assert (network.mean, network.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert "in transformers' names" in network.report
    same_tokens(model, network.vit, 3e-3 if name == "siglip" else 2e-4)  # timm's GELU is exact, theirs by tanh


def test_student_and_teacher(tmp_path):
    """Of two networks under transformers' names the teacher is taken; two of a kind are refused."""
    tensors = {key: value.clone() for key, value in made("dinov2").state_dict().items()}
    both = {f"student.{key}": value + 1 for key, value in tensors.items()}
    architecture = Architecture("vit_small_patch14_dinov2", 42, depth=2)
    save_file(both | {f"teacher.{key}": value for key, value in tensors.items()}, tmp_path / "v.safetensors")
    loaded = load_network(tmp_path / "v.safetensors", architecture)
    assert torch.equal(loaded.backbone.state_dict()["norm.weight"], tensors["layernorm.weight"])
    save_file(both | {f"other.{key}": value for key, value in tensors.items()}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"several such networks \(other, student\)"):
        load_network(tmp_path / "v.safetensors", architecture)


def test_other_heads(tmp_path):
    """A config whose heads or activation are not those of timm's network is refused: no shape would tell."""
    model = made("vit")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 6}))
    with pytest.raises(ValueError, match="has 6 heads of attention, and vit_tiny_patch16_224 3"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="has the activation relu, and timm's vit has gelu"):
        load_network(tmp_path)


def test_sharded_folder(tmp_path):
    """Weights in several files are put together; a missing one is named."""
    model = made("dinov2")
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    files = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(files) > 2
    same_tokens(model, load_network(tmp_path).vit)
    files[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks {files[1].name}, which .* lists: download it too"):
        load_network(tmp_path)


def test_two_towers(tmp_path):
    """Of a pair of towers the vision tower is taken; text towers alone are refused by what they are."""
    vision = {**CLIP, "image_size": 48, "patch_size": 16}
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 50,
    }
    pair = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    pair.save_pretrained(tmp_path / "pair")
    same_tokens(pair.vision_model, load_network(tmp_path / "pair").vit)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)).save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError, match="holds a clip_text_model model, and of transformers' models those of vit, dinov2"
    ):
        load_network(tmp_path / "text")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, "holds a swin model"),
        ({}, "a model of unknown kind"),
        ({"model_type": "dinov2", "hidden_size": 100}, "is 100 wide, and timm has no dinov2 of that width"),
    ],
)
def test_other_models(config, message):
    with pytest.raises(ValueError, match=message):
        architecture_of(config, "folder")
