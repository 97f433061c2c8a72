"""Facts in, findings out: what is right, what will work badly, what will not work, and what to do about it. Pure.

`judge_host` looks at one host, `judge_run` at all hosts of a run together. Nothing here reads the system.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from launch.preflight.facts import UNLIMITED, Facts, Gpu, HostFacts
from launch.rendezvous import is_loopback
from trainer.errors import CannotWriteError, MissingInputError, PeerLostError, UsageError

Level = Literal["ok", "warning", "error"]
# What no restart would cure comes first: it decides the exit code when hosts have several kinds of trouble.
_GRAVITY = (UsageError.exit_code, MissingInputError.exit_code, CannotWriteError.exit_code, PeerLostError.exit_code)
SHARED_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "virtiofs", "wekafs", "glusterfs",
    "orangefs", "pvfs2", "panfs", "afs", "daos", "vastnfs", "quobyte", "moosefs",
)  # fmt: skip
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")


class Probe(Facts):
    """How far the child with the first collectives came, and what it measured; rates in GiB/s."""

    stage: str = "not started"
    """The last stage that it reached: imported, joined, gloo, gpu, nccl, done."""
    error: str = ""
    import_seconds: float | None = None
    torch: str = ""
    cuda: str = ""
    nccl: str = ""
    device: str = ""
    free_gpu_gib: float | None = None
    gloo_gib_per_second: float | None = None
    nccl_gib_per_second: float | None = None


class RankFacts(Facts):
    """What one rank tells before it has met the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    pid: int
    master: str
    master_addresses: list[str]
    code: str
    config: str
    device: str
    visible_gpus: int
    missing_inputs: list[str]
    run_dir: str
    run_dir_file_system: str
    run_dir_free_gib: float | None
    run_dir_problem: str
    """Why this rank cannot write there; empty when it can."""
    host: HostFacts


class RankResult(Facts):
    """What one rank has seen after it met the others."""

    nonce: Literal["seen", "missing", "stale"]
    """Whether the file that rank 0 wrote into run.dir is there, and is the one of this very start."""
    clock_skew: float
    """Seconds by which this host's clock is ahead of that of rank 0."""
    probe: Probe


@dataclass(frozen=True)
class Finding:
    """One line of a report. `host` is empty when it is not about one host; `code` is the exit code of an error."""

    level: Level
    check: str
    fact: str
    remedy: str = ""
    host: str = ""
    code: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Requirements:
    """The versions we are tested with, the oldest that may do, and the oldest Python."""

    tested: Mapping[str, str]
    oldest: Mapping[str, str]


@dataclass(frozen=True)
class Expected:
    """What the run wants, as rank 0 knows it; None where nobody knows."""

    ranks_per_host: int
    checkpoint_gib: float | None
    checkpoint_source: str
    checkpoints_to_come: int
    """How many more checkpoints will lie there at once."""
    checkpoint_seconds: float | None
    seconds_left: float | None
    warning_seconds: float
    """How long before its end the scheduler asks for the last checkpoint."""


def exit_code(findings: Iterable[Finding]) -> int:
    """0 without an error, else the code of the error that is furthest from being cured by a restart."""
    codes = {finding.code for finding in findings if finding.level == "error"}
    return next((code for code in _GRAVITY if code in codes), max(codes, default=0))


