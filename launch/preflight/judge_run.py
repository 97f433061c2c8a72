"""Are the hosts of a run fit to train together? What all ranks said in, findings out. Pure.

Of good news only what is measured is kept; what is wrong names the host, so that it can be left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from launch.preflight.findings import Finding, error, ok, warning
from launch.preflight.judge_host import judge_host, size
from launch.preflight.reports import Attendance, Expected, RankFacts, Requirements
from launch.rendezvous import is_loopback
from trainer.errors import CannotWriteError, MissingInputError, PeerLostError, UsageError

_LARGEST_SKEW_SECONDS = 1.0
_SLOW_IMPORT_SECONDS = 20.0
_SLOW_NCCL_GIB_PER_SECOND = 1.0


def judge_run(attendance: Attendance, expected: Expected, requirements: Requirements) -> list[Finding]:
    """Every finding about a run, those of its single hosts included; rank 0 must be among the reports."""
    hosts = attendance.hosts()
    first = attendance.reports[0]
    several = len(hosts) > 1 or first.local_world_size < first.world_size
    findings = [*_missing(attendance), *_differences(hosts), *_master(attendance, several)]
    for host, ranks in hosts.items():
        each = max(expected.ranks_per_host, len(ranks))
        judged = judge_host(ranks[0].host, requirements, ranks=each, several=several)
        findings += [finding for finding in judged if finding.level != "ok"]
        findings += [*_inputs(host, ranks), *_gpus(host, ranks), *_clock(host, ranks, attendance, several)]
        findings += _room(host, ranks[0], expected)
    findings += [*_run_directory(attendance), *_collectives(attendance, several), *judge_time(expected)]
    # A host that runs two ranks is judged for both.
    return list(dict.fromkeys(findings))


def judge_time(expected: Expected) -> list[Finding]:
    """Whether the last checkpoint fits between the scheduler's warning and the end of the job."""
    left, save, warned = expected.seconds_left, expected.checkpoint_seconds, expected.warning_seconds
    if left is None:
        return []
    if left < warned:
        remedy = "ask for more time"
        return [warning("time limit", f"{left:.0f} s left, less than the {warned:.0f} s of the warning", remedy)]
    if save is None:
        return [ok("time limit", f"{left / 60:.0f} min left; how long a save takes is not known yet")]
    said = f"{left / 60:.0f} min left, the last save took {save:.0f} s"
    if warned < 2 * save:
        remedy = f"warn earlier: --signal=B:USR2@{round(3 * save)}"
        return [warning("time limit", f"{said}, the warning comes {warned:.0f} s before the end", remedy)]
    return [ok("time limit", said)]


