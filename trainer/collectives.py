"""The few collectives that are ours. All travel over gloo as CPU tensors; payloads are numbers or JSON, never pickles.

Every rank calls each of these at the same place of the program. After an exception no rank may call one again.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from trainer.world import World, opens_store


def join(world: World, backend: str, timeout_seconds: int, listener: socket.socket | None = None) -> None:
    """Form the process group of `world`; waits at most `timeout_seconds` for the other ranks.

    `listener` is the socket on which rank 0 serves the store (it now belongs to the store); without one rank 0 opens
    MASTER_PORT itself.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, but not in __all__
        world.master_address,
        world.master_port,
        world.world_size,
        is_master=opens_store(world, os.environ),
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout)


def bound_all_groups(timeout_seconds: int) -> None:
    """Give every process group of this process the timeout of `join`; no communication.

    DeepSpeed makes groups of its own with torch's default of 30 minutes, and most of the traffic runs on them.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


_blocked_seconds = 0.0


def time_collectives() -> None:
    """Have `blocked_seconds` count from now on.

    torch has no hook for it on gloo, but all its collectives, which are also DeepSpeed's, wait in `Work.wait`.
    """
    if dist.Work.wait is not _timed_wait:
        dist.Work.wait = _timed_wait  # type: ignore[method-assign]


def blocked_seconds() -> float:
    """How long this process has waited in collectives so far. What a GPU waits for is not in it."""
    return _blocked_seconds


_wait = dist.Work.wait


@wraps(_wait)
def _timed_wait(*arguments: Any, **named: Any) -> bool:
    global _blocked_seconds  # noqa: PLW0603
    began = time.perf_counter()
    try:
        return _wait(*arguments, **named)
    finally:
        _blocked_seconds += time.perf_counter() - began


def add_up(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def exchange(message: dict[str, Any]) -> list[dict[str, Any]]:
    """All-gather one JSON object a rank; everyone gets the list in rank order.

    One collective as long as all messages are short, which is what training waits for during a save; else two.
    """
    text = json.dumps(message).encode()
    framed = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    answers = _gather(framed, _SHORT)
    sizes = [_LENGTH_BYTES + int.from_bytes(answer[:_LENGTH_BYTES], "little") for answer in answers]
    if max(sizes) > _SHORT:
        answers = _gather(framed, max(sizes))
    return [json.loads(answer[_LENGTH_BYTES:size]) for answer, size in zip(answers, sizes, strict=True)]


_LENGTH_BYTES = 8
_SHORT = 2048


def _gather(content: bytes, size: int) -> list[bytes]:
    """The first `size` bytes of every rank's content, filled up with zeros."""
    mine = torch.frombuffer(bytearray(content[:size].ljust(size, b"\0")), dtype=torch.uint8)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [part.numpy().tobytes() for part in gathered]


def barrier() -> None:
    """Wait for all ranks."""
    add_up([0.0])
