"""Launchers under fire, with ranks that import no torch: the first failure is named, nobody is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.contract import VARIABLES, rank_environment
from tests.support.waiting import until
from trainer.world import World

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "ranks_launch.py"

LOCAL = """
import os, sys
from pathlib import Path
from launch.local import launch_local
command, ranks, run_dir, grace = [sys.executable, sys.argv[1], sys.argv[2]], int(sys.argv[3]), sys.argv[4], sys.argv[5]
sys.exit(launch_local(command, processes=ranks, environ=os.environ, run_dir=Path(run_dir),
                      grace_seconds=float(grace)).code)
"""
RAY = """
import os, sys
from pathlib import Path
from launch.ray import hosts
from launch.ray.run import run_ray
from tests.support.training import settings
from trainer.config.schema import Config
hosts.ANSWER_SECONDS = float(os.environ.get("ANSWER_SECONDS", hosts.ANSWER_SECONDS))
config = Config.model_validate(settings(Path(sys.argv[4]), Path("store")))
sys.exit(run_ray([sys.executable, sys.argv[1], sys.argv[2]], config, nodes=1, ranks_per_node=int(sys.argv[3]),
                 gpus_per_node=0, address=None))
"""


class Launcher:
    """A running launcher and what it has written so far."""

    def __init__(
        self, actions: dict[str, list[list[object]]], run_dir: Path, *, ranks: int = 2, code: str = LOCAL, **env: str
    ) -> None:
        self.output = run_dir.parent / f"{run_dir.name}.log"
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(FAKE), json.dumps(actions), str(ranks), str(run_dir), "1.0"],
                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | env,
            )  # fmt: skip

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, *words: str, seconds: float = 20) -> None:
        until(lambda: all(word in self.text() for word in words), f"{words} in {self.text()!r}", seconds)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        code = self.process.wait(seconds)
        return code, self.text()

    def ranks(self) -> list[int]:
        """Process ids of living processes that were started for this launcher, children of ranks included."""
        return living(f"STEADFAST_LAUNCHER_PID={self.process.pid}")


def living(variable: str) -> list[int]:
    """Process ids of the living processes that have this `NAME=text` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if variable.encode() in environ.split(b"\0") and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    launchers: list[Launcher] = []

    def start_one(actions: dict[str, list[list[object]]], **options: object) -> Launcher:
        launchers.append(Launcher(actions, tmp_path / f"run{len(launchers)}", **options))  # type: ignore[arg-type]
        return launchers[-1]

    yield start_one
    for launcher in launchers:
        launcher.process.kill()
        launcher.process.wait()
        for orphan in launcher.ranks():
            os.kill(orphan, signal.SIGKILL)


def test_ranks_that_end_well_make_a_run_that_ends_well(start: Callable[..., Launcher]) -> None:
    code, text = start({"*": [["print", "rank $RANK is here"]]}, ranks=3).end()
    assert code == 0
    assert sorted(text.splitlines()) == [f"[rank {rank}] rank {rank} is here" for rank in range(3)]


def test_the_failing_rank_is_named_and_the_others_are_stopped(start: Callable[..., Launcher]) -> None:
    launcher = start(
        {"0": [["sleep", 60]], "1": [["error", "error: rows.jsonl:7: bad"], ["error", "bye"], ["exit", 65]]}
    )
    code, text = launcher.end()
    assert code == 65
    last = text.splitlines()[-1]
    assert last.startswith("error: rank 1 of 2 failed with exit code 65 (bad data) at ")
    assert last.endswith(": rows.jsonl:7: bad")
    assert launcher.ranks() == []


def test_what_every_rank_says_alike_is_shown_once(start: Callable[..., Launcher]) -> None:
    same: list[list[object]] = [["error", "error: there is no store x"], ["exit", 66]]
    code, text = start({"*": same}, ranks=3).end()
    assert code == 66
    shown = text.splitlines()
    assert len(shown) == 2, text
    assert shown[0].endswith("] error: there is no store x")
    assert "failed with exit code 66 (input missing) at" in shown[1]


def test_a_start_clears_the_error_reports_of_the_one_before(start: Callable[..., Launcher], tmp_path: Path) -> None:
    old = tmp_path / "run0" / "errors" / "rank-1.txt"
    old.parent.mkdir(parents=True)
    old.write_text("Traceback of last week")
    code, text = start({"1": [["exit", 65]]}).end()
    assert code == 65
    assert not old.exists()
    assert "details in" not in text


def test_a_killed_rank_outranks_those_that_lost_it(start: Callable[..., Launcher]) -> None:
    lost: list[list[object]] = [["error", "error: lost the connection to a peer"], ["exit", 69]]
    code, text = start({"*": lost, "1": [["sleep", 0.7], ["kill", "SIGKILL"]]}, ranks=3).end()
    assert code == 69
    assert text.splitlines()[-1].startswith("error: rank 1 of 3 was killed by SIGKILL (pid ")


