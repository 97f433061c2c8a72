"""One rank of the preflight, from its own facts to the verdict that all ranks share.

Time is divided beforehand: ranks meet within 45 % of it, the collectives end by 85 %, the verdict is there by 93 %.
Whatever hangs all the same (a file server) ends with the process when all of it has passed.
"""

from __future__ import annotations

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from launch.bounded import Overdue, bounded
from launch.preflight import expect
from launch.preflight.collectives import run_probe
from launch.preflight.facts import GIB, file_system_of, host_facts
from launch.preflight.findings import exit_code
from launch.preflight.judge_run import judge_run
from launch.preflight.mailbox import Mailbox
from launch.preflight.meeting import Desk, Instructions, Verdict, Visitor
from launch.preflight.reports import Attendance, Expected, Nonce, Probe, RankFacts, RankResult
from launch.preflight.requirements import read_requirements
from launch.preflight.show import as_json, as_lines
from launch.processes import free_port
from launch.rendezvous import open_port, reach, resolve_address
from trainer.config.device import guess_device, visible_gpus
from trainer.config.schema import Config
from trainer.errors import CannotWriteError, PeerLostError
from trainer.world import World, agent_opens_store

_FILE_SECONDS = 8.0
_MEETING_ENDS, _PROBE_ENDS, _VERDICT_COMES, _ALL_ENDS = 0.45, 0.85, 0.93, 0.97
_GOODBYE_SECONDS = 2.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Wish:
    """How the preflight shall go. Times in seconds."""

    within: float = 60.0
    collectives: bool = True
    ranks_per_host: int | None = None
    """Ranks that the run will have on a host; as many as there are now when None."""
    json: bool = False


