"""ZeRO-3 sub-groups whose optimizer state lies in files on a local disk ("NVMe offload"), swapped in for their step.

Between steps DeepSpeed holds nothing of such a sub-group in memory. Its files are flat fp32, one for the masters and
one a moment, so they can be mapped: a view of a file is read, and written, like the tensor it stands for. Sub-groups
below DeepSpeed's smallest transfer (1 MiB) stay in memory, and for them everything here does nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.durable import sync_file
from trainer.errors import MissingInputError

_LEVELS = 3
"""Directories between engine.nvme_path and the one of a rank: the run's own, and two of DeepSpeed's."""


def is_swapped(optimizer: Any, group: int) -> bool:
    """Whether sub-group `group` of the ZeRO-3 `optimizer` lies in files between steps."""
    return bool(optimizer._swappable_optimizer_subgroup(group))


@contextmanager
def resident(optimizer: Any, group: int, *, changes: bool) -> Iterator[None]:
    """Hold sub-group `group` in memory meanwhile; with `changes` its files are written afterwards."""
    if not is_swapped(optimizer, group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        if changes:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            optimizer._release_swap_buffers(group)


def mapped(optimizer: Any, group: int) -> dict[str, Tensor]:
    """Views of a swapped sub-group's files: `master` and, once there are any, its moments. Writing changes them.

    Raises MissingInputError when a file is gone or cut: mapping it would make zeros of the state.
    """
    count = int(optimizer.fp16_partitioned_groups_flat_numel[group])
    views = {}
    for kind, path in _files(optimizer, group).items():
        if not path.is_file() or path.stat().st_size < count * torch.float32.itemsize:
            raise MissingInputError(f"the swap file {path} is gone or cut", "leave engine.nvme_path to running jobs")
        views[kind] = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    return views


def settle(optimizer: Any, group: int) -> None:
    """Let what was written to the views reach the files: DeepSpeed reads them past the page cache."""
    if is_swapped(optimizer, group):
        for path in _files(optimizer, group).values():
            sync_file(path)


def remove_files(optimizer: Any) -> None:
    """Delete this rank's swap files, and what is empty then; the engine is not used afterwards."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    folder = Path(swapper.swap_folder)
    shutil.rmtree(folder, ignore_errors=True)
    for parent in list(folder.parents)[:_LEVELS]:
        with suppress(OSError):
            parent.rmdir()


def _files(optimizer: Any, group: int) -> dict[str, Path]:
    flat = optimizer.fp32_partitioned_groups_flat[group]
    info = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
    ending = f"-{flat.ds_id}"
    names = ["master", *(entry.compute_tensor.ds_id.removesuffix(ending) for entry in info.tensors[1:])]
    return {name: Path(entry.swap_path) for name, entry in zip(names, info.tensors, strict=True)}
