"""Try everything a training run needs, on every host, in less than a minute, before the run is started.

steadfast preflight configs/tiny.yaml --nproc 2
srun --ntasks-per-node=1 ... steadfast preflight CONFIG     (with the six variables of a rank; sft.sh does it)

One line a host: the same code, configuration and versions; run.dir shared and large enough; the rendezvous, clocks,
limits, GPUs, the first all-reduces. Warnings do not stop a run. Exit codes: 0 fit, 2 the hosts differ, 66 an input is
missing, 69 a host does not answer or is not well (the --exclude= line leaves it out), 73 run.dir cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from launch.bounded import Overdue, bounded
from launch.contract import resolve
from launch.local import ADDRESS, plan_local
from launch.preflight import expect
from launch.preflight.facts import GIB, file_system_of, host_facts
from launch.preflight.judge import (
    Expected,
    Finding,
    Probe,
    RankFacts,
    RankResult,
    bad_hosts,
    exit_code,
    judge_run,
    ranks_as_text,
)
from launch.preflight.mailbox import Mailbox
from launch.preflight.meeting import Desk, Instructions, Verdict, Visitor
from launch.preflight.requirements import read_requirements
from launch.processes import HostRanks, Output, free_port
from launch.rendezvous import open_port, reach, resolve_address
from launch.signals import die_with_launcher
from launch.train_command import checked_config, require_gpus
from trainer.config.arguments import add_config_arguments
from trainer.config.device import guess_device, visible_gpus
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.errors import CannotWriteError, PeerLostError, UsageError
from trainer.world import World, agent_opens_store

ROOT = Path(__file__).resolve().parents[2]
_FILE_SECONDS = 10.0
_SHARE_FOR_MEETING = 0.45
_SHARE_FOR_PROBE = 0.85
_SHARE_FOR_VERDICT = 0.95
_LONGEST = 600


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `preflight CONFIG [section.key=value ...]`."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (1 when not given)")
    parser.add_argument(
        "--ranks-per-host", type=int, metavar="K", help="ranks the run will have on a host, when not as here"
    )
    parser.add_argument("--within", type=int, default=60, metavar="SECONDS", help="bound on everything (10 to 600)")
    parser.add_argument("--no-collectives", action="store_true", help="leave out the first all-reduces (and torch)")
    parser.add_argument("--json", action="store_true", help="rank 0 prints one JSON object instead")


def run(arguments: argparse.Namespace) -> int:
    """Be one rank of the preflight when a launcher started us, else start its ranks here; returns the exit code."""
    if not 10 <= arguments.within <= _LONGEST:
        raise UsageError(f"--within {arguments.within}", f"give 10 to {_LONGEST} seconds")
    world = resolve(os.environ)
    ranks = arguments.nproc if arguments.nproc is not None else 1
    if world is None and ranks > 1:
        require_gpus("--nproc", ranks, os.environ)
        checked_config(arguments.config, arguments.overrides, ranks, guess_device(os.environ))
        return _start_here([sys.executable, str(ROOT / "steadfast.py"), *_words(arguments)], ranks)
    if world is None:
        world = World(0, 1, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
    elif ranks > 1:
        raise UsageError(f"--nproc {ranks} inside a launched rank (RANK={world.rank} is set)", "drop --nproc")
    if (reason := die_with_launcher(os.environ)) is not None and world.is_first:
        sys.stderr.write(f"warning: {reason}\n")
    config = load_config(arguments.config, arguments.overrides)
    return Rank(world, config, arguments).check()


def _start_here(command: list[str], ranks: int) -> int:
    """Start the ranks of a preflight on this machine; returns the code of rank 0, which speaks for all of them."""
    plan = plan_local(command, processes=ranks, environ=os.environ, port=free_port(ADDRESS))
    here = HostRanks(plan, inherit_stdout_of=0)
    running = set(range(ranks))
    code = PeerLostError.exit_code
    try:
        here.start()
        while running:
            for event in here.next_events(0.2):
                if isinstance(event, Output):
                    sys.stderr.write(f"[rank {event.rank}] {event.line}\n")
                    continue
                running.discard(event.rank)
                if event.rank == 0:
                    code = event.status if event.status >= 0 else code
                if event.status < 0:
                    sys.stderr.write(f"error: rank {event.rank} was killed by {_how(event.status)}\n")
    finally:
        here.close()
    return code


class Rank:
    """One rank of the preflight. `check` never takes longer than --within."""

    def __init__(self, world: World, config: Config, arguments: argparse.Namespace) -> None:
        self._world = world
        self._config = config
        self._arguments = arguments
        self._began = time.monotonic()
        self._stage = "looking at this host"
        self._mailbox = Mailbox(Path(config.run.dir))
        # torchrun's agent holds the port of the ranks, so they meet at the next one.
        self._port = world.master_port + int(agent_opens_store(os.environ))

    def check(self) -> int:
        """Go through everything; returns the exit code that all ranks share."""
        alarm = threading.Timer(self._arguments.within, self._overdue)
        alarm.daemon = True
        alarm.start()
        try:
            return self._lead() if self._world.is_first else self._follow()
        finally:
            alarm.cancel()

    def _lead(self) -> int:
        world, desk = self._world, Desk(self._world.world_size)
        address = World(
            world.rank, world.world_size, world.local_rank, world.local_world_size, world.master_address, self._port
        )
        with open_port(address) as listener:
            desk.serve(listener)
            nonce = secrets.token_hex(16)
            problem = self._bounded_write(lambda: self._mailbox.write_nonce(nonce))
            facts = self._facts(problem)
            desk.put(0, facts)
            self._stage = "waiting for the other ranks"
            missing = desk.await_reports(self._time(_SHARE_FOR_MEETING))
            unreachable = self._mailbox_reports(missing)
            probe_port = None
            if not missing and not self._arguments.no_collectives:
                probe_port = free_port(resolve_address(world.master_address)[0] if self._one_host() else "")
            instructions = Instructions(
                nonce=nonce, probe_port=probe_port, probe_seconds=max(1.0, self._left(_SHARE_FOR_PROBE))
            )
            desk.instruct(instructions)
            self._stage = "the first collectives"
            desk.put(0, self._result(instructions, skew=0.0))
            self._stage = "waiting for the results of the other ranks"
            silent = desk.await_results(self._time(_SHARE_FOR_VERDICT))
            absent = {rank: self._host_of(rank, desk) for rank in missing - unreachable.keys()}
            findings = judge_run(
                desk.reports,
                desk.results,
                expected=self._expected(),
                requirements=read_requirements(),
                absent=absent | {rank: desk.reports[rank].host.node for rank in silent},
                unreachable=unreachable,
                gone=desk.gone,
                doubles=desk.doubles,
            )
            code = exit_code(findings)
            self._print(desk, unreachable, findings, code)
            worst = next((finding for finding in findings if finding.code == code and code), None)
            desk.decide(Verdict(code=code, sentence="" if worst is None else worst.fact))
            # The others read it from their connections; they are answered by threads of ours.
            time.sleep(0.2)
        self._bounded_write(self._mailbox.remove)
        return code

    def _follow(self) -> int:
        world = self._world
        facts = self._facts("")
        if problem := self._bounded_write(lambda: self._mailbox.write(facts)):
            facts = facts.model_copy(update={"run_dir_problem": problem})
        self._stage = "reaching rank 0"
        place = f"{world.master_address}:{self._port}"
        with reach(world.master_address, self._port, max(1.0, self._left(_SHARE_FOR_MEETING))) as connection:
            visitor = Visitor(connection, place)
            skew = visitor.clock_skew()
            self._stage = "waiting for the other ranks"
            end = self._time(0.99)
            instructions = visitor.report(facts, end)
            self._stage = "the first collectives"
            result = self._result(instructions, skew)
            self._stage = "waiting for the verdict of rank 0"
            return visitor.result(world.rank, result, end).code

    def _facts(self, run_dir_problem: str) -> RankFacts:
        world, config, run_dir = self._world, self._config, Path(self._config.run.dir)
        existing = next(place for place in (run_dir, *run_dir.absolute().parents) if place.exists())
        free = None
        with suppress(OSError, Overdue):
            free = bounded(lambda: shutil.disk_usage(existing).free / GIB, _FILE_SECONDS)
        addresses: list[str] = []
        with suppress(PeerLostError):
            addresses = resolve_address(world.master_address, 10.0)
        return RankFacts(
            rank=world.rank,
            world_size=world.world_size,
            local_rank=world.local_rank,
            local_world_size=world.local_world_size,
            pid=os.getpid(),
            master=f"{world.master_address}:{world.master_port}",
            master_addresses=addresses,
            code=expect.code_hash(),
            config=expect.config_hash(config),
            device=guess_device(os.environ),
            visible_gpus=visible_gpus(os.environ),
            missing_inputs=expect.missing_inputs(config),
            run_dir=str(run_dir.absolute()),
            run_dir_file_system=file_system_of(existing),
            run_dir_free_gib=free,
            run_dir_problem=run_dir_problem,
            host=host_facts(os.environ),
        )

    def _result(self, instructions: Instructions, skew: float) -> RankResult:
        nonce = self._mailbox.look_for(instructions.nonce)
        probe = Probe()
        if instructions.probe_port is not None:
            probe = run_probe(self._world, instructions.probe_port, instructions.probe_seconds)
        return RankResult(nonce=nonce, clock_skew=round(skew, 3), probe=probe)

    def _bounded_write(self, call: Any) -> str:
        """Why `call` could not write, or empty."""
        try:
            bounded(call, _FILE_SECONDS)
        except Overdue:
            return f"no answer in {_FILE_SECONDS:.0f} s"
        except CannotWriteError as error:
            return error.fact
        return ""

    def _mailbox_reports(self, ranks: set[int]) -> dict[int, RankFacts]:
        with suppress(Overdue):
            return bounded(lambda: self._mailbox.reports(ranks), _FILE_SECONDS) if ranks else {}
        return {}

    def _expected(self) -> Expected:
        size = expect.checkpoint_bytes(self._config)
        return Expected(
            ranks_per_host=self._arguments.ranks_per_host or self._world.local_world_size,
            checkpoint_gib=None if size is None else size[0] / GIB,
            checkpoint_source="" if size is None else size[1],
            # While one is written the one it will replace is still there.
            checkpoints_to_come=self._config.checkpoint.keep + 1 - expect.checkpoints_kept(self._config),
            checkpoint_seconds=expect.checkpoint_seconds(self._config),
            seconds_left=expect.seconds_left(os.environ),
            warning_seconds=300.0,
        )

    def _host_of(self, rank: int, desk: Desk) -> str:
        """The host where a rank that never answered should run, when the scheduler or its neighbours tell."""
        each = self._world.local_world_size
        neighbours = [facts.host.node for other, facts in desk.reports.items() if other // each == rank // each]
        if neighbours:
            return neighbours[0]
        nodes = step_nodes(os.environ)
        return nodes[rank // each] if len(nodes) * each == self._world.world_size else ""

    def _one_host(self) -> bool:
        return self._world.local_world_size == self._world.world_size

    def _print(self, desk: Desk, unreachable: Mapping[int, RankFacts], findings: list[Finding], code: int) -> None:
        seconds = time.monotonic() - self._began
        hosts = host_lines({**desk.reports, **unreachable}, desk.results, findings)
        excluded = bad_hosts(findings, hosts)
        if self._arguments.json:
            print(json.dumps({
                "ok": code == 0, "exit_code": code, "seconds": round(seconds, 2), "exclude": excluded,
                "findings": [finding.as_json() for finding in findings],
                "ranks": {rank: facts.model_dump() for rank, facts in sorted(desk.reports.items())},
                "results": {rank: result.model_dump() for rank, result in sorted(desk.results.items())},
            }, indent=1), flush=True)  # fmt: skip
            return
        for line in hosts.values():
            print(line)
        for finding in findings:
            if finding.level != "ok":
                where = f"{finding.host}: " if finding.host else ""
                print(f"{finding.level}: {where}{finding.fact}" + (f"; {finding.remedy}" if finding.remedy else ""))
        if excluded:
            print(f"to leave the bad hosts out: --exclude={','.join(excluded)}")
        words = {0: "fit to train"}.get(code, f"not fit to train (exit code {code})")
        print(
            f"preflight: {words}, {len(hosts)} host(s), {self._world.world_size} rank(s), {seconds:.1f} s", flush=True
        )

    def _time(self, share: float) -> float:
        return self._began + share * float(self._arguments.within)

    def _left(self, share: float) -> float:
        return self._time(share) - time.monotonic()

    def _overdue(self) -> None:
        """Something does not come back, a file server for instance: say where and end, whatever hangs."""
        sys.stderr.write(
            f"error: the preflight of rank {self._world.rank} on {socket.gethostname()} did not end within "
            f"{self._arguments.within} s: it was {self._stage}\n"
        )
        sys.stderr.flush()
        os._exit(PeerLostError.exit_code)


def run_probe(world: World, port: int, seconds: float) -> Probe:
    """What the child with the first collectives said until it ended, or was killed after `seconds`."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environ |= {
        "RANK": str(world.rank), "WORLD_SIZE": str(world.world_size), "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_world_size), "MASTER_ADDR": world.master_address, "MASTER_PORT": str(port),
    }  # fmt: skip
    end = time.monotonic() + seconds
    command = [sys.executable, "-m", "trainer.probe", str(os.getpid()), str(max(1, int(seconds)))]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lines: Queue[bytes] = Queue()
    noise: list[bytes] = []
    readers = [
        threading.Thread(target=_copy, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_copy, args=(child.stderr, noise.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    said: dict[str, Any] = {}
    while said.get("stage") != "done" and "error" not in said and (left := end - time.monotonic()) > 0:
        with suppress(Empty, ValueError):
            said |= json.loads(lines.get(timeout=min(left, 0.2)))
            continue
        if child.poll() is not None and not readers[0].is_alive() and lines.empty():
            last = (noise[-1].decode(errors="replace").strip() if noise else "") or "it said nothing"
            said["error"] = f"the process ended ({_how(child.returncode)}): {last}"
    if said.get("stage") != "done" and "error" not in said:
        said["error"] = f"no further in {seconds:.0f} s"
    child.kill()
    child.wait()
    return Probe.model_validate(said)


def host_lines(
    reports: Mapping[int, RankFacts], results: Mapping[int, RankResult], findings: list[Finding]
) -> dict[str, str]:
    """One line a host, by name."""
    hosts: dict[str, list[RankFacts]] = {}
    for _, facts in sorted(reports.items()):
        hosts.setdefault(facts.host.node, []).append(facts)
    for finding in findings:
        if finding.host:
            hosts.setdefault(finding.host, [])
    widest = max(map(len, hosts))
    return {host: f"{host:<{widest}}  {_host_line(host, ranks, results, findings)}" for host, ranks in hosts.items()}


def step_nodes(environ: Mapping[str, str]) -> list[str]:
    """The hosts of this Slurm step in the order of its ranks; empty outside one."""
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not names:
        return []
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["scontrol", "show", "hostnames", names]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
        return done.stdout.split()
    return []


def _host_line(host: str, ranks: list[RankFacts], results: Mapping[int, RankResult], findings: list[Finding]) -> str:
    mine = [finding for finding in findings if finding.host == host]
    level = next((level for level in ("error", "warning") if any(finding.level == level for finding in mine)), "ok")
    if not ranks:
        return f"{level:<7}  {mine[0].fact}"
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
    if result := next((results[rank.rank] for rank in ranks if rank.rank in results), None):
        parts.append(f"clock {result.clock_skew:+.3f} s")
        for name, rate in (("gloo", result.probe.gloo_gib_per_second), ("nccl", result.probe.nccl_gib_per_second)):
            if rate is not None:
                parts.append(f"{name} {rate:.2f} GiB/s")
    return f"{level:<7}  {', '.join(parts)}"


def _copy(lines: IO[bytes] | None, put: Callable[[bytes], None]) -> None:
    for line in lines or ():
        put(line)


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _words(arguments: argparse.Namespace) -> list[str]:
    words = ["preflight", str(arguments.config), *arguments.overrides, "--within", str(arguments.within)]
    words += ["--json"] * arguments.json + ["--no-collectives"] * arguments.no_collectives
    words += ["--traceback"] * arguments.traceback
    return words + (["--ranks-per-host", str(arguments.ranks_per_host)] if arguments.ranks_per_host else [])
