"""The first collectives of a run, in a process of their own: `python -m trainer.probe PARENT SECONDS [libraries]`.

Run by the preflight with the six variables of a rank. A process, because NCCL may hang or crash in ways that no
timeout of torch bounds: whoever started it reads one JSON object a line and kills it when time is up. Every line says
which stage was reached and what was measured: imported, libraries (when asked for), joined, gloo, gpu, nccl, done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from trainer.orphans import die_with_parent
from trainer.world import World

GLOO_BYTES = 16 << 20
NCCL_BYTES = 256 << 20
ROUNDS = 5


def main() -> None:
    """Go through the stages; an exception becomes a line with `error`."""
    die_with_parent(int(sys.argv[1]))
    seconds = int(sys.argv[2])
    began = time.monotonic()
    try:
        from trainer.engine import device as devices

        kind = devices.choose()
        import torch

        say(
            "imported",
            import_seconds=round(time.monotonic() - began, 2),
            torch=torch.__version__,
            cuda=torch.version.cuda or "",
            device=kind,
        )
        if "libraries" in sys.argv:
            devices.prepare()
            import deepspeed  # noqa: F401
            import transformers  # noqa: F401

            say("libraries")
        probe(world_of(os.environ), kind, seconds)
        say("done")
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        say("", error=f"{type(error).__name__}: {text}")
    sys.stdout.flush()
    # The teardown of a broken process group waits for its peers.
    os._exit(0)


def probe(world: World, kind: Any, seconds: int) -> None:
    """All-reduce over gloo, and on GPUs a calculation and an all-reduce over NCCL. All ranks call this together."""
    import torch
    import torch.distributed as dist

    from trainer import collectives
    from trainer.engine import device as devices

    collectives.join(world, devices.communication_backend(kind), seconds)
    say("joined")
    collectives.barrier()
    say("gloo", gloo_gib_per_second=_all_reduce_rate(torch.ones(GLOO_BYTES // 4), world.world_size))
    if kind != "cuda":
        return
    device = devices.torch_device(kind, world.local_rank)
    # With one process a host this one looks at all GPUs of the host.
    for index in range(torch.cuda.device_count()) if world.local_world_size == 1 else (device.index,):
        _calculate(torch.device("cuda", index))
    free, _ = torch.cuda.mem_get_info(device)
    nccl: Any = torch.cuda.nccl
    say("gpu", free_gpu_gib=round(free / 2**30, 2), nccl=".".join(map(str, nccl.version())))
    rate = _all_reduce_rate(torch.ones(NCCL_BYTES // 4, device=device), world.world_size)
    say("nccl", nccl_gib_per_second=rate)
    dist.barrier()


def say(stage: str, **measured: Any) -> None:
    """Write one line; `stage` is empty when none was reached."""
    print(json.dumps(({"stage": stage} if stage else {}) | measured), flush=True)


def world_of(environ: Any) -> World:
    """Our place, from variables that the preflight has checked."""
    return World(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
        master_address=environ["MASTER_ADDR"],
        master_port=int(environ["MASTER_PORT"]),
    )


def _all_reduce_rate(tensor: Any, world_size: int) -> float:
    """GiB/s of the tensor per all-reduce; raises RuntimeError when the sum is wrong."""
    import torch
    import torch.distributed as dist

    def synchronize() -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize()

    dist.all_reduce(tensor)
    if not bool((tensor == world_size).all()):
        raise RuntimeError(f"an all-reduce of ones over {world_size} ranks gave another sum")
    tensor.fill_(1.0)
    synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    synchronize()
    size = float(tensor.numel() * tensor.element_size())
    return round(ROUNDS * size / (time.perf_counter() - began) / 2**30, 3)


def _calculate(device: Any) -> None:
    """A product twice on one GPU; raises RuntimeError when the results differ."""
    import torch

    torch.manual_seed(1)
    left = torch.randn(2048, 2048, device=device)
    first, second = left @ left, left @ left
    if not torch.equal(first, second) or not bool(first.isfinite().all()):
        raise RuntimeError(f"{device} ({torch.cuda.get_device_name(device)}) gave two answers to the same product")


if __name__ == "__main__":
    main()
