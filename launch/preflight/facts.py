"""What one host is, as plain values. Everything here is read from the system; nothing takes more than seconds.

No torch is imported: the answer must come from a login node too, and from a host whose torch is broken.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from launch.bounded import Overdue, bounded
from launch.processes import usable_cores

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
UNLIMITED = -1
GIB = 2**30
_FILE_SECONDS = 10.0
_RESOLVE_SECONDS = 10.0
_NVIDIA_SMI_SECONDS = 15.0
_GPU_QUERY = (
    "index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "temperature.gpu",
)  # fmt: skip

_Value = TypeVar("_Value")


class Facts(BaseModel):
    """Values that travel between hosts as JSON and are checked when they arrive."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpu(Facts):
    """One GPU as its driver describes it; None where the driver does not say."""

    index: int
    name: str
    driver: str
    total_gib: float | None
    used_gib: float | None
    uncorrected_errors: int | None
    celsius: int | None


class HostFacts(Facts):
    """One host. Sizes in GiB, limits as numbers (-1: unlimited)."""

    host: str
    node: str
    """The scheduler's name of this host, which is what --exclude takes."""
    own_addresses: list[str]
    """What the host's own name resolves to; empty when it does not."""
    interfaces: list[str]
    has_rdma: bool
    python: str
    versions: dict[str, str]
    """Installed packages of PACKAGES."""
    cores: int
    threads: int | None
    """OMP_NUM_THREADS."""
    memory_gib: float
    free_memory_gib: float
    limits: dict[str, int]
    """nofile, memlock (bytes), nproc: the soft limits."""
    shm_gib: float | None
    free_shm_gib: float | None
    directory: str
    file_system: str
    free_disk_gib: float | None
    """None: the file system did not answer."""
    gpus: list[Gpu]
    gpu_files: int
    """Device files of NVIDIA's driver; more than `gpus` when the driver does not answer."""
    gpu_problem: str
    compiler: str
    socket_interface: str
    """GLOO_SOCKET_IFNAME."""


def host_facts(environ: Mapping[str, str], *, with_gpus: bool = True) -> HostFacts:
    """The facts of this host; takes seconds at most, whatever is broken.

    `with_gpus`: ask the driver for its GPUs. Of many ranks on a host one is enough, the driver is slow to answer.
    """
    host = socket.gethostname()
    memory, free = _memory()
    shm = _within(lambda: shutil.disk_usage("/dev/shm"), None)
    directory = Path.cwd()
    disk = _within(lambda: shutil.disk_usage(directory), None)
    gpus, problem = _gpus(environ) if with_gpus else ([], "")
    threads = environ.get("OMP_NUM_THREADS", "")
    return HostFacts(
        host=host,
        node=environ.get("SLURMD_NODENAME") or host,
        own_addresses=_own_addresses(host),
        interfaces=sorted(name for _, name in socket.if_nameindex() if name != "lo"),
        has_rdma=_has_entries(Path("/sys/class/infiniband")),
        python=platform.python_version(),
        versions=_versions(),
        cores=usable_cores(),
        threads=int(threads) if threads.isdigit() else None,
        memory_gib=memory,
        free_memory_gib=free,
        limits={
            "nofile": _limit(resource.RLIMIT_NOFILE),
            "memlock": _limit(resource.RLIMIT_MEMLOCK),
            "nproc": _limit(resource.RLIMIT_NPROC),
        },
        shm_gib=None if shm is None else shm.total / GIB,
        free_shm_gib=None if shm is None else shm.free / GIB,
        directory=str(directory),
        file_system=file_system_of(directory),
        free_disk_gib=None if disk is None else disk.free / GIB,
        gpus=gpus,
        gpu_files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        gpu_problem=problem,
        compiler=shutil.which("c++") or shutil.which("g++") or "",
        socket_interface=environ.get("GLOO_SOCKET_IFNAME", ""),
    )


def file_system_of(path: Path, mounts: str | None = None) -> str:
    """The kind of the file system that holds `path` (nfs4, lustre, ext4, ...) as /proc/self/mountinfo lists it."""
    if mounts is None:
        mounts = ""
        with suppress(OSError):
            mounts = Path("/proc/self/mountinfo").read_text()
    place, best, kind = os.path.abspath(path), -1, "unknown"  # noqa: PTH100 - resolve() would ask the file server
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        # The kernel writes a space in a name as \040.
        point = before.split()[4].replace("\\040", " ")
        inside = point in ("/", place) or place.startswith(point + "/")
        # Of two mounts at one place the later hides the earlier.
        if inside and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


def parse_gpus(table: str) -> list[Gpu]:
    """The answer of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` to our question."""
    gpus = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_GPU_QUERY) and fields[0].isdigit():
            index, name, driver, total, used, errors, celsius = fields
            gpus.append(
                Gpu(
                    index=int(index),
                    name=name,
                    driver=driver,
                    total_gib=_mebibytes(total),
                    used_gib=_mebibytes(used),
                    uncorrected_errors=int(errors) if errors.isdigit() else None,
                    celsius=int(celsius) if celsius.isdigit() else None,
                )
            )
    return gpus


def _gpus(environ: Mapping[str, str]) -> tuple[list[Gpu], str]:
    """The GPUs of this host and why they cannot be listed, if so. CUDA_VISIBLE_DEVICES="" means: there are none."""
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or (program := shutil.which("nvidia-smi")) is None:
        return [], ""
    command = [program, f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer in {_NVIDIA_SMI_SECONDS:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi: {error.strerror}"
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        return [], f"nvidia-smi: {said[0] if said else f'exit code {done.returncode}'}"
    return parse_gpus(done.stdout), ""


def _mebibytes(text: str) -> float | None:
    try:
        return float(text) / 1024
    except ValueError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _memory() -> tuple[float, float]:
    """Memory of this host, and what of it is free, GiB; what a cgroup allows when that is less."""
    sizes = {"MemTotal": 0.0, "MemAvailable": 0.0}
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) * 1024 / GIB
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            most = int(Path(limit).read_text()) / GIB
            if most < total:
                total, free = most, min(free, most - int(Path(used).read_text()) / GIB)
    return total, free


def _own_addresses(host: str) -> list[str]:
    def resolve() -> list[str]:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})

    try:
        return bounded(resolve, _RESOLVE_SECONDS)
    except (OSError, UnicodeError, Overdue):
        return []


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _has_entries(directory: Path) -> bool:
    with suppress(OSError):
        return any(directory.iterdir())
    return False


def _within(call: Callable[[], _Value], otherwise: _Value | None) -> _Value | None:
    """What `call()` returns, or `otherwise` when it fails or does not return in time."""
    try:
        return bounded(call, _FILE_SECONDS)
    except (OSError, Overdue):
        return otherwise