def test_a_single_process_speaks_for_itself(start: Callable[..., Launcher]) -> None:
    code, text = start({"0": [["error", "error: no such store"], ["exit", 66]]}, ranks=1).end()
    assert (code, text) == (66, "error: no such store\n")
    code, text = start({"0": [["kill", "SIGSEGV"]]}, ranks=1).end()
    assert code == 69
    assert "the training process was killed by SIGSEGV" in text


def test_a_rank_that_ignores_sigterm_is_killed_with_its_children(start: Callable[..., Launcher]) -> None:
    launcher = start(
        {"0": [["ignore", "SIGTERM"], ["child"], ["sleep", 60]], "1": [["sleep", 1.0], ["exit", 1]]}, ranks=2
    )
    began = time.monotonic()
    code, text = launcher.end(20)
    assert code == 70
    assert "rank 1 of 2 failed with exit code 1 at" in text.splitlines()[-1]
    assert time.monotonic() - began < 12
    assert "[rank 0] child " in text
    until(lambda: launcher.ranks() == [], "no process left", 5)


def test_a_killed_launcher_leaves_no_rank_behind(start: Callable[..., Launcher]) -> None:
    launcher = start({"*": [["ignore", "SIGTERM"], ["print", "here"], ["sleep", 60]]})
    launcher.wait_for("[rank 0] here", "[rank 1] here")
    assert len(launcher.ranks()) == 2
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: launcher.ranks() == [], "both ranks are gone", 5)


def test_a_killed_launcher_leaves_no_child_of_a_rank_behind(start: Callable[..., Launcher]) -> None:
    launcher = start({"0": [["child"], ["sleep", 60]], "1": [["child"], ["sleep", 1.0], ["exit", 0]]})
    launcher.wait_for("[rank 0] child ", "[rank 1] child ")
    assert len(launcher.ranks()) == 4
    until(lambda: len(launcher.ranks()) == 2, "rank 1 has ended and its child with it", 10)
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: launcher.ranks() == [], "rank 0 and its child are gone", 5)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_of_other_launchers_end_with_them_too(tmp_path: Path, launcher: str) -> None:
    plan = json.dumps({"*": [["ignore", "SIGTERM"], ["print", "rank $RANK is here"], ["sleep", 60]]})
    environ = {key: text for key, text in os.environ.items() if key not in VARIABLES}
    if launcher == "torchrun":
        parent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", FAKE, plan]
    else:
        # What the daemon of a Slurm step does: start the tasks and wait for them.
        parent = ["sh", "-c", '"$@" & RANK=1 LOCAL_RANK=1 "$@" & wait', "step", sys.executable, FAKE, plan]
        world = World(0, 2, 0, 2, "127.0.0.1", 29500)
        environ |= rank_environment(world) | {"SLURM_STEP_ID": "0"}
    environ["STEADFAST_TEST_MARK"] = mark = str(tmp_path)
    output = tmp_path / "log"
    with output.open("wb") as log:
        process = subprocess.Popen(parent, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environ)
    try:
        until(lambda: all(f"rank {rank} is here" in output.read_text() for rank in (0, 1)), "two ranks", 60)
        assert len(living(f"STEADFAST_TEST_MARK={mark}")) == 3
    finally:
        process.kill()
        process.wait()
    try:
        until(lambda: living(f"STEADFAST_TEST_MARK={mark}") == [], "no rank left", 5)
    finally:
        for orphan in living(f"STEADFAST_TEST_MARK={mark}"):
            os.kill(orphan, signal.SIGKILL)


