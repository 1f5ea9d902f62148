"""Packed attention: every backend matches the definition, and no sequence attends to another."""

import pytest
import torch

from bigtrain.models.attention import attention, lengths, resolve_backend
from bigtrain.runtime.start import add_in_fixed_order

RUNS = ((3, 5), (1, 9), (4, 2))
TOKENS = 3 * 5 + 9 + 4 * 2


def qkv(tokens=TOKENS, heads=2, width=8, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, heads, width, generator=generator)
    return [part.to(device, dtype).requires_grad_() for part in x]


def segments(sequences):
    start = 0
    for length in lengths(sequences):
        yield slice(start, start + length)
        start += length


def test_dense_definition():
    """The dense backend is the definition of attention, sequence by sequence and head by head."""
    q, k, v = qkv()
    out = attention(q, k, v, RUNS, backend="dense")
    for segment in segments(RUNS):
        for head in range(2):
            weight = (q[segment, head] @ k[segment, head].T / 8**0.5).softmax(dim=-1)
            torch.testing.assert_close(out[segment, head], weight @ v[segment, head])


@pytest.mark.parametrize("sequences", [RUNS, ((1, 32),), ((32, 1),), ((2, 7), (2, 7), (4, 1))])
def test_sdpa_equals_dense(sequences):
    """SDPA equals the dense backend, forward and backward."""
    results = []
    for backend in ("sdpa", "dense"):
        leaves = qkv()
        out = attention(*leaves, sequences, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_sequences_isolated(backend):
    """No information flows between sequences."""
    before = attention(*qkv(), RUNS, backend=backend)
    for changed in segments(RUNS):
        leaves = [x.detach().clone() for x in qkv()]
        for x in leaves:
            x[changed] += 3
        after = attention(*leaves, RUNS, backend=backend)
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[changed] = False
        assert torch.equal(after[others], before[others])
        assert not torch.allclose(after[changed], before[changed])


def test_runs_mismatch():
    """Sequences that do not add up to the packed tokens are refused."""
    with pytest.raises(ValueError, match=r"do not add up to the 32 packed tokens"):
        attention(*qkv(), ((3, 5), (1, 9)))


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float32), ("cuda", torch.float32)]
)
def test_xformers_unsupported(device, dtype):
    """Where xFormers has no kernel it is refused when named, and `auto` takes SDPA."""
    with pytest.raises(ValueError, match="it needs CUDA in bf16 or fp16: use --attention auto, or sdpa"):
        resolve_backend("xformers", torch.device(device), dtype)
    assert resolve_backend("auto", torch.device(device), dtype) == "sdpa"


def test_xformers_mask():
    """The mask that xFormers gets is that of the dense definition."""
    fmha = pytest.importorskip("xformers.ops.fmha.attn_bias")
    bias_TT = fmha.BlockDiagonalMask.from_seqlens(lengths(RUNS)).materialize((TOKENS, TOKENS))
    expected_TT = torch.full((TOKENS, TOKENS), float("-inf"))
    for segment in segments(RUNS):
        expected_TT[segment, segment] = 0
    assert torch.equal(bias_TT, expected_TT)


@pytest.fixture(params=[False, True], ids=["fastest", "deterministic"])
def deterministic(request):
    if request.param:
        add_in_fixed_order()
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sequences", [((4, 197), (16, 37)), ((8, 99),)])
def test_xformers_equals_dense(sequences, deterministic):
    """In bf16 xFormers equals dense, forward and backward; when deterministic, it repeats bit by bit."""
    assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16) == "xformers"
    results = []
    for backend in ("xformers", "xformers", "dense"):
        leaves = qkv(sum(lengths(sequences)), heads=6, width=64, device="cuda", dtype=torch.bfloat16)
        out = attention(*leaves, sequences, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for one, again, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        assert torch.equal(one, again) or not deterministic
