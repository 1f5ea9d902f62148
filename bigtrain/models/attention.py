"""Attention over packed tokens: many sequences of different lengths in one, none of which sees another.

Packed tokens are a tensor `x_THd` and its `sequences`: ((count, length), ...), that many sequences of that length one
after another; T is the sum of count x length. A multi-crop pass is ((B, 197), (4 B, 37)), a masked student ((B,
99),).

Backends, equal in result:
    xformers  `memory_efficient_attention` with a `BlockDiagonalMask`; CUDA in half precision only, the default there
              where lengths differ
    sdpa      PyTorch's own, one batched call for each kind of sequence; the default elsewhere
    dense     the definition, with a T x T mask; the oracle of the tests
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.choices import Backend, Chosen

Sequences = tuple[tuple[int, int], ...]
SHORT = 64  # tokens
MOST_BYTES = 256 << 20  # of a block's attention weights, in fp32 and bf16


log = logging.getLogger(__name__)
# torch leaves cuDNN's kernel out where kernels are deterministic, as in a run: a detector that is loaded elsewhere must
# give the same bits
torch.backends.cuda.enable_cudnn_sdp(False)


def attention(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, sequences: Sequences, *, backend: Backend = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence of packed tokens (Vaswani et al. 2017, eq. 1).

    Args:
        q_THd, k_THd, v_THd: T packed tokens, H heads of width d.
        sequences: ((count, length), ...) with a sum of T.

    Returns:
        out_THd, in the dtype of v.
    """
    if sum(count * length for count, length in sequences) != q_THd.shape[0]:
        raise ValueError(f"sequences {sequences} do not add up to the {q_THd.shape[0]} packed tokens.")
    if backend == "auto" and (len(sequences) == 1 or torch.compiler.is_compiling()):
        backend = "sdpa"  # nothing to pack, or nothing that could be compiled
    backend = resolve_backend(backend, q_THd.device, q_THd.dtype)
    return {"xformers": _xformers, "sdpa": _sdpa, "dense": _dense}[backend](q_THd, k_THd, v_THd, sequences)


def resolve_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Literal["xformers", "sdpa", "dense"]:
    """What "auto" means for tensors of this kind; xformers where it has kernels, else sdpa."""
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        return "xformers" if fits and _xformers_has_kernels() else "sdpa"
    if backend == "xformers" and not fits:
        raise ValueError(
            f"attention backend xformers was asked for on {device.type} in {dtype}; it needs CUDA in bf16 or fp16: "
            "use --attention auto, or sdpa."
        )
    if backend == "xformers" and not _xformers_has_kernels():
        raise ValueError(
            "attention backend xformers was asked for and is not installed as this torch needs it: `uv sync`, or use "
            "--attention auto, or sdpa."
        )
    return backend


def _sdpa(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, sequences: Sequences) -> Tensor:
    parts = []
    split = [count * length for count, length in sequences]
    for (count, length), q, k, v in zip(
        sequences, q_THd.split(split), k_THd.split(split), v_THd.split(split), strict=True
    ):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if q.device.type == "cpu" and q.dtype != torch.float32 and needs_gradient:
            mixed = _half_on_cpu(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        parts.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _half_on_cpu(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """For training: the backward pass of torch's fused kernel takes two to six times as long in bf16 as in fp32. Short
    sequences go through it in fp32, as do those whose T x T weights would take much memory; others through plain
    products, which such CPUs have instructions for and which round the logits to bf16."""
    images, heads, tokens, _ = q_BHTd.shape
    if tokens < SHORT or 6 * images * heads * tokens**2 > MOST_BYTES:
        with torch.autocast("cpu", enabled=False):  # which would take them back
            mixed_BHTd = F.scaled_dot_product_attention(q_BHTd.float(), k_BHTd.float(), v_BHTd.float())
        return mixed_BHTd.to(v_BHTd.dtype)
    logits_BHTT = (q_BHTd * q_BHTd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
    return logits_BHTT.softmax(dim=-1, dtype=torch.float32).to(v_BHTd.dtype) @ v_BHTd


def _dense(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, sequences: Sequences) -> Tensor:
    sequence_T = torch.arange(sum(count for count, _ in sequences), device=q_THd.device)
    sequence_T = sequence_T.repeat_interleave(torch.tensor(lengths(sequences), device=q_THd.device))
    with torch.autocast(q_THd.device.type, enabled=False):  # an oracle in float32, whatever surrounds it
        score_HTT = torch.einsum("thd,shd->hts", q_THd.float(), k_THd.float()) * q_THd.shape[-1] ** -0.5
        score_HTT = score_HTT.masked_fill(sequence_T[:, None] != sequence_T[None, :], float("-inf"))
        return torch.einsum("hts,shd->thd", score_HTT.softmax(dim=-1), v_THd.float()).to(v_THd.dtype)


def _xformers(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, sequences: Sequences) -> Tensor:
    from xformers.ops import MemoryEfficientAttentionCutlassOp, memory_efficient_attention

    mask = _block_diagonal_mask(sequences, q_THd.device)
    # its first choice, FlashAttention, has a backward pass that adds up in no fixed order
    fixed_order = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled() and q_THd.requires_grad
    op = MemoryEfficientAttentionCutlassOp if fixed_order else None
    return memory_efficient_attention(q_THd[None], k_THd[None], v_THd[None], attn_bias=mask, op=op)[0]


@lru_cache(maxsize=16)  # building one copies the lengths to the device, and a training has a few shapes only
def _block_diagonal_mask(sequences: Sequences, device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths(sequences), device=device)


@lru_cache(maxsize=1)
def _xformers_has_kernels() -> bool:
    with suppress(ImportError, OSError):  # xformers is built for CUDA 12, and torch brings 13 only
        import nvidia.cuda_runtime as cuda_12

        ctypes.CDLL(str(Path(cuda_12.__path__[0], "lib", "libcudart.so.12")), ctypes.RTLD_GLOBAL)
    try:
        import xformers.ops

        problem = xformers._cpp_lib._cpp_library_load_exception
    except Exception as error:  # a flash-attn that is too new breaks its import in many ways
        problem = error
    if problem:
        why = str(problem).partition("\n")[0]
        log.warning("xformers cannot be used (%s): attention goes through PyTorch's own kernels", why)
    return not problem


def torch_dtype(precision: Chosen) -> torch.dtype:
    """What autocast computes in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def lengths(sequences: Sequence[tuple[int, int]]) -> list[int]:
    """The length of each sequence: ((2, 3), (1, 5)) -> [3, 3, 5]."""
    return [length for count, length in sequences for _ in range(count)]