def judge_host(facts: HostFacts, requirements: Requirements, *, ranks: int = 1, hosts: int = 1) -> list[Finding]:
    """Every check of one host that runs `ranks` ranks, the good news too."""
    findings: list[Finding] = []

    def say(check: str, fact: str, *problems: tuple[bool, Level, str, str, int]) -> None:
        """The first problem that holds, else `fact` as good news."""
        for holds, level, problem, remedy, code in problems:
            if holds:
                findings.append(Finding(level, check, problem, remedy, facts.node, code if level == "error" else 0))
                return
        findings.append(Finding("ok", check, fact, "", facts.node))

    oldest_python = requirements.oldest.get("python", "3.11")
    say("python", facts.python, (
        _older(facts.python, oldest_python), "error", f"Python {facts.python} is older than {oldest_python}",
        "choose another: make install PYTHON=/path/to/python", UsageError.exit_code,
    ))  # fmt: skip
    for name, tested in requirements.tested.items():
        found, oldest = facts.versions.get(name), requirements.oldest.get(name)
        say(
            name,
            f"{found}" if found and _same_version(found, tested) else f"{found} (tested with {tested})",
            (found is None and oldest is None, "ok", "not installed", "", 0),
            (found is None, "error", f"{name} is not installed", "make install", MissingInputError.exit_code),
            (_older(found or "0", oldest or "0"), "error", f"{name} {found} is older than {oldest}", "make install",
             UsageError.exit_code),
            (_release(found or "0")[:2] != _release(tested)[:2], "warning",
             f"{name} {found} is not the tested {tested}", "make install brings the tested set", 0),
        )  # fmt: skip
    threads = facts.threads or 1
    say(
        "cores",
        f"{facts.cores} cores, {ranks} rank(s) x {facts.threads or 'default'} threads",
        (ranks * threads > facts.cores, "warning",
         f"{ranks} ranks x {threads} threads on {facts.cores} cores: they wait for each other",
         f"set OMP_NUM_THREADS={max(1, facts.cores // ranks)}, or ask for more cores (--cpus-per-task)", 0),
    )  # fmt: skip
    say(
        "memory",
        f"{facts.free_memory_gib:.1f} of {facts.memory_gib:.1f} GiB free",
        (facts.free_memory_gib < 1.0 * ranks, "warning",
         f"{facts.free_memory_gib:.1f} of {facts.memory_gib:.1f} GiB free for {ranks} rank(s)",
         "ask for more (--mem), or end what else runs there", 0),
    )  # fmt: skip
    say(
        "disk",
        f"{_gib(facts.free_disk_gib)} free in {facts.directory} ({facts.file_system})",
        (facts.free_disk_gib is None, "error", f"the file system of {facts.directory} does not answer",
         "see mount and the file server", PeerLostError.exit_code),
        ((facts.free_disk_gib or 0) < 1.0, "warning", f"{_gib(facts.free_disk_gib)} free in {facts.directory}",
         "free some space", 0),
    )  # fmt: skip
    say(
        "/dev/shm",
        f"{_gib(facts.free_shm_gib)} of {_gib(facts.shm_gib)} free",
        (facts.free_shm_gib is None, "error", "there is no /dev/shm", "mount a tmpfs there (containers: --shm-size=1g)",
         CannotWriteError.exit_code),
        ((facts.free_shm_gib or 0) * 1024 < 16 * ranks, "error", f"{_gib(facts.free_shm_gib)} free in /dev/shm",
         "NCCL and gloo need it: remove what others left there (containers: --shm-size=1g)",
         CannotWriteError.exit_code),
        ((facts.free_shm_gib or 0) * 1024 < 64 * ranks, "warning", f"{_gib(facts.free_shm_gib)} free in /dev/shm",
         "NCCL may need more: containers take --shm-size=1g", 0),
    )  # fmt: skip
    _judge_limits(facts, say)
    _judge_name(facts, hosts, say)
    _judge_gpus(facts, say)
    return findings


