"""The report of rank 0: one line a host, then what is wrong and what to do about it."""

from __future__ import annotations

import json

from launch.preflight.findings import Finding, bad_hosts, exit_code
from launch.preflight.judge_run import ranks_as_text
from launch.preflight.reports import Attendance, RankFacts


def as_json(attendance: Attendance, findings: list[Finding], seconds: float) -> str:
    """Everything, for programs."""
    return json.dumps(
        {
            "ok": exit_code(findings) == 0,
            "exit_code": exit_code(findings),
            "seconds": round(seconds, 2),
            "exclude": bad_hosts(findings, _hosts(attendance, findings)),
            "findings": [finding.as_json() for finding in findings],
            "ranks": {rank: facts.model_dump() for rank, facts in sorted(attendance.reports.items())},
            "unreachable": {rank: facts.model_dump() for rank, facts in sorted(attendance.unreachable.items())},
            "results": {rank: result.model_dump() for rank, result in sorted(attendance.results.items())},
        },
        indent=1,
    )


def as_lines(attendance: Attendance, findings: list[Finding], ranks: int, seconds: float) -> list[str]:
    """Everything that matters, for people."""
    hosts, known = _hosts(attendance, findings), attendance.hosts()
    widest = max(map(len, hosts))
    lines = [f"{host:<{widest}}  {_host_line(host, known.get(host, []), attendance, findings)}" for host in hosts]
    for finding in findings:
        if finding.level != "ok" or finding.check == "time limit":
            where = f"{finding.host}: " if finding.host else ""
            lines.append(f"{finding.level}: {where}{finding.fact}" + (f"; {finding.remedy}" if finding.remedy else ""))
    if excluded := bad_hosts(findings, hosts):
        lines.append(f"to leave the bad hosts out: --exclude={','.join(excluded)}")
    code = exit_code(findings)
    verdict = f"not fit to train (exit code {code})" if code else "fit to train"
    lines.append(f"preflight: {verdict}: {len(hosts)} host(s), {ranks} rank(s), {seconds:.1f} s")
    # Some of it came over the network: nothing in it may steer a terminal.
    return ["".join(letter if letter.isprintable() else "?" for letter in line) for line in lines]


def _hosts(attendance: Attendance, findings: list[Finding]) -> list[str]:
    """All hosts by name, those that only a finding tells of last."""
    return list(dict.fromkeys([*attendance.hosts(), *(finding.host for finding in findings if finding.host)]))


def _host_line(host: str, ranks: list[RankFacts], attendance: Attendance, findings: list[Finding]) -> str:
    levels = {finding.level for finding in findings if finding.host == host}
    level = next((level for level in ("error", "warning") if level in levels), "ok")
    if not ranks:
        return f"{level:<7}  not heard of"
    first, facts = ranks[0], ranks[0].host
    parts = [
        f"rank {ranks_as_text([rank.rank for rank in ranks])}",
        f"code {first.code}",
        f"config {first.config}",
        f"torch {facts.versions.get('torch', 'missing')}",
        f"{facts.cores} cores",
        f"{facts.free_memory_gib:.0f} GiB free",
        f"{len(facts.gpus)} x {facts.gpus[0].name}" if facts.gpus else "no GPU",
    ]
    if first.run_dir_free_gib is not None:
        parts.append(f"run.dir on {first.run_dir_file_system} with {first.run_dir_free_gib:.0f} GiB")
    for rank in ranks[:1]:
        if (result := attendance.results.get(rank.rank)) is not None:
            parts.append(f"clock {result.clock_skew:+.3f} s")
            probe = result.probe
            rates = (("gloo", probe.gloo_gib_per_second), ("NCCL", probe.nccl_gib_per_second))
            parts += [f"{name} {rate:.2f} GiB/s" for name, rate in rates if rate is not None]
    return f"{level:<7}  {', '.join(parts)}"
