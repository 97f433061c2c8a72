"""Which rank owns which elements of which parameter inside DeepSpeed's ZeRO optimizers, stages 1, 2 and 3.

With `swapping`, the only file that knows DeepSpeed's internals. ZeRO-1/2 concatenate the parameters of a group and cut
the whole into one partition a rank, so a rank owns a run of elements of few parameters. ZeRO-3 cuts every parameter
into equal parts, padded at the end. In both, moments live in the inner optimizer's state, keyed by the flat partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engine import swapping

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedSlice:
    """Elements [start, start + count) of the flattened parameter `name`, held by this rank.

    `tensors` maps master, exp_avg and exp_avg_sq to live fp32 views of `count` elements: writing changes the engine
    (views of swap files, where the engine has some, hold until its next step). A frozen parameter has only its master,
    in the dtype of the model.
    """

    name: str
    start: int
    count: int
    tensors: dict[str, Tensor]


def true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter (under ZeRO-3 its own shape is empty between uses)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def owned_slices(model: nn.Module, optimizer: Any) -> Iterator[OwnedSlice]:
    """This rank's slices of all trainable parameters of `model`, in model order; tied aliases come once.

    `optimizer` is the ZeRO optimizer (`engine.optimizer`). Moments exist after `create_moments` or a first step.
    """
    find = _find_in_stage3 if _is_stage3(optimizer) else _find_in_stage1_and_2
    state_of = cache(partial(_state, optimizer))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = find(optimizer, parameter)
            if found is not None:
                group, offset, start, count = found
                yield OwnedSlice(
                    name,
                    start,
                    count,
                    {kind: tensor.narrow(0, offset, count) for kind, tensor in state_of(group).items()},
                )


def frozen_slices(model: nn.Module, *, whole: bool) -> Iterator[OwnedSlice]:
    """Frozen parameters of `model`, in model order: this rank's share of each, to be saved.

    With `whole` everything that this rank holds, to be overwritten: ZeRO-1/2 keep all of them on every rank.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        sharded = getattr(parameter, "ds_tensor", None)
        flat = parameter.data.view(-1) if sharded is None else sharded.data
        elements = parameter.numel() if sharded is None else int(parameter.ds_numel)  # type: ignore[attr-defined]
        if sharded is None and whole:
            yield OwnedSlice(name, 0, elements, {"master": flat})
            continue
        share = -(-elements // ranks) if sharded is None else flat.numel()
        start = rank * share
        count = min(share, elements - start)
        if count > 0:
            yield OwnedSlice(name, start, count, {"master": flat.narrow(0, start if sharded is None else 0, count)})


def create_moments(optimizer: Any) -> None:
    """Give every flat partition zero moments where the optimizer has not made any yet (before its first step)."""
    for group, flat in enumerate(_flat_partitions(optimizer)):
        state = optimizer.optimizer.state[flat]
        if missing := [kind for kind in MOMENTS if kind not in state]:
            with _in_memory(optimizer, group, changes=True):
                state |= {kind: torch.zeros_like(flat.data) for kind in missing}
        if "step" not in state:
            state["step"] = _step_value(optimizer, flat, 0)


def optimizer_steps(optimizer: Any) -> int:
    """Steps the inner optimizer counted (skipped ones are not): Adam's bias correction depends on it."""
    return max((int(optimizer.optimizer.state[flat]["step"]) for flat in _flat_partitions(optimizer)), default=0)


def set_optimizer_steps(optimizer: Any, steps: int) -> None:
    """Set the inner optimizer's step count everywhere."""
    for flat in _flat_partitions(optimizer):
        optimizer.optimizer.state[flat]["step"] = _step_value(optimizer, flat, steps)


def publish_masters(optimizer: Any) -> None:
    """Copy changed master weights into the weights the model computes with. Collective: all ranks call it."""
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        swapping.settle(optimizer, group)
        with _in_memory(optimizer, group, changes=False):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        # Small parameters stay gathered between steps: their full copies are stale until gathered again.
        for parameter in optimizer.persistent_parameters:
            parameter.partition(has_been_updated=False)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    stage3 = _is_stage3(optimizer)
    return list(optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups)


def _state(optimizer: Any, group: int) -> dict[str, Tensor]:
    """Masters and moments of the flat partition number `group`."""
    if _is_stage3(optimizer) and swapping.is_swapped(optimizer, group):
        return swapping.mapped(optimizer, group)
    flat = _flat_partitions(optimizer)[group]
    state = optimizer.optimizer.state[flat]
    return {"master": flat.data, **{kind: state[kind] for kind in MOMENTS}}


def _in_memory(optimizer: Any, group: int, *, changes: bool) -> AbstractContextManager[None]:
    return swapping.resident(optimizer, group, changes=changes) if _is_stage3(optimizer) else nullcontext()


# (number of the flat partition, offset in it, start in the parameter, count) of this rank's share of a parameter.
_Place = tuple[int, int, int, int]


def _find_in_stage1_and_2(_optimizer: Any, parameter: Any) -> _Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    part = mapping.lp_fragment_address
    return mapping.param_group_index, mapping.hp_fragment_address.start, part.start, part.numel


def _find_in_stage3(optimizer: Any, parameter: Any) -> _Place | None:
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * padded
    count = min(padded, parameter.ds_numel - start)
    return None if count <= 0 else (group, offset, start, count)


def _step_value(optimizer: Any, flat: Tensor, steps: int) -> Any:
    """Torch's AdamW counts in a tensor (on the parameter's device when fused), DeepSpeed's CPU version in an int."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return steps
    fused = any(group.get("fused") for group in inner.param_groups)
    return torch.tensor(float(steps), dtype=torch.float32, device=flat.device if fused else "cpu")
