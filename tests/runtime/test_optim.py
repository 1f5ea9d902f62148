"""Schedules by hand, what decays, and one update."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from bigtrain.models.vit import Architecture
from bigtrain.runtime.optim import cosine, decay_groups, follow, set_schedule, update, warmup_cosine


def test_a_cosine_by_hand():
    assert [cosine(s, total=4, start=1.0, end=0.0) for s in (0, 1, 2, 4, 9)] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, 0, 0]
    )
    assert [cosine(s, total=10, start=0.04, end=0.5) for s in (0, 5, 10)] == pytest.approx([0.04, 0.27, 0.5])


def test_warm_up_rises_evenly_to_one_and_the_cosine_falls_to_its_end():
    factors = [warmup_cosine(s, total=12, warmup=4, end=0.1) for s in range(13)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors[8] == pytest.approx(0.55)
    assert factors[12] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert [warmup_cosine(s, total=2) for s in (0, 1, 2)] == pytest.approx([1, 0.5, 0])
    assert warmup_cosine(3, total=4, warmup=4) == 1  # nothing but warm-up
    assert warmup_cosine(4, total=4, warmup=4) == 1


def test_matrices_decay_and_biases_norms_and_tokens_do_not():
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


def test_a_schedule_sets_each_group_s_own_rate_and_decay():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    groups = [
        g
        for lr, layer in zip((1.0, 10.0), layers, strict=True)
        for g in decay_groups(layer.named_parameters(), base_lr=lr)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3)
    set_schedule(optimizer, lr_factor=0.5, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.2), (0.5, 0), (5, 0.2), (5, 0)]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def one_weight(value=1.0):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module, torch.optim.SGD(module.parameters(), lr=0.5)


def test_an_update_is_a_step_down_the_gradient(accelerator):
    module, optimizer = one_weight()
    for expected in (1 - 0.5 * 3, -0.5 - 0.5 * 3):  # twice: gradients do not add up
        loss = update(accelerator, module, optimizer, module.weight.sum() * 3)
        assert module.weight.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(-1.5)


def test_gradients_are_clipped_to_a_norm(accelerator):
    module, optimizer = one_weight()
    update(accelerator, module, optimizer, module.weight.sum() * 30, clip=1.0)
    assert module.weight.item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(accelerator, bad):
    module, optimizer = one_weight()
    with pytest.raises(FloatingPointError, match="the loss is not finite: lower the learning rate"):
        update(accelerator, module, optimizer, module.weight.sum() * bad)
    assert module.weight.item() == 1
    assert module.weight.grad is None


def test_a_moving_average_follows_by_its_momentum():
    average, network = one_weight(1.0)[0], one_weight(3.0)[0]
    follow(average, network, 0.75)
    assert (average.weight.item(), network.weight.item()) == (1.5, 3)
