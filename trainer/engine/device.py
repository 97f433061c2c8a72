"""Everything that differs between a CPU and a GPU, and nothing else.

`prepare()` must run before deepspeed is imported: DeepSpeed chooses its accelerator and its compiled operators while
being imported.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from trainer.errors import ConfigError, UsageError

DeviceType = Literal["cpu", "cuda"]


def choose() -> DeviceType:
    """The device of this process: "cuda" when torch sees a GPU. DS_ACCELERATOR=cpu keeps a machine on its CPU."""
    import torch

    forced_to_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    return "cuda" if torch.cuda.is_available() and not forced_to_cpu else "cpu"


def prepare() -> DeviceType:
    """Choose the device of this process (`choose`) and set DeepSpeed up for it.

    On a CPU nothing is compiled: the shared-memory operator that DeepSpeed would build at start-up is only used for
    inference and is declared absent. Every rank calls this first.
    """
    kind = choose()
    os.environ["DS_ACCELERATOR"] = kind
    if kind == "cpu":
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    # One warning for every collective of every step drowns everything else.
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    if kind == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return kind


def quiet_libraries() -> None:
    """Keep DeepSpeed's and transformers' progress reports out of the output; their warnings stay."""
    import logging

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def communication_backend(kind: DeviceType) -> str:
    """torch.distributed backend: control messages always travel over gloo, tensors of a GPU over NCCL."""
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def torch_device(kind: DeviceType, local_rank: int) -> Any:
    """The torch device of this rank. A rank that sees one GPU only uses that one, whatever its local rank.

    Raises UsageError when there are fewer GPUs than local ranks.
    """
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        # DeepSpeed takes its device index from the environment by itself.
        os.environ["LOCAL_RANK"] = "0"
        local_rank = 0
    if local_rank >= visible:
        raise UsageError(f"local rank {local_rank} has no GPU: this host shows {visible}", "start one rank a GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: Any) -> str:
    """A name that two ranks share only when they share the device; empty for a CPU, which ranks may share."""
    import torch

    if device.type == "cpu":
        return ""
    return f"GPU {torch.cuda.get_device_properties(device).uuid}"


def adamw(groups: Sequence[dict[str, Any]], settings: dict[str, Any], kind: DeviceType, offloaded: bool) -> Any:
    """AdamW for this device: DeepSpeed's vectorised CPU version for states offloaded from a GPU, torch's elsewhere.

    `settings` has lr, betas, eps. torch's needs no compiler, which is what CPU runs rely on.
    """
    if kind == "cuda" and offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    import torch

    return torch.optim.AdamW(groups, fused=kind == "cuda", **settings)


def require_asynchronous_io() -> None:
    """Raise ConfigError where DeepSpeed cannot build its reader and writer of swap files (a matter of some minutes)."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            [
                "engine.deepspeed: offload to nvme needs libaio and a C++ compiler, which this host lacks; install "
                "libaio-dev (libaio-devel) and g++, or offload to the cpu"
            ]
        )


def generator_states(kind: DeviceType) -> dict[str, Any]:
    """State of the torch generators of this rank, uint8 arrays by name."""
    import torch

    states = {"torch": torch.get_rng_state().numpy()}
    if kind == "cuda":
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def set_generator_states(kind: DeviceType, states: dict[str, Any]) -> None:
    """Put the generators back where `generator_states` saw them."""
    import torch

    torch.set_rng_state(torch.from_numpy(states["torch"].copy()))
    if kind == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states["cuda"].copy()))


def memory_probe(kind: DeviceType) -> Callable[[], float]:
    """A function that gives `peak_memory_gib` of this rank."""
    return partial(peak_memory_gib, kind)


def peak_memory_gib(kind: DeviceType) -> float:
    """Highest memory use of this rank so far, GiB: device memory on a GPU, resident memory on a CPU."""
    if kind == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
