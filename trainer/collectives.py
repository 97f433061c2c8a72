"""The few collectives that are ours. All travel over gloo as CPU tensors; payloads are numbers or JSON, never pickles.

Every rank calls each of these at the same place of the program. After an exception no rank may call one again.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
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


def add_up(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def exchange(message: dict[str, Any]) -> list[dict[str, Any]]:
    """All-gather one JSON object a rank; everyone gets the list in rank order."""
    payload = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [json.loads(bytes(text[: int(size)].numpy().tobytes())) for text, size in zip(gathered, sizes, strict=True)]


def barrier() -> None:
    """Wait for all ranks."""
    add_up([0.0])