def judge_run(
    reports: Mapping[int, RankFacts],
    results: Mapping[int, RankResult],
    *,
    expected: Expected,
    requirements: Requirements,
    absent: Mapping[int, str],
    unreachable: Mapping[int, RankFacts],
    gone: Iterable[int],
    doubles: Iterable[str],
) -> list[Finding]:
    """Every finding about a whole run, errors of single hosts included.

    `reports` and `results` came over the network. `absent` are ranks that never answered, with the host where they
    should run as far as it is known; `unreachable` those among the missing that could only write into run.dir; `gone`
    ranks whose connection broke; `doubles` sentences about ranks that two processes claim to be.
    """
    findings = [
        Finding("error", "contract", sentence, "each rank must be started once", "", UsageError.exit_code)
        for sentence in doubles
    ]
    first = reports[0]
    hosts = _by_host([*reports.values(), *unreachable.values()])
    for facts in unreachable.values():
        hint = "its network does not reach the host of rank 0 (firewall, wrong interface)"
        if facts.master != first.master:
            hint = f"it has MASTER_ADDR:MASTER_PORT={facts.master}, rank 0 has {first.master}"
        elif any(map(is_loopback, facts.master_addresses)) and facts.host.host != first.host.host:
            hint = f"there {facts.master} is a loopback address"
        findings.append(
            Finding("error", "master", f"rank {facts.rank} wrote into run.dir but never reached rank 0", hint,
                    facts.host.node, PeerLostError.exit_code)
        )  # fmt: skip
    findings += [_absence(ranks, host) for host, ranks in _grouped(absent).items()]
    findings += [
        Finding("error", "ranks", f"rank {rank} went away during the preflight", "see its own output",
                reports[rank].host.node, PeerLostError.exit_code)
        for rank in sorted(gone)
    ]  # fmt: skip
    for name, of, code, remedy in (
        ("code", lambda facts: facts.code, UsageError.exit_code, "update the checkout there, or use a shared one"),
        ("config", lambda facts: facts.config, UsageError.exit_code,
         "every rank must get the same file, overrides and DeepSpeed JSON"),
        ("ranks", lambda facts: str(facts.world_size), UsageError.exit_code, "one launcher must start all ranks"),
        ("run.dir", lambda facts: facts.run_dir, UsageError.exit_code, "start every rank in the same directory"),
        ("device", lambda facts: facts.device, UsageError.exit_code,
         "give every host the same GPUs, or set DS_ACCELERATOR=cpu everywhere"),
    ):  # fmt: skip
        findings += _odd_ones(hosts, name, of, code, remedy)
    for package in sorted({name for facts in reports.values() for name in facts.host.versions}):
        findings += _odd_ones(
            hosts, package, partial(_version_of, package), UsageError.exit_code, "install the same versions everywhere"
        )
    findings += _odd_ones(hosts, "python", lambda facts: facts.host.python, UsageError.exit_code, "use one Python")
    findings += _odd_ones(
        hosts, "driver", lambda facts: facts.host.gpus[0].driver if facts.host.gpus else "none", None,
        "different drivers mostly work",
    )  # fmt: skip
    for host, ranks in hosts.items():
        each = max(expected.ranks_per_host, len(ranks))
        findings += [
            finding
            for finding in judge_host(ranks[0].host, requirements, ranks=each, hosts=len(hosts))
            if finding.level != "ok"
        ]
        findings += _judge_place(host, ranks, results, expected, several=len(hosts) > 1)
    findings += _judge_master(first, several=len(hosts) > 1)
    findings += _judge_collectives(reports, results, several=len(hosts) > 1)
    findings += judge_time(expected)
    return list(dict.fromkeys(findings))


def judge_time(expected: Expected) -> list[Finding]:
    """Whether the last checkpoint fits between the scheduler's warning and the end of the job."""
    left, save = expected.seconds_left, expected.checkpoint_seconds
    if left is None:
        return []
    if save is None:
        return [Finding("ok", "time limit", f"{left / 60:.0f} min left; how long a save takes is not known yet")]
    usable = min(expected.warning_seconds, left)
    if usable < 2 * save or left < expected.warning_seconds:
        return [
            Finding(
                "warning", "time limit",
                f"{left / 60:.0f} min left, the last save took {save:.0f} s and is asked for "
                f"{expected.warning_seconds:.0f} s before the end",
                f"ask for more time, or for an earlier warning (--signal=B:USR2@{max(300, round(3 * save))})",
            )
        ]  # fmt: skip
    return [Finding("ok", "time limit", f"{left / 60:.0f} min left, the last save took {save:.0f} s")]


def bad_hosts(findings: Iterable[Finding], hosts: Iterable[str]) -> list[str]:
    """Hosts to leave out: those with an error of their own, unless every host has one. `hosts` is all of them."""
    bad = sorted({finding.host for finding in findings if finding.level == "error" and finding.host})
    return bad if set(hosts) - set(bad) else []


def _judge_limits(facts: HostFacts, say: Callable[..., None]) -> None:
    nofile, memlock, nproc = (facts.limits.get(name, UNLIMITED) for name in ("nofile", "memlock", "nproc"))
    say(
        "open files",
        _number(nofile),
        (0 <= nofile < 1024, "error", f"ulimit -n is {nofile}", "ulimit -n 65536", UsageError.exit_code),
        (0 <= nofile < 4096, "warning", f"ulimit -n is {nofile}", "ulimit -n 65536, many ranks need many sockets", 0),
    )
    say(
        "processes",
        _number(nproc),
        (0 <= nproc < 1024, "warning", f"ulimit -u is {nproc}", "ulimit -u 65536: every thread counts", 0),
    )
    say(
        "locked memory",
        _number(memlock) + ("" if memlock == UNLIMITED else " bytes"),
        (facts.has_rdma and memlock != UNLIMITED, "warning",
         f"ulimit -l is {memlock // 1024} KiB and this host has RDMA devices",
         "ulimit -l unlimited (Slurm: PropagateResourceLimits), or NCCL fails to register memory", 0),
    )  # fmt: skip