class Rank:
    """`check` tells all; it never takes longer than `wish.within`."""

    def __init__(self, world: World, config: Config, wish: Wish) -> None:
        self._config, self._wish = config, wish
        # torchrun's agent holds the port of the ranks, so they meet at the next one.
        self._world = replace(world, master_port=world.master_port + int(agent_opens_store(os.environ)))
        self._began = time.monotonic()
        self._doing = "looking at its host"
        self._mailbox = Mailbox(Path(config.run.dir))

    def check(self) -> int:
        """Go through everything and return the exit code, the same one on all ranks.

        Raises PeerLostError when rank 0 cannot be reached, or its port is taken.
        """
        alarm = threading.Timer(self._wish.within, self._give_up)
        alarm.daemon = True
        alarm.start()
        try:
            return self._lead() if self._world.is_first else self._follow()
        finally:
            alarm.cancel()

    def _lead(self) -> int:
        desk, nonce = Desk(self._world.world_size), secrets.token_hex(16)
        with open_port(self._world) as listener:
            desk.serve(listener)
            problem = _why_not_written(lambda: self._mailbox.write_nonce(nonce))
            desk.put(0, self._facts(problem))
            self._doing = "waiting for the other ranks"
            missing = desk.await_reports(self._at(_MEETING_ENDS))
            unreachable: dict[int, RankFacts] = {}
            if missing:
                unreachable = _or_else(lambda: self._mailbox.reports(missing), unreachable)
            instructions = Instructions(
                nonce="" if problem else nonce,
                probe_port=self._probe_port() if self._wish.collectives and not missing else None,
                probe_seconds=max(1.0, self._at(_PROBE_ENDS) - time.monotonic()),
            )
            desk.instruct(instructions)
            desk.put(0, self._result(instructions, skew=0.0))
            self._doing = "waiting for what the other ranks found"
            silent = desk.await_results(self._at(_VERDICT_COMES))
            attendance = Attendance(
                reports=desk.reports,
                results=desk.results,
                absent={rank: self._host_of(rank, desk.reports) for rank in missing - unreachable.keys()},
                unreachable=unreachable,
                silent=frozenset(silent),
                gone=frozenset(desk.gone),
                doubles=tuple(desk.doubles),
            )
            findings = judge_run(attendance, self._expected(), read_requirements())
            seconds = time.monotonic() - self._began
            if self._wish.json:
                print(as_json(attendance, findings, seconds), flush=True)
            else:
                print("\n".join(as_lines(attendance, findings, self._world.world_size, seconds)), flush=True)
            code = exit_code(findings)
            desk.decide(Verdict(code=code))
            desk.await_goodbyes(time.monotonic() + _GOODBYE_SECONDS)
        _or_else(self._mailbox.remove, None)
        return code

    def _follow(self) -> int:
        world, place = self._world, f"{self._world.master_address}:{self._world.master_port}"
        facts = self._facts("")
        if problem := _why_not_written(lambda: self._mailbox.write(facts)):
            facts = facts.model_copy(update={"run_dir_problem": problem})
        self._doing = "trying to reach rank 0"
        left = self._at(_MEETING_ENDS) - time.monotonic()
        with reach(world.master_address, world.master_port, max(1.0, left)) as connection:
            visitor = Visitor(connection, place)
            skew = visitor.clock_skew()
            self._doing = "waiting for the other ranks"
            instructions = visitor.report(facts, self._at(_ALL_ENDS))
            if problem:
                # What cannot be written need not be read.
                instructions = instructions.model_copy(update={"nonce": ""})
            result = self._result(instructions, skew)
            self._doing = "waiting for the verdict of rank 0"
            return visitor.result(result, self._at(_ALL_ENDS)).code

    def _facts(self, run_dir_problem: str) -> RankFacts:
        world, run_dir = self._world, Path(self._config.run.dir)
        addresses: list[str] = []
        with suppress(PeerLostError):
            addresses = resolve_address(world.master_address)
        existing = _or_else(
            lambda: next(place for place in (run_dir, *run_dir.absolute().parents) if place.exists()), None
        )
        return RankFacts(
            rank=world.rank,
            world_size=world.world_size,
            local_rank=world.local_rank,
            local_world_size=world.local_world_size,
            pid=os.getpid(),
            master=f"{world.master_address}:{world.master_port}",
            master_addresses=addresses,
            code=expect.code_hash(),
            config=expect.config_hash(self._config),
            device=guess_device(os.environ),
            visible_gpus=visible_gpus(os.environ),
            missing_inputs=_or_else(lambda: expect.missing_inputs(self._config), ["answer of the file system"]),
            run_dir=str(run_dir.absolute()),
            run_dir_file_system=file_system_of(run_dir),
            run_dir_free_gib=_or_else(lambda: shutil.disk_usage(existing).free / GIB, None) if existing else None,
            run_dir_problem=run_dir_problem,
            host=host_facts(os.environ, with_gpus=world.local_rank == 0),
        )

    def _result(self, instructions: Instructions, skew: float) -> RankResult:
        self._doing = "looking for the file of rank 0 in run.dir"
        nonce: Nonce = "missing"
        if instructions.nonce:
            nonce = _or_else(lambda: self._mailbox.look_for(instructions.nonce), nonce)
        probe = Probe()
        if instructions.probe_port is not None:
            self._doing = "in the first collectives"
            probe = run_probe(self._world, instructions.probe_port, instructions.probe_seconds)
        return RankResult(nonce=nonce, clock_skew=round(skew, 3), probe=probe)

    def _expected(self) -> Expected:
        self._doing = "looking at run.dir"
        config = self._config
        size = expect.checkpoint_bytes(config)
        return Expected(
            ranks_per_host=self._wish.ranks_per_host or self._world.local_world_size,
            checkpoint_gib=None if size is None else size[0] / GIB,
            checkpoint_source="" if size is None else size[1],
            # While one is written the one that it will replace is still there.
            checkpoints_to_come=config.checkpoint.keep + 1 - expect.checkpoints_kept(config),
            checkpoint_seconds=expect.checkpoint_seconds(config),
            seconds_left=expect.seconds_left(os.environ),
        )

    def _probe_port(self) -> int:
        one_host = self._world.local_world_size == self._world.world_size
        return free_port(resolve_address(self._world.master_address)[0] if one_host else "")

    def _host_of(self, rank: int, reports: Mapping[int, RankFacts]) -> str:
        """The host where a rank that never answered should be, as far as its neighbours or Slurm can tell."""
        each = self._world.local_world_size
        neighbours = [facts.host.node for other, facts in reports.items() if other // each == rank // each]
        if neighbours:
            return neighbours[0]
        nodes = nodes_of_step(os.environ)
        return nodes[rank // each] if len(nodes) * each == self._world.world_size else ""

    def _at(self, share: float) -> float:
        return self._began + share * self._wish.within

    def _give_up(self) -> None:
        sys.stderr.write(
            f"error: rank {self._world.rank} on {socket.gethostname()} was still {self._doing} after "
            f"{self._wish.within:.0f} s; a file server or a driver of that host hangs\n"
        )
        sys.stderr.flush()
        os._exit(PeerLostError.exit_code)


def nodes_of_step(environ: Mapping[str, str]) -> list[str]:
    """The hosts of this Slurm step in the order of its ranks; empty outside one."""
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not names:
        return []
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["scontrol", "show", "hostnames", names]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=5).stdout.split()
    return []


def _why_not_written(call: Callable[[], None]) -> str:
    """Why `call` could not write; empty when it could."""
    try:
        bounded(call, _FILE_SECONDS)
    except Overdue:
        return f"the file system of run.dir did not answer within {_FILE_SECONDS:.0f} s"
    except CannotWriteError as failure:
        return failure.fact
    return ""


def _or_else(call: Callable[[], _Result], otherwise: _Result) -> _Result:
    """What `call()` returns, or `otherwise` when the file system fails or does not answer."""
    try:
        return bounded(call, _FILE_SECONDS)
    except (OSError, Overdue):
        return otherwise
