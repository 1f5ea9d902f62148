"""DeepSpeed ZeRO as a way to launch: its settings, and weights and moments by name, whole, wherever their parts lie.

Weights stay float32 and autocast is torch's, as under DDP, so that losses and checkpoints are the same. DeepSpeed
only shards optimizer states (stage 1), gradients (2) and weights (3) over the ranks. Its internals are those of 0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn

BUCKET = 50_000_000  # elements reduced or gathered at once


def is_used(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def leave_shared_memory_out() -> None:
    """Have gloo do the all-reduce on a CPU, as under DDP.

    DeepSpeed would first compile an operation of its own for that: it takes a compiler and some two minutes.
    """
    from deepspeed import ops

    ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # what it would otherwise look for, operation by operation


class Plugin(DeepSpeedPlugin):
    def set_deepspeed_weakref(self) -> None:
        """Accelerate would import transformers here, needed or not."""


def plugin(precision: Literal["fp32", "bf16", "fp16"], clip: float = 0.0) -> DeepSpeedPlugin:
    """DeepSpeed's settings: the stage and offloading as launched, the rest ours.

    Raises:
        ValueError: this launch cannot work.
    """
    if precision == "fp16":
        raise ValueError("DeepSpeed with fp16 is not supported here: use --precision bf16 or fp32, or launch with DDP.")
    if not torch.cuda.is_available():
        leave_shared_memory_out()
    made = Plugin(gradient_accumulation_steps=1, zero3_init_flag=False)
    config = made.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = 1  # bookkeeping only: the stream makes the batches
    config["gradient_accumulation_steps"] = 1  # each backward pass says if it ends a step
    config["gradient_clipping"] = clip
    config["steps_per_print"] = 10**9
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if made.zero_stage == 3:
        sizes = {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
        sizes["stage3_param_persistence_threshold"] = 100_000
    config["zero_optimization"] |= sizes
    return made


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a trained parameter: `count` elements from `start` of the flattened whole, which lie in
    DeepSpeed's `flat` float32 tensor from `place` on; none on ranks that hold no part of it."""

    name: str
    parameter: nn.Parameter
    flat: Tensor
    place: int
    start: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1).narrow(0, self.start, self.count)

    def within(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.place, self.count)


def fragments(engine: Any) -> Iterator[Fragment]:
    """The parts of an engine's trained parameters that this rank holds, one for each parameter."""
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):  # stage 3: every rank has an equal part, the last one padded
            group, place, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(size * dist.get_rank(), parameter.ds_numel)
            count = min(size, parameter.ds_numel - start)
            yield Fragment(name, parameter, zero.fp32_partitioned_groups_flat[group], place, start, count)
        elif (mapping := parameter._hp_mapping) is None:
            yield Fragment(name, parameter, zero.single_partition_of_fp32_groups[0], 0, 0, 0)
        else:
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            in_flat, in_whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Fragment(name, parameter, flat, in_flat.start, in_whole.start, in_whole.numel)


def whole(fragment: Fragment, flat: Tensor) -> Tensor:
    """A parameter's values in a tensor laid out as `fragment.flat`, gathered from all ranks; a collective."""
    shape = getattr(fragment.parameter, "ds_shape", fragment.parameter.shape)
    gathered = torch.zeros(shape, dtype=torch.float32, device=flat.device)
    fragment.of(gathered).copy_(fragment.within(flat))
    dist.all_reduce(gathered)
    return gathered


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """All weights and buffers by name, whole, on every rank; a collective."""
    from deepspeed.runtime.zero import GatheredParameters

    trained = {fragment.name: fragment for fragment in fragments(engine)}
    weights = {name: buffer.detach() for name, buffer in engine.module.state_dict(keep_vars=True).items()}
    for name, parameter in engine.module.named_parameters():
        if name in trained:
            weights[name] = whole(trained[name], trained[name].flat)
        else:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights[name] = parameter.detach().clone()
    return weights


def whole_weight(engine: Any, name: str) -> Tensor:
    """One trained weight, whole, on every rank; a collective."""
    (fragment,) = (fragment for fragment in fragments(engine) if fragment.name == name)
    return whole(fragment, fragment.flat)


@torch.no_grad()
def set_weight(engine: Any, name: str, value: Tensor) -> None:
    """Give a trained parameter a value on all ranks, where DeepSpeed updates it and where it is computed with."""
    (fragment,) = (fragment for fragment in fragments(engine) if fragment.name == name)
    parameter: Any = fragment.parameter
    fragment.within(fragment.flat).copy_(fragment.of(value))
    if hasattr(parameter, "ds_id"):
        parameter.ds_tensor[: fragment.count].copy_(fragment.of(value))
    if parameter.numel() == value.numel():  # stage 3 keeps small weights whole on every rank
        parameter.copy_(value)


def moments(engine: Any) -> dict[str, Tensor]:
    """The optimizer's state as "weight's name/kind", whole, on every rank; a collective."""
    state = engine.optimizer.optimizer.state
    found = {}
    for fragment in fragments(engine):
        for kind, value in state[fragment.flat].items():
            is_flat = torch.is_tensor(value) and value.shape == fragment.flat.shape
            found[f"{fragment.name}/{kind}"] = whole(fragment, value) if is_flat else torch.as_tensor(value).clone()
    return found


@torch.no_grad()
def set_moments(engine: Any, of_name: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put the optimizer's state, by weight and kind, where DeepSpeed keeps this rank's part of it."""
    state = engine.optimizer.optimizer.state
    for fragment in fragments(engine):
        shape = getattr(fragment.parameter, "ds_shape", fragment.parameter.shape)
        for kind, value in of_name.get(fragment.name, {}).items():
            if value.shape == shape:
                flat = state[fragment.flat].setdefault(kind, torch.zeros_like(fragment.flat))
                fragment.within(flat).copy_(fragment.of(value))
            else:  # a count of steps
                state[fragment.flat][kind] = value.clone()
