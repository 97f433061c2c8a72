"""Ranks that cannot meet: a name nobody knows, a port that is taken, a rank 0 that is not there. One line, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.contract import VARIABLES, rank_environment
from launch.rendezvous import listener_of, meet, open_port, reach, resolve_address
from trainer.errors import PeerLostError
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]
FIRST = World(rank=0, world_size=2, local_rank=0, local_world_size=2, master_address="127.0.0.1", master_port=0)


@pytest.fixture
def taken() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return port_of(server)


def a_rank(world: World, run_dir: Path, **more: str) -> tuple[int, list[str], float]:
    """Be one rank by hand; returns exit code, lines of stderr and seconds."""
    environ = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", "configs/tiny.yaml", f"run.dir={run_dir}",
         "engine.timeout_seconds=4"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60, env=environ | rank_environment(world) | more,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines(), time.monotonic() - began


def test_a_master_that_nobody_knows_ends_in_one_line(tmp_path: Path) -> None:
    code, lines, seconds = a_rank(replace(FIRST, rank=1, local_rank=1, master_address="nope.invalid", master_port=1),
                                  tmp_path / "run")  # fmt: skip
    assert code == 69
    (line,) = lines
    assert f"error: {socket.gethostname()} cannot resolve the host of rank 0, MASTER_ADDR=nope.invalid: " in line
    assert seconds < 30


def test_a_master_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    port = free_port()
    code, lines, seconds = a_rank(replace(FIRST, rank=1, local_rank=1, master_port=port), tmp_path / "run")
    assert code == 69
    (line,) = lines
    assert f"cannot reach rank 0 at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} (Connection refused, 4 s); " in line
    assert "a loopback address means this host" in line
    assert seconds < 30


def test_a_port_that_is_taken_names_its_holder(tmp_path: Path, taken: socket.socket) -> None:
    code, lines, seconds = a_rank(replace(FIRST, master_port=port_of(taken)), tmp_path / "run")
    assert code == 69
    (line,) = lines
    assert f"port {port_of(taken)} of {socket.gethostname()} (MASTER_PORT) is in use by pid {os.getpid()} (" in line
    assert line.endswith("; end it, or start again")
    assert seconds < 30


def test_a_listener_that_never_answers_is_no_reason_to_wait(taken: socket.socket) -> None:
    # What is connected but not accepted fills the queue: from then on attempts go unanswered, as from a dead host.
    taken.listen(0)
    held = []
    for _ in range(8):
        stranger = socket.socket()
        stranger.settimeout(0.2)
        held.append(stranger)
        try:
            stranger.connect(taken.getsockname())
        except TimeoutError:
            break
    else:
        pytest.skip("this kernel queues connections without a limit")
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"cannot reach rank 0 .* \(no answer, 2 s\)"):
        reach("127.0.0.1", port_of(taken), within=2.0)
    assert time.monotonic() - began < 20
    for stranger in held:
        stranger.close()


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=r"cannot resolve .*MASTER_ADDR=slow: no answer in 1 s"):
        resolve_address("slow", within=1.0)
    assert time.monotonic() - began < 20


def test_rank_0_listens_where_the_others_look_for_it() -> None:
    first = replace(FIRST, master_port=free_port())
    with open_port(first) as listener:
        assert listener.getsockname() == ("127.0.0.1", first.master_port), "ranks of one host are not offered to others"
        assert meet(replace(first, rank=1, local_rank=1), {}, within=5) is None
        assert listener_of(first.master_port).startswith(f"pid {os.getpid()} (")
    # As soon as it has closed, the port is free for torch.
    several = replace(FIRST, local_world_size=1, master_port=first.master_port)
    with open_port(several), reach("127.0.0.1", first.master_port, 5):
        pass


def test_rank_0_on_another_host_than_master_addr_is_told_so() -> None:
    for several in (False, True):
        elsewhere = replace(FIRST, master_address="192.0.2.7", local_world_size=1 if several else 2, master_port=29511)
        with pytest.raises(PeerLostError, match=rf"MASTER_ADDR=192.0.2.7 is .*no address of {socket.gethostname()}"):
            open_port(elsewhere)


def test_ranks_of_srun_without_the_contract_are_refused(tmp_path: Path) -> None:
    environ = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    environ |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60, env=environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: srun started 2 tasks, but none of RANK, WORLD_SIZE")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