def test_a_rank_whose_launcher_died_first_does_not_start(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = subprocess.run(
        [sys.executable, str(FAKE), "{}"], capture_output=True, text=True, check=False, timeout=20,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                          "MASTER_ADDR": "x", "MASTER_PORT": "1", "STEADFAST_LAUNCHER_PID": str(gone.pid)},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"the launcher (pid {gone.pid}) is gone" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_the_first_signal_asks_every_rank_for_a_checkpoint(
    start: Callable[..., Launcher], tmp_path: Path, number: signal.Signals
) -> None:
    marker = tmp_path / "run0" / "stopped.json"
    launcher = start({"*": [["stop", str(marker)]]})
    launcher.wait_for("[rank 0] ready", "[rank 1] ready")
    launcher.process.send_signal(number)
    code, text = launcher.end()
    assert code == 75
    assert f"{number.name}: asking all ranks for a checkpoint" in text
    assert "[rank 0] asked by SIGUSR2" in text
    assert "[rank 1] asked by SIGUSR2" in text
    assert "stopped on request with a committed checkpoint" in text.splitlines()[-1]


def test_a_request_during_start_up_is_not_lost_and_kills_nobody(start: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = start({"*": [["print", "importing"], ["stop", str(tmp_path / "run0/stopped.json")]]},
                     FAKE_RANK_SLOW_START="1.0")  # fmt: skip
    launcher.wait_for("[rank 0] importing", "[rank 1] importing")
    launcher.process.send_signal(signal.SIGTERM)
    code, text = launcher.end()
    assert code == 75, text
    assert "[rank 1] asked by SIGUSR2" in text


def test_a_second_ctrl_c_ends_everything_at_once(start: Callable[..., Launcher]) -> None:
    launcher = start({"*": [["ignore", "SIGTERM"], ["ignore", "SIGUSR2"], ["print", "here"], ["sleep", 60]]})
    launcher.wait_for("[rank 0] here", "[rank 1] here")
    launcher.process.send_signal(signal.SIGTERM)
    launcher.wait_for("asking all ranks")
    launcher.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert launcher.process.poll() is None
    began = time.monotonic()
    launcher.process.send_signal(signal.SIGINT)
    code, text = launcher.end(5)
    assert code == 130
    assert time.monotonic() - began < 3
    assert "interrupted: all ranks were killed" in text.splitlines()[-1]
    assert launcher.ranks() == []


def test_a_configuration_error_starts_no_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", "configs/tiny.yaml", "train.max_stepz=3", "data.packin=1",
         "--nproc", "2"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: 2 configuration problems" in done.stderr
    assert "[rank" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_rank_says_one_line_and_keeps_the_whole_traceback(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", "configs/tiny.yaml", f"run.dir={run_dir}",
         f"data.train={tmp_path / 'absent'}"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 66
    assert done.stderr.splitlines()[-1].startswith(f"error: there is no token store {tmp_path / 'absent'}")
    assert "Traceback" not in done.stderr
    assert "Traceback" in (run_dir / "errors" / "rank-0.txt").read_text()


@pytest.mark.timeout(180)
def test_ray_runs_the_same_ranks_and_forwards_a_stop(start: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = start({"*": [["stop", str(tmp_path / "run0/stopped.json")]]}, code=RAY)
    launcher.wait_for("[rank 0] ready", "[rank 1] ready", seconds=120)
    launcher.process.send_signal(signal.SIGTERM)
    code, text = launcher.end(60)
    assert code == 75, text
    assert "[rank 0] asked by SIGUSR2" in text
    assert "[rank 1] asked by SIGUSR2" in text


@pytest.mark.timeout(180)
def test_ray_starts_again_twice_from_the_same_checkpoint(start: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = start({"0": [["sleep", 600]], "1": [["error", "cannot go on"], ["kill", "SIGSEGV"]]}, code=RAY)
    code, text = launcher.end(150)
    assert code == 69, text
    assert text.count("attempt ") == 3
    named = [line for line in text.splitlines() if line.startswith(f"error: rank 1 of 2 on {socket.gethostname()} was")]
    assert len(named) == 3, text
    assert all("killed by SIGSEGV (pid " in line and ": cannot go on; " in line for line in named)
    assert text.splitlines()[-1] == "giving up: crashed 3 times at the beginning"
    events = [json.loads(line) for line in (tmp_path / "run0" / "events.jsonl").read_text().splitlines()]
    assert [event.get("decision", "") for event in events] == ["", "requeue", "", "requeue", "", "giveup"]


@pytest.mark.timeout(180)
def test_a_ray_host_that_is_stuck_is_replaced_and_its_ranks_end(start: Callable[..., Launcher], tmp_path: Path) -> None:
    launcher = start({"*": [["stop", str(tmp_path / "run0/stopped.json")]]}, code=RAY, ANSWER_SECONDS="4")
    launcher.wait_for("[rank 0] ready", "[rank 1] ready", seconds=120)
    first = fake_ranks(tmp_path)
    (host,) = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in first}
    os.kill(host, signal.SIGSTOP)
    launcher.wait_for("lost its host", "starting again: lost a rank; restart 1 of at most 2", "attempt 2: ", seconds=90)
    until(lambda: launcher.text().count("] ready") == 4, "the second attempt runs", 90)
    until(lambda: not first & fake_ranks(tmp_path), "the ranks of the first attempt are gone", 30)
    launcher.process.send_signal(signal.SIGTERM)
    code, text = launcher.end(60)
    assert code == 75, text


def fake_ranks(place: Path) -> set[int]:
    """Process ids of living fake ranks whose plan names `place`."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f'"{place}'.encode() in (entry / "cmdline").read_bytes():
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[1].endswith(FAKE.name.encode()):
                    found.add(int(entry.name))
    return found
