"""Training runs whose optimizer state lies in swap files, with or without libaio.

DeepSpeed moves swapped tensors with an operator that it compiles against libaio, for minutes. The stand-in here moves
them with plain reads and writes; all above it (who swaps what, when, into which buffers and files) is DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class PlainHandle:
    """What DeepSpeed calls of its asynchronous handle, done at once."""

    def __init__(self, **_settings: Any) -> None:
        self._buffers: list[Any] = []
        self._done = 0

    def new_cpu_locked_tensor(self, count: int, example: Any) -> Any:
        import torch

        self._buffers.append(torch.empty(count, dtype=example.dtype))
        return self._buffers[-1]

    def free_cpu_locked_tensor(self, buffer: Any) -> bool:
        return True

    def is_pinned(self, tensor: Any) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(storage == buffer.untyped_storage().data_ptr() for buffer in self._buffers)

    def async_pread(self, buffer: Any, path: str, offset: int) -> int:
        import numpy as np

        found = np.fromfile(path, np.uint8, buffer.numel() * buffer.element_size(), offset=offset)
        buffer.numpy().view(np.uint8)[:] = found
        self._done += 1
        return 0

    def async_pwrite(self, buffer: Any, path: str, offset: int) -> int:
        assert offset == 0
        # In place, as the operator does: what others have mapped stays the file.
        with Path(path).open("r+b" if Path(path).exists() else "wb") as stream:
            stream.write(buffer.numpy().tobytes())
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


@contextmanager
def plain_operator(smallest_transfer: int) -> Iterator[None]:
    """The stand-in instead of the compiled operator, with sub-groups swapped from `smallest_transfer` bytes on."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.swap_tensor import optimizer_utils

    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    originals = builder.load, builder.is_compatible, optimizer_utils.MIN_AIO_BYTES
    builder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=PlainHandle)
    builder.is_compatible = lambda self, verbose=False: True
    optimizer_utils.MIN_AIO_BYTES = smallest_transfer
    try:
        yield
    finally:
        builder.load, builder.is_compatible, optimizer_utils.MIN_AIO_BYTES = originals


def train_swapping(world: Any, kind: str, values: dict[str, Any], plain: bool, stop_after: int = 0) -> Any:
    """Case: as `train`; returns its error, or how many swap files there were when the last checkpoint was due."""
    from contextlib import nullcontext

    from tests.support.training import train
    from trainer.checkpoint.capture import RunSaver

    original, seen = RunSaver.finish, []

    def finish(self: RunSaver, state: Any, metrics: dict[str, float]) -> Any:
        seen.append(sum(1 for _ in Path(values["engine"]["nvme_path"]).rglob(f"rank{world.rank}/*.swp")))
        return original(self, state, metrics)

    RunSaver.finish = finish  # type: ignore[method-assign]
    try:
        with plain_operator(4096) if plain else nullcontext():
            return train(world, kind, values, stop_after) or seen[-1]
    finally:
        RunSaver.finish = original  # type: ignore[method-assign]