def ranks_as_text(ranks: Sequence[int]) -> str:
    """`0-3,7` of [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _missing(attendance: Attendance) -> list[Finding]:
    """Ranks that are not there, or there twice."""
    lost = PeerLostError.exit_code
    first = attendance.reports[0]
    # Then nobody can come from elsewhere, and no host is to blame.
    hopeless = _is_loopback_name(first.master)
    findings = [
        error("ranks", sentence, "each rank must be started once", UsageError.exit_code)
        for sentence in attendance.doubles
    ]
    by_host: dict[str, list[int]] = {}
    for rank, host in sorted(attendance.absent.items()):
        by_host.setdefault(host, []).append(rank)
    for host, ranks in by_host.items():
        fact = f"rank {ranks_as_text(ranks)}{f' on {host}' if host else ''} did not answer"
        remedy = "see whether its host is up and its process started"
        findings.append(error("ranks", fact, remedy, lost, "" if hopeless else host))
    for rank, facts in sorted(attendance.unreachable.items()):
        if facts.master != first.master:
            remedy = f"it has MASTER_ADDR:MASTER_PORT={facts.master}, rank 0 has {first.master}"
        elif any(map(is_loopback, facts.master_addresses)) and facts.host.host != first.host.host:
            remedy = f"there {facts.master} is {', '.join(facts.master_addresses)}, that host itself"
        else:
            remedy = "a firewall or a wrong interface stands between"
        blamed = "" if hopeless and facts.master == first.master else facts.host.node
        fact = f"rank {rank} on {facts.host.node} has written into run.dir but cannot reach rank 0"
        findings.append(error("master", fact, remedy, lost, blamed))
    for rank in sorted(attendance.gone):
        host = attendance.reports[rank].host.node
        findings.append(error("ranks", f"rank {rank} ended during the preflight", "see what it said", lost, host))
    for rank in sorted(attendance.silent):
        host = attendance.reports[rank].host.node
        findings.append(error("ranks", f"rank {rank} came, then fell silent", "see what it said", lost, host))
    return findings


def _differences(hosts: Mapping[str, Sequence[RankFacts]]) -> list[Finding]:
    """What must be the same everywhere and is not."""
    versions = sorted({name for ranks in hosts.values() for facts in ranks for name in facts.host.versions})
    must_agree: list[tuple[str, Callable[[RankFacts], str], str]] = [
        ("code", lambda facts: facts.code, "update the checkout there, or use a shared one"),
        ("configuration", lambda facts: facts.config, "give every rank the same file, overrides and DeepSpeed JSON"),
        ("WORLD_SIZE", lambda facts: str(facts.world_size), "one launcher must start all ranks"),
        ("device", lambda facts: facts.device, "give every host the same GPUs, or set DS_ACCELERATOR=cpu everywhere"),
        ("Python", lambda facts: facts.host.python, "use the same one everywhere"),
        *((name, partial(_version, name), "install the same versions everywhere") for name in versions),
    ]
    findings = []
    for name, value, remedy in must_agree:
        for host, fact in _odd_ones(hosts, name, value):
            findings.append(error(name, fact, remedy, UsageError.exit_code, host))
    # Only the first rank of a host has asked for its GPUs.
    for host, fact in _odd_ones({host: ranks[:1] for host, ranks in hosts.items()}, "the driver", _driver):
        findings.append(warning("driver", fact, "different drivers mostly work together", host))
    return findings


def _odd_ones(
    hosts: Mapping[str, Sequence[RankFacts]], name: str, value: Callable[[RankFacts], str]
) -> list[tuple[str, str]]:
    """Hosts with ranks whose value is not that of most ranks (after a tie: that of rank 0), each with the fact."""
    everyone = sorted((facts for ranks in hosts.values() for facts in ranks), key=lambda facts: facts.rank)
    counts = Counter(map(value, everyone))
    usual = max(counts, key=lambda found: (counts[found], found == value(everyone[0])))
    odd = []
    for host, ranks in hosts.items():
        others = [facts for facts in ranks if value(facts) != usual]
        if others:
            who = ranks_as_text([facts.rank for facts in others])
            odd.append((host, f"{name} is {value(others[0])} on rank {who}, elsewhere {usual}"))
    return odd


def _version(package: str, facts: RankFacts) -> str:
    return facts.host.versions.get(package, "not installed")


def _driver(facts: RankFacts) -> str:
    return facts.host.gpus[0].driver if facts.host.gpus else "none"


def _master(attendance: Attendance, several: bool) -> list[Finding]:
    """MASTER_ADDR as the host of rank 0 understands it."""
    first = attendance.reports[0]
    if not several or not any(map(is_loopback, first.master_addresses)):
        return []
    address = first.master.rpartition(":")[0]
    if _is_loopback_name(first.master):
        fact = f"MASTER_ADDR={address} means every host itself, and there are several"
        return [error("master", fact, "set it to the name of the host of rank 0", UsageError.exit_code)]
    fact = f"on its own host MASTER_ADDR={address} is {', '.join(first.master_addresses)}"
    return [warning("master", fact, "mend /etc/hosts there", first.host.node)]


def _is_loopback_name(master: str) -> bool:
    """Whether HOST:PORT means every host itself, whoever reads it."""
    address = master.rpartition(":")[0]
    return address == "localhost" or is_loopback(address)


def _inputs(host: str, ranks: Sequence[RankFacts]) -> list[Finding]:
    missing = sorted({name for facts in ranks for name in facts.missing_inputs})
    remedy = "make it, copy it there, or use a shared path"
    return [error("inputs", f"there is no {name}", remedy, MissingInputError.exit_code, host) for name in missing]


def _gpus(host: str, ranks: Sequence[RankFacts]) -> list[Finding]:
    local, visible = max(facts.local_world_size for facts in ranks), ranks[0].visible_gpus
    # A rank that sees one GPU takes that one, whatever its local rank.
    if ranks[0].device == "cuda" and visible != 1 and visible < local:
        fact = f"{local} ranks for {visible} visible GPUs"
        return [error("GPUs", fact, "start one rank a GPU", UsageError.exit_code, host)]
    return []


def _clock(host: str, ranks: Sequence[RankFacts], attendance: Attendance, several: bool) -> list[Finding]:
    skews = [attendance.results[facts.rank].clock_skew for facts in ranks if facts.rank in attendance.results]
    worst = max(skews, key=abs, default=0.0)
    if not several or abs(worst) <= _LARGEST_SKEW_SECONDS:
        return []
    fact = f"its clock is {abs(worst):.1f} s {'ahead of' if worst > 0 else 'behind'} that of rank 0"
    return [warning("clock", fact, "synchronise it (chrony): times in logs will not fit together", host)]


def _run_directory(attendance: Attendance) -> list[Finding]:
    """Whether every host writes run.dir, and sees there what rank 0 wrote."""
    code, findings, strangers = CannotWriteError.exit_code, [], []
    hosts = attendance.hosts()
    for host, ranks in hosts.items():
        if problem := next((facts.run_dir_problem for facts in ranks if facts.run_dir_problem), ""):
            findings.append(error("run.dir", problem, "mend it, or set another run.dir", code, host))
            continue
        seen = {attendance.results[facts.rank].nonce for facts in ranks if facts.rank in attendance.results}
        # When rank 0 could not write its file nobody can see it.
        if not seen <= {"seen"} and not attendance.reports[0].run_dir_problem:
            what = "the file of an earlier start" if "stale" in seen else "nothing of what rank 0 wrote"
            place = f"run.dir={ranks[0].run_dir} on {host} ({ranks[0].run_dir_file_system})"
            strangers.append((host, f"{place} has {what}: it is another directory than that of rank 0"))
    # When only the host of rank 0 sees it, run.dir is simply not shared, and leaving a host out would not help.
    everybody = len(strangers) == len(hosts) - 1
    remedy = "put run.dir on a file system that all hosts share"
    findings += [error("run.dir", fact, remedy, code, "" if everybody else host) for host, fact in strangers]
    return findings


def _room(host: str, facts: RankFacts, expected: Expected) -> list[Finding]:
    """Whether the checkpoints will fit."""
    free, each = facts.run_dir_free_gib, expected.checkpoint_gib
    if free is None or each is None or facts.run_dir_problem:
        return []
    said = f"{size(free)} free for run.dir, a checkpoint takes about {size(each)} ({expected.checkpoint_source})"
    if free < each:
        return [error("room", said, "free some space, or set another run.dir", CannotWriteError.exit_code, host)]
    if free < each * expected.checkpoints_to_come:
        fact = f"{said} and {expected.checkpoints_to_come} more will lie there at once"
        return [warning("room", fact, "free some space, or lower checkpoint.keep", host)]
    return []


def _collectives(attendance: Attendance, several: bool) -> list[Finding]:
    findings = []
    # When one rank breaks down the others only say that they lost it: those that came least far tell why.
    stages = ["", "imported", "libraries", "joined", "gloo", "gpu", "nccl", "done"]
    reached = {rank: stages.index(result.probe.stage) for rank, result in attendance.results.items()}
    for rank, result in sorted(attendance.results.items()):
        probe, host = result.probe, attendance.reports[rank].host.node
        if probe.error and (attendance.silent or attendance.gone):
            # They waited for those who are named already.
            continue
        if probe.error and reached[rank] == min(reached.values()):
            everybody = len(set(reached.values())) == 1 and len(reached) > 1
            fact = f"rank {rank} stopped {f'after {probe.stage!r}' if probe.stage else 'at once'}: {probe.error}"
            remedy = "see its interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), its GPU, its torch"
            findings.append(error("collectives", fact, remedy, PeerLostError.exit_code, "" if everybody else host))
        elif (probe.import_seconds or 0.0) > _SLOW_IMPORT_SECONDS:
            fact = f"importing torch took {probe.import_seconds:.0f} s"
            remedy = "a slow file system: put the environment on a local disk or into a container image"
            findings.append(warning("torch", fact, remedy, host))
    rates = [result.probe.nccl_gib_per_second for result in attendance.results.values()]
    slowest = min((rate for rate in rates if rate is not None), default=None)
    if several and slowest is not None and slowest < _SLOW_NCCL_GIB_PER_SECOND:
        fact = f"NCCL all-reduces {slowest:.2f} GiB/s"
        findings.append(warning("collectives", fact, "is it on the right network? NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME"))
    return findings
