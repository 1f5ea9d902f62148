"""Schedules by hand, and what decays."""

import pytest
import torch
from torch import nn

from bigtrain.models.architecture import Architecture
from bigtrain.training.optim import adamw, cosine, decay_groups, follow, scaled_lr, schedule, set_schedule


def test_a_cosine_by_hand():
    assert [cosine(s, total=4, start=1.0, end=0.0) for s in (0, 1, 2, 4, 9)] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, 0, 0]
    )
    assert [cosine(s, total=10, start=0.04, end=0.5) for s in (0, 5, 10)] == pytest.approx([0.04, 0.27, 0.5])


def test_schedule():
    """The warm-up rises evenly to one, and the cosine then falls to 0, or the rate stays."""
    factors = [schedule("cosine", s, total=12, warmup=4) for s in range(13)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert [schedule("cosine", s, total=2) for s in (0, 1, 2)] == pytest.approx([1, 0.5, 0])
    assert schedule("cosine", 3, total=4, warmup=4) == 1  # nothing but warm-up
    assert schedule("cosine", 4, total=4, warmup=4) == 1
    assert [schedule("constant", s, total=9, warmup=2) for s in (0, 1, 2, 8)] == [0.5, 1, 1, 1]


def test_adamw_by_hand():
    """Two steps of torch's plain AdamW, with decay for matrices alone."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    groups = decay_groups(ours.named_parameters(), base_lr=0.1)
    optimizer = adamw(groups, torch.device("cpu"), lr=0.1, betas=(0.9, 0.95))
    set_schedule(optimizer, lr_factor=0.5, weight_decay=0.2)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.05, betas=(0.9, 0.95), foreach=False,
    )  # fmt: skip
    for one, its in ((ours, optimizer), (theirs, plain)):
        for step in range(2):
            one.zero_grad()
            (one(torch.arange(3.0) - step) ** 2).sum().backward()
            its.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_decay_groups():
    """Matrices decay, and `pos_embed` and `reg_token`; biases, norms and `cls_token` do not."""
    net = Architecture("vit_small_patch14_reg4_dinov2", 28, 14, 1).build()
    net.patch_embed.requires_grad_(False)
    named = dict(net.named_parameters())
    decays, not_decays = decay_groups(named.items(), base_lr=0.5)
    name_of = {p: name for name, p in named.items()}
    in_blocks = {f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {name_of[p] for p in decays["params"]} == in_blocks | {"pos_embed", "reg_token"}
    assert "cls_token" in {name_of[p] for p in not_decays["params"]}
    assert len(decays["params"]) + len(not_decays["params"]) == sum(p.requires_grad for p in named.values())
    assert (decays["decays"], not_decays["decays"], decays["base_lr"]) == (True, False, 0.5)


def test_set_schedule():
    """A schedule sets each group's own rate and decay."""
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    groups = [
        g
        for lr, layer in zip((1.0, 10.0), layers, strict=True)
        for g in decay_groups(layer.named_parameters(), base_lr=lr)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3)
    set_schedule(optimizer, lr_factor=0.5, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.2), (0.5, 0), (5, 0.2), (5, 0)]


def test_no_layer_decay():
    """Without layer decay there are two groups, whatever the depth."""
    net = Architecture("vit_tiny_patch16_224", 32, 8, 3).build()
    groups = decay_groups(net.named_parameters(), layer_decay=1.0, base_lr=0.5)
    assert [(g["decays"], g["base_lr"], len(g["params"])) for g in groups] == [(True, 0.5, 14), (False, 0.5, 28)]
    assert [len(g["params"]) for g in decay_groups([])] == [0, 0]  # as DeepSpeed and checkpoints count groups


@pytest.mark.parametrize("prefix", ["", "backbone.", "vit.backbone.", "module.vit.backbone."])
def test_layer_decay_rates(prefix):
    """Layer decay lowers the rates from the head to the embedding, as worked out by hand."""
    matrix, vector = (3, 2), (3,)
    rates = {  # name: (shape, base_lr) for 2 blocks, a rate of 8 and a layer decay of 1/2
        "head.weight": (matrix, 8),
        "fc_norm.bias": (vector, 8),
        "norm.weight": (vector, 8),
        "blocks.1.mlp.fc1.weight": (matrix, 4),
        "blocks.1.norm1.weight": (vector, 4),
        "blocks.0.attn.qkv.weight": (matrix, 2),
        "blocks.0.ls1.gamma": (vector, 2),
        "norm_pre.weight": (vector, 1),
        "patch_embed.proj.weight": ((3, 3, 2, 2), 1),
        "patch_embed.proj.bias": (vector, 1),
        "pos_embed": ((1, 4, 3), 1),
        "cls_token": ((1, 1, 3), 1),
        "reg_token": ((1, 4, 3), 1),
        "dist_token": ((1, 1, 3), 1),
    }
    named = {prefix + name: nn.Parameter(torch.zeros(shape)) for name, (shape, _) in rates.items()}
    groups = decay_groups(named.items(), layer_decay=0.5, base_lr=8.0, momentum=0.9)
    name_of = {p: name.removeprefix(prefix) for name, p in named.items()}
    got = [(name_of[p], group["base_lr"], group["decays"]) for group in groups for p in group["params"]]
    expected = {name: lr for name, (_, lr) in rates.items()}
    assert {name: lr for name, lr, _ in got} == expected
    assert len(got) == len(rates)  # each once
    assert {name for name, _, decays in got if decays} == {
        "head.weight", "blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.weight",
        "patch_embed.proj.weight", "pos_embed", "reg_token",
    }  # fmt: skip
    assert len(groups) == 8 and {group["momentum"] for group in groups} == {0.9}


def test_layer_decay_frozen():
    """Layer decay counts from the last block, even a frozen one, and leaves out what is frozen."""
    net = Architecture("vit_tiny_patch16_224", 32, 8, 4).build().requires_grad_(False)
    net.blocks[1:3].requires_grad_(True)  # the last one, frozen, is still the fourth
    groups = decay_groups(net.named_parameters(), layer_decay=0.5, base_lr=8.0)
    assert [(g["base_lr"], g["decays"], len(g["params"])) for g in groups] == [
        (2, True, 4), (2, False, 8), (1, True, 4), (1, False, 8),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=3)
    set_schedule(optimizer, lr_factor=0.5, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.2), (1, 0), (0.5, 0.2), (0.5, 0)]


def test_layer_decay_refused():
    """A layer decay that means nothing is refused."""
    for decay in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0, at most 1"):
            decay_groups([], layer_decay=decay, base_lr=1.0)
    with pytest.raises(ValueError, match="without blocks"):
        decay_groups(nn.Linear(2, 2).named_parameters(), layer_decay=0.5, base_lr=1.0)


def test_scaled_lr():
    """A rate is scaled linearly with the batch, if that is asked for."""
    assert scaled_lr(0.1, 8192, 256) == pytest.approx(3.2)
    assert scaled_lr(0.1, 64, 256) == pytest.approx(0.025)
    assert scaled_lr(0.1, 8192, 0) == 0.1


def one_weight(value):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_moving_average():
    """A moving average follows the network by its momentum."""
    average, network = one_weight(1.0), one_weight(3.0)
    follow(average, network, 0.75)
    assert (average.weight.item(), network.weight.item()) == (1.5, 3)
