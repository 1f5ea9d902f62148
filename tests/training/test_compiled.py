"""torch.compile sees whole networks: one graph, the same numbers, the same drops of paths."""

import pytest
import torch

from bigtrain.methods.defend.masks import visible_patches
from bigtrain.methods.defend.network import DenseTuner, masked_student
from bigtrain.models.architecture import Architecture
from bigtrain.training.compiling import check_compiler, compile_pays, prepare_compiling

SMALL = Architecture("vit_tiny_patch16_224", 32, 8, 2)


@pytest.fixture(autouse=True)
def whole_graphs(monkeypatch):
    """Without a backend that takes half a minute; a break in the graph is an error."""
    prepare_compiling("on")
    yield
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)


def gradients(module, run, *given, **further):
    torch.manual_seed(3)
    (seen,) = run(*given, **further)
    module.zero_grad()
    seen.tokens_BND.square().sum().backward()
    return [seen.tokens_BND, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("decoder_blocks", [0, 1])
def test_masked_student(decoder_blocks):
    """A masked student with drops of paths."""
    torch.manual_seed(0)
    student = masked_student(SMALL, drop_path=0.5, decoder_blocks=decoder_blocks).train()
    visible_BN = visible_patches(torch.ones(4, 16), torch.arange(4), keep="random")
    given = {"visible_BN": visible_BN, "visible_count": 8}
    images = torch.randn(4, 3, 32, 32)
    plain = gradients(student, student, images, **given)
    for one, other in zip(plain, gradients(student, compiled(student), images, **given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_teacher(network):
    """A teacher with the attention of [CLS]."""
    _, vit = network()
    images = torch.randn(2, 3, 32, 32)
    (plain,), (other,) = (run(images, with_attention=True) for run in (vit, compiled(vit)))
    torch.testing.assert_close(plain.tokens_BND, other.tokens_BND)
    torch.testing.assert_close(plain.attention_BN, other.attention_BN)


def test_tuner(network):
    """Dense tuning: the frozen blocks, then the others on each view."""
    tuner = DenseTuner(network(depth=3)[1], prototypes=5, tuned_blocks=1)
    views = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)
    whole = compiled(tuner)
    begun, other = tuner(*views, frozen=True), whole(*views, frozen=True)
    torch.testing.assert_close(begun.x_TD, other.x_TD)
    _, (plain,) = tuner(begun.only(slice(1, None)))
    torch.testing.assert_close(plain, whole(begun.only(slice(1, None)))[1][0])


def test_when_it_pays():
    """On a CPU only where it was asked for."""
    assert not compile_pays("auto", torch.device("cpu"), 10**6)
    assert compile_pays("on", torch.device("cpu"), 10) and not compile_pays("off", torch.device("cuda"), 10**6)
    assert not compile_pays("auto", torch.device("cuda"), 100)


def test_no_compiler(monkeypatch):
    """Without a C compiler --compile on is refused with a sentence."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ValueError, match="there is no C compiler on the PATH: use --compile auto, or off"):
        check_compiler("on")
    check_compiler("auto")
    with pytest.raises(ValueError, match="there is no C compiler"):
        compile_pays("on", torch.device("cpu"), 10)