def _judge_name(facts: HostFacts, hosts: int, say: Callable[..., None]) -> None:
    several = hosts > 1 and not facts.socket_interface
    level: Level = "error" if several else "warning"
    loopback = [address for address in facts.own_addresses if is_loopback(address)]
    say(
        "own name",
        f"{facts.host} is {', '.join(facts.own_addresses) or 'unknown'}; interfaces "
        f"{', '.join(facts.interfaces) or 'none but loopback'}",
        (not facts.own_addresses and not facts.socket_interface, level, f"{facts.host} does not know its own name",
         "add it to DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME", PeerLostError.exit_code),
        (several and bool(loopback), "error",
         f"{facts.host} takes its own name for {', '.join(loopback)}: other hosts could not answer it",
         f"mend /etc/hosts, or set GLOO_SOCKET_IFNAME={(facts.interfaces or ['eth0'])[0]}", PeerLostError.exit_code),
    )  # fmt: skip


def _judge_gpus(facts: HostFacts, say: Callable[..., None]) -> None:
    if facts.gpu_problem:
        say("GPUs", "", (True, "error", facts.gpu_problem, "reset the GPU, or leave this host out",
                         PeerLostError.exit_code))  # fmt: skip
        return
    if not facts.gpus:
        say("GPUs", "none" if not facts.gpu_files else f"{facts.gpu_files} device files, no nvidia-smi to ask")
        return
    for gpu in facts.gpus:
        used, total = gpu.used_gib or 0.0, gpu.total_gib or 0.0
        say(
            f"GPU {gpu.index}",
            f"{gpu.name}, driver {gpu.driver}, {_gib(gpu.used_gib)} of {_gib(gpu.total_gib)} used",
            (bool(gpu.uncorrected_errors), "error", f"{_named(gpu)}: {gpu.uncorrected_errors} uncorrected ECC errors",
             "reset it, or leave the host out", PeerLostError.exit_code),
            (total > 0 and used > max(1.0, 0.05 * total), "warning",
             f"{_named(gpu)}: {used:.1f} of {total:.1f} GiB are in use before the start",
             "see nvidia-smi on that host: an orphan of an earlier job?", 0),
            ((gpu.celsius or 0) >= 90, "warning", f"{_named(gpu)} is at {gpu.celsius} degrees Celsius",
             "it will slow down: look after its cooling", 0),
        )  # fmt: skip


def _judge_place(
    host: str, ranks: Sequence[RankFacts], results: Mapping[int, RankResult], expected: Expected, *, several: bool
) -> list[Finding]:
    """run.dir, inputs, GPUs and clock of one host."""
    findings: list[Finding] = []
    facts = ranks[0]

    def bad(level: Level, check: str, fact: str, remedy: str, code: int = 0) -> None:
        findings.append(Finding(level, check, fact, remedy, host, code))

    for missing in sorted({name for rank in ranks for name in rank.missing_inputs}):
        bad(
            "error",
            "inputs",
            f"there is no {missing}",
            "copy it there, or use a shared path",
            MissingInputError.exit_code,
        )
    if problem := next((rank.run_dir_problem for rank in ranks if rank.run_dir_problem), ""):
        bad("error", "run.dir", f"cannot write run.dir={facts.run_dir}: {problem}", "mend it, or set another run.dir",
            CannotWriteError.exit_code)  # fmt: skip
    seen = [results[rank.rank].nonce for rank in ranks if rank.rank in results]
    if "missing" in seen or "stale" in seen:
        what = "has not the file that rank 0 wrote" if "missing" in seen else "has the file of an earlier start"
        bad("error", "run.dir", f"run.dir={facts.run_dir} {what} ({facts.run_dir_file_system}): it is not shared",
            "put run.dir on a file system that all hosts have", CannotWriteError.exit_code)  # fmt: skip
    free, size = facts.run_dir_free_gib, expected.checkpoint_gib
    if free is not None and size is not None and not problem:
        wanted = size * max(1, expected.checkpoints_to_come)
        said = f"{_gib(free)} free for run.dir, a checkpoint takes about {_gib(size)} ({expected.checkpoint_source})"
        if free < size:
            bad("error", "disk", said, "free some space, or set another run.dir", CannotWriteError.exit_code)
        elif free < wanted:
            bad("warning", "disk", f"{said}, and {expected.checkpoints_to_come} more will lie there at once",
                "free some space, or lower checkpoint.keep")  # fmt: skip
    local = max(rank.local_world_size for rank in ranks)
    if facts.device == "cuda" and facts.visible_gpus not in (1, *range(local, 1 << 10)):
        bad("error", "GPUs", f"{local} ranks for {facts.visible_gpus} visible GPUs", "start one rank a GPU",
            UsageError.exit_code)  # fmt: skip
    for rank in ranks:
        skew = results[rank.rank].clock_skew if rank.rank in results else 0.0
        if several and abs(skew) > 1.0:
            bad("warning", "clock", f"its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} rank 0's",
                "switch on time synchronisation (chrony); times in logs will not fit together")  # fmt: skip
            break
    return findings


