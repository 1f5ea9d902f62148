"""Modules on top of a trunk: what is trained, what is frozen, and the queue's order."""

import pytest
import torch
import torch.nn.functional as F

from bigtrain.methods.defend.equations import dense_loss
from bigtrain.methods.defend.network import DenseTuner, ProjectionHead, Prototypes, TokenQueue, unit_rows
from bigtrain.models.classifier import Classifier


def images(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tuner(network):
    return DenseTuner(network(depth=4)[1], prototypes=5, tuned_blocks=2)


def learns(name):
    return name.startswith(("vit.backbone.blocks.2.", "vit.backbone.blocks.3.", "head.", "prototypes."))


def test_tuner_trainable(tuner):
    """The last blocks, the head and the prototypes learn, and nothing else does."""
    assert {n for n, p in tuner.named_parameters() if p.requires_grad} == {
        n for n, _ in tuner.named_parameters() if learns(n)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuner_gradients(tuner, dtype):
    """Gradients reach all that learns and only that, in float32 and bf16."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, (cosines_RMK,) = tuner(images(6, 16, seed=1))
    target = torch.rand(6, 1, 4, 5).softmax(dim=-1)
    dense_loss(cosines_RMK[:, None], target).sum().backward()
    for name, parameter in tuner.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == learns(name), name


@torch.no_grad()
def test_tuner_views(tuner):
    """The tuner projects the patch tokens of each kind of view and compares them with the prototypes."""
    crops = [images(6, 16, seed=1), images(2, 32, seed=2)]
    prototype_KD = tuner.prototypes.weight_KD
    for crop, z_RMD, cosines_RMK in zip(crops, *tuner(*crops), strict=True):
        expected = F.normalize(tuner.head(tuner.vit(crop)[0].tokens_BND), dim=-1)
        torch.testing.assert_close(z_RMD, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cosines_RMK, expected @ prototype_KD.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_frozen_blocks_once(network, model):
    """Behind frozen blocks that all views went through together come the same projections and gradients."""
    tuner = DenseTuner(network(model, depth=4)[1], prototypes=5, tuned_blocks=2)
    views = images(2, 32), images(6, 16, seed=1)
    begun = tuner(*views, frozen=True)
    assert not begun.x_TD.requires_grad and begun.depth == 2
    found = []
    for first, second in (views, (begun.only(slice(0, 1)), begun.only(slice(1, 2)))):
        tuner.zero_grad()
        (whole_RNK,), (crops_RNK,) = tuner(first)[1], tuner(second)[1]
        crops_RNK.square().sum().backward()
        found.append([whole_RNK, crops_RNK, *(p.grad for p in tuner.parameters() if p.grad is not None)])
    for plain, once in zip(*found, strict=True):
        torch.testing.assert_close(plain, once, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tuner_projected_tokens(tuner):
    """Tokens that are projected already are only compared with the prototypes."""
    z_TD = F.normalize(torch.randn(3, 256), dim=1)
    (same_TD,), (cosines_TK,) = tuner(z_TD)
    assert same_TD is z_TD
    torch.testing.assert_close(cosines_TK, z_TD @ tuner.prototypes.weight_KD.T)


@pytest.mark.parametrize("blocks", [0, 3])
def test_tuner_block_range(network, blocks):
    """Tuning no blocks, or more blocks than there are, is refused."""
    with pytest.raises(ValueError, match=f"tuned_blocks is {blocks}, and the network has 2 blocks: use 1 to 2"):
        DenseTuner(network(depth=2)[1], 5, blocks)


def test_projection_head():
    """The head has three layers of the paper's widths and gives unit vectors."""
    head = ProjectionHead(192)
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(2048, 192), (2048, 2048), (256, 2048)]
    torch.testing.assert_close(head(torch.randn(7, 192) * 9).norm(dim=-1), torch.ones(7))


def test_prototypes_unit():
    """Prototypes are unit vectors, answer with cosines, and go back to the sphere."""
    prototypes = Prototypes(4, 8)
    torch.testing.assert_close(prototypes.weight_KD.norm(dim=1), torch.ones(4))
    z_TD = F.normalize(torch.randn(3, 8), dim=1)
    torch.testing.assert_close(prototypes(z_TD), z_TD @ prototypes.weight_KD.T)
    before = prototypes.weight_KD.detach().clone()
    with torch.no_grad():
        prototypes.weight_KD *= 3
        prototypes.weight_KD.copy_(unit_rows(prototypes.weight_KD))
    torch.testing.assert_close(prototypes.weight_KD.detach(), before)


def test_queue_order():
    """The queue keeps the newest tokens in their order."""
    queue = TokenQueue(5, 1)
    for tokens, held, full in (
        ([1, 2], [0, 0, 0, 1, 2], False),
        ([3, 4], [0, 1, 2, 3, 4], False),
        ([5], [1, 2, 3, 4, 5], True),
        ([6, 7, 8], [4, 5, 6, 7, 8], True),
        (list(range(10, 20)), [15, 16, 17, 18, 19], True),
    ):
        queue.push(torch.tensor(tokens)[:, None])
        assert queue.z_QD[:, 0].tolist() == held
        assert queue.full() == full


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_queue_shares(world_size):
    """The shares of all ranks together are the queue, each token once."""
    queue = TokenQueue(5, 1)
    queue.push(torch.arange(5)[:, None])
    shares = torch.cat([queue.share(rank, world_size) for rank in range(world_size)])
    assert shares[:, 0].tolist() == list(range(5))


def test_a_queue_of_no_tokens_adds_none():
    queue = TokenQueue(0)
    assert queue.full() and len(queue.share(0, 1)) == 0


@torch.no_grad()
def test_classifier_pooling(network):
    """The classifier reads [CLS], or [CLS] and the mean of the patches, and starts at zero."""
    net, vit = network()
    features = net.forward_features(images(2, 32))
    for pool, expected in (
        ("token", features[:, 0]),
        ("both", torch.cat([features[:, 0], features[:, 1:].mean(dim=1)], dim=1)),
    ):
        model = Classifier(vit, 3, pool)
        assert not model(images(2, 32)).any()  # it starts at zero
        torch.nn.init.normal_(model.head.weight)
        torch.testing.assert_close(model(images(2, 32)), model.head(expected), rtol=1e-4, atol=1e-4)
