"""Which device ranks on this machine will have, found without torch; and what of a configuration is unwise there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainer.config.schema import Config

Device = Literal["cpu", "cuda"]
DEVICE_FILES = Path("/dev")


def guess_device(environ: Mapping[str, str]) -> Device:
    """Whether ranks will see a CUDA device."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    return "cuda" if visible_gpus(environ) else "cpu"


def visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that ranks may use: the entries of CUDA_VISIBLE_DEVICES, else the device files of NVIDIA's driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(DEVICE_FILES.glob("nvidia[0-9]*")))
    entries = [entry.strip() for entry in visible.split(",")]
    # CUDA ignores everything from the first entry on that names no device.
    return next((index for index, entry in enumerate(entries) if entry in ("", "-1")), len(entries))


def device_warnings(config: Config, device: Device) -> list[str]:
    """What will work on `device`, but not as anybody would want it; each one line."""
    if device == "cpu" and config.model.dtype == "bfloat16":
        return ["warning: model.dtype=bfloat16 on a CPU is about 80 times slower than float32; set model.dtype=float32"]
    return []