def _judge_master(first: RankFacts, *, several: bool) -> list[Finding]:
    loopback = [address for address in first.master_addresses if is_loopback(address)]
    if several and loopback:
        return [
            Finding("error", "master", f"MASTER_ADDR={first.master} is {loopback[0]} on the host of rank 0: a loopback "
                    "address, and there are several hosts", "set it to an address that the others reach",
                    "", PeerLostError.exit_code)
        ]  # fmt: skip
    return []


def _judge_collectives(
    reports: Mapping[int, RankFacts], results: Mapping[int, RankResult], *, several: bool
) -> list[Finding]:
    findings = []
    for rank, result in sorted(results.items()):
        probe, host = result.probe, reports[rank].host.node
        if probe.error:
            findings.append(
                Finding("error", "collectives", f"rank {rank}, after stage {probe.stage!r}: {probe.error}",
                        "see the interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the GPU of that host",
                        host if probe.stage == "not started" else "", PeerLostError.exit_code)
            )  # fmt: skip
        elif (probe.import_seconds or 0) > 20:
            findings.append(
                Finding("warning", "torch", f"importing torch took {probe.import_seconds:.0f} s",
                        "a slow file system: install the environment on a local disk or in a container image", host)
            )  # fmt: skip
    rates = [result.probe.nccl_gib_per_second for result in results.values() if result.probe.nccl_gib_per_second]
    if several and rates and min(rates) < 1.0:
        findings.append(
            Finding("warning", "collectives", f"NCCL all-reduces {min(rates):.2f} GiB/s",
                    "it may have fallen back to a slow network: see NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA")
        )  # fmt: skip
    return findings


def _version_of(package: str, facts: RankFacts) -> str:
    return facts.host.versions.get(package, "not installed")


def _odd_ones(
    hosts: Mapping[str, Sequence[RankFacts]], name: str, of: Callable[[RankFacts], str], code: int | None, remedy: str
) -> list[Finding]:
    """Hosts on which `of` is not what most ranks have (a tie: what rank 0 has); a warning when `code` is None."""
    everyone = [facts for ranks in hosts.values() for facts in ranks]
    counts = Counter(map(of, everyone))
    first = of(min(everyone, key=lambda facts: facts.rank))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    findings = []
    for host, ranks in hosts.items():
        odd = [facts for facts in ranks if of(facts) != usual]
        if odd:
            which = "" if len(odd) == len(ranks) else f" on rank {', '.join(str(facts.rank) for facts in odd)}"
            fact = f"{name} is {of(odd[0])}{which}, elsewhere {usual}"
            findings.append(Finding("warning" if code is None else "error", name, fact, remedy, host, code or 0))
    return findings


def _absence(ranks: Sequence[int], host: str) -> Finding:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks_as_text(ranks)}"
    where = f" on {host}" if host else ""
    return Finding("error", "ranks", f"{who}{where} did not answer",
                   "see whether the host is up and the process started; a firewall may stand between", host,
                   PeerLostError.exit_code)  # fmt: skip


def ranks_as_text(ranks: Sequence[int]) -> str:
    """`0-3,7` of [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _grouped(absent: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, host in sorted(absent.items()):
        groups.setdefault(host, []).append(rank)
    return groups


def _by_host(reports: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    hosts: dict[str, list[RankFacts]] = {}
    for facts in sorted(reports, key=lambda facts: facts.rank):
        hosts.setdefault(facts.host.node, []).append(facts)
    return hosts


def _named(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


def _number(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:,}"


def _gib(size: float | None) -> str:
    if size is None:
        return "unknown"
    return f"{size * 1024:.0f} MiB" if size < 1 else f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.1f} TiB"


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of 2.13.0+cu126."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def _same_version(found: str, tested: str) -> bool:
    return _release(found) == _release(tested)


def _older(found: str, oldest: str) -> bool:
    return _release(found) < _release(oldest)
