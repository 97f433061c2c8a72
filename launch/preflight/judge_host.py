"""Is one host fit to run ranks? Facts in, one finding a check out, the good news too. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from launch.preflight.facts import UNLIMITED, Gpu, HostFacts
from launch.preflight.findings import Finding, error, ok, warning
from launch.preflight.reports import Requirements
from launch.rendezvous import is_loopback
from trainer.errors import CannotWriteError, MissingInputError, PeerLostError, UsageError

_SHM_REMEDY = "remove what others left there (containers: --shm-size=1g)"
_HOTTEST_CELSIUS = 90


def judge_host(facts: HostFacts, requirements: Requirements, *, ranks: int = 1, several: bool = False) -> list[Finding]:
    """Every check of a host that runs `ranks` ranks; `several` when ranks of other hosts shall reach it."""
    findings = [
        _python(facts, requirements),
        *(_package(name, facts, requirements) for name in requirements.tested),
        _cores(facts, ranks),
        _memory(facts, ranks),
        _disk(facts),
        _shared_memory(facts, ranks),
        _open_files(facts),
        _processes(facts),
        _locked_memory(facts),
        _own_name(facts, several),
        *_gpus(facts),
    ]
    return [replace(finding, host=facts.node) for finding in findings]


def _python(facts: HostFacts, requirements: Requirements) -> Finding:
    oldest = requirements.oldest.get("python", "0")
    if _release(facts.python) < _release(oldest):
        remedy = "choose another: make install PYTHON=/path/to/python"
        return error("python", f"Python {facts.python} is older than {oldest}", remedy, UsageError.exit_code)
    return ok("python", facts.python)


def _package(name: str, facts: HostFacts, requirements: Requirements) -> Finding:
    found, tested, oldest = facts.versions.get(name), requirements.tested[name], requirements.oldest.get(name, "0")
    if found is None:
        return error(name, f"{name} is not installed", "make install", MissingInputError.exit_code)
    if _release(found) < _release(oldest):
        return error(name, f"{name} {found} is older than {oldest}", "make install", UsageError.exit_code)
    if _release(found)[:2] != _release(tested)[:2]:
        return warning(name, f"{name} {found} is not the tested {tested}", "make install brings the tested set")
    return ok(name, found if _release(found) == _release(tested) else f"{found} (tested with {tested})")


def _cores(facts: HostFacts, ranks: int) -> Finding:
    threads = facts.threads or 1
    if ranks * threads > facts.cores:
        return warning(
            "cores",
            f"{ranks} rank(s) x {threads} thread(s) on {facts.cores} cores wait for each other",
            f"set OMP_NUM_THREADS={max(1, facts.cores // ranks)}, or ask for more cores (--cpus-per-task)",
        )
    return ok("cores", f"{facts.cores} for {ranks} rank(s) x {facts.threads or 'any number of'} threads")


def _memory(facts: HostFacts, ranks: int) -> Finding:
    said = f"{facts.free_memory_gib:.1f} of {facts.memory_gib:.1f} GiB free"
    if facts.free_memory_gib < 1.0 * ranks:
        return warning("memory", f"{said} for {ranks} rank(s)", "ask for more (--mem), or end what else runs there")
    return ok("memory", said)


def _disk(facts: HostFacts) -> Finding:
    if facts.free_disk_gib is None:
        fact = f"the file system of {facts.directory} does not answer"
        return error("disk", fact, "see the mount and its file server", PeerLostError.exit_code)
    said = f"{size(facts.free_disk_gib)} free in {facts.directory} ({facts.file_system})"
    if facts.free_disk_gib < 1.0:
        return warning("disk", said, "free some space")
    return ok("disk", said)


def _shared_memory(facts: HostFacts, ranks: int) -> Finding:
    if facts.free_shm_gib is None:
        fact = "there is no /dev/shm"
        return error("/dev/shm", fact, "mount a tmpfs there (containers: --shm-size=1g)", CannotWriteError.exit_code)
    said = f"{size(facts.free_shm_gib)} of {size(facts.shm_gib)} free in /dev/shm"
    if facts.free_shm_gib * 1024 < 16 * ranks:
        return error("/dev/shm", said, _SHM_REMEDY, CannotWriteError.exit_code)
    if facts.free_shm_gib * 1024 < 64 * ranks:
        return warning("/dev/shm", f"{said}: NCCL may need more", _SHM_REMEDY)
    return ok("/dev/shm", said)


def _open_files(facts: HostFacts) -> Finding:
    limit = facts.limits.get("nofile", UNLIMITED)
    if 0 <= limit < 1024:
        return error("open files", f"ulimit -n is {limit}", "ulimit -n 65536", UsageError.exit_code)
    if 0 <= limit < 4096:
        return warning("open files", f"ulimit -n is {limit}", "ulimit -n 65536: many ranks need many sockets")
    return ok("open files", _number(limit))


def _processes(facts: HostFacts) -> Finding:
    limit = facts.limits.get("nproc", UNLIMITED)
    if 0 <= limit < 1024:
        return warning("processes", f"ulimit -u is {limit}", "ulimit -u 65536: every thread counts")
    return ok("processes", _number(limit))


def _locked_memory(facts: HostFacts) -> Finding:
    limit = facts.limits.get("memlock", UNLIMITED)
    if facts.has_rdma and limit != UNLIMITED:
        return warning(
            "locked memory",
            f"ulimit -l is {limit // 1024} KiB and there are RDMA devices",
            "ulimit -l unlimited (Slurm: LimitMEMLOCK of slurmd), or NCCL fails to register memory",
        )
    return ok("locked memory", _number(limit) + ("" if limit == UNLIMITED else " bytes"))


def _own_name(facts: HostFacts, several: bool) -> Finding:
    if facts.own_addresses and not (several and any(map(is_loopback, facts.own_addresses))):
        interfaces = ", ".join(facts.interfaces) or "none but loopback"
        return ok("own name", f"{facts.host} is {', '.join(facts.own_addresses)}; interfaces: {interfaces}")
    if facts.socket_interface:
        return ok("own name", f"not used: GLOO_SOCKET_IFNAME={facts.socket_interface}")
    interface = (facts.interfaces or ["eth0"])[0]
    if not facts.own_addresses:
        fact = f"{facts.host} cannot resolve its own name"
        remedy = f"add it to DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME={interface}"
        return (
            error("own name", fact, remedy, PeerLostError.exit_code) if several else warning("own name", fact, remedy)
        )
    return error(
        "own name",
        f"{facts.host} takes its own name for {', '.join(facts.own_addresses)}, where other hosts cannot reach it",
        f"mend /etc/hosts there, or set GLOO_SOCKET_IFNAME={interface}",
        PeerLostError.exit_code,
    )


def _gpus(facts: HostFacts) -> list[Finding]:
    if facts.gpu_problem:
        remedy = "reset the GPU, or leave this host out"
        return [error("GPUs", facts.gpu_problem, remedy, PeerLostError.exit_code)]
    if not facts.gpus:
        return [ok("GPUs", f"{facts.gpu_files} device files, but no nvidia-smi" if facts.gpu_files else "none")]
    return [_gpu(gpu) for gpu in facts.gpus]


def _gpu(gpu: Gpu) -> Finding:
    check, name = f"GPU {gpu.index}", f"GPU {gpu.index} ({gpu.name})"
    used, total = gpu.used_gib or 0.0, gpu.total_gib or 0.0
    if gpu.uncorrected_errors:
        fact = f"{name} has {gpu.uncorrected_errors} uncorrected memory errors"
        return error(check, fact, "reset it, or leave this host out", PeerLostError.exit_code)
    if used > max(1.0, 0.05 * total):
        fact = f"{name}: {used:.1f} of {total:.1f} GiB are in use already"
        return warning(check, fact, "see nvidia-smi there: an orphan of an earlier job?")
    if (gpu.celsius or 0) >= _HOTTEST_CELSIUS:
        return warning(check, f"{name} is at {gpu.celsius} degrees Celsius", "it will slow down: look at its cooling")
    return ok(check, f"{gpu.name}, driver {gpu.driver}, {size(gpu.used_gib)} of {size(gpu.total_gib)} used")


def size(gib: float | None) -> str:
    """A size in GiB for people to read."""
    if gib is None:
        return "unknown"
    return f"{gib * 1024:.0f} MiB" if gib < 1 else f"{gib:.1f} GiB" if gib < 1024 else f"{gib / 1024:.1f} TiB"


def _number(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:,}"


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of 2.13.0+cu126."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)
