"""Drills on a real Ray cluster of three nodes: jobs, a killed rank, lost nodes, stops, and no token."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import why_not
from tests.cluster.ray import PORT, RayCluster
from tests.cluster.ray_runs import STEADFAST, RayRun
from tests.cluster.runs import STEPS, Runs, rank_processes
from tests.support.training import losses
from tests.support.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SUCCEEDED = "succeeded, exit code 0"


@pytest.fixture(scope="module")
def warm() -> Iterator[RayCluster]:
    """The cluster, made once for all drills."""
    if reason := why_not():
        pytest.skip(reason)
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(warm: RayCluster) -> Iterator[RayCluster]:
    """The cluster with all its nodes on."""
    yield warm
    warm.recover()


@pytest.fixture(scope="module")
def expected(store, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The loss of every step of the uninterrupted run, with two local ranks."""
    return Runs(None, store.path, tmp_path_factory.mktemp("expected")).expected()


@pytest.fixture
def run(cluster: RayCluster, store, tmp_path_factory: pytest.TempPathFactory, request) -> RayRun:
    """A run of its own for the drill."""
    name = request.node.name.removeprefix("test_").replace("_", "-")
    return RayRun(cluster, tmp_path_factory.mktemp("ray") / name, store.path)


def test_a_submitted_job(run: RayRun, expected: list[float], note: Callable[[str], None]) -> None:
    began = time.monotonic()
    run.submit()
    run.wait_for_step(20)
    note(f"step 20 committed {time.monotonic() - began:.0f} s after the submission")
    status = run.wait_for(SUCCEEDED)
    assert status["outcome"] == "done"
    assert len(set(run.hosts())) == 2
    assert f"attempt 1: 2 ranks on {', '.join(run.hosts())}" in run.output()
    assert len(re.findall(r"preflight: fit to train: 2 host\(s\), 2 rank\(s\)", run.output())) == 1
    assert losses(run.path) == expected
    note("losses equal")


def test_a_job_by_hand_whose_rank_is_killed(run: RayRun, expected: list[float], note: Callable[[str], None]) -> None:
    job = run.submit_by_hand()
    run.wait_for_step(40)
    assert run.status()["reference"]["job"] == job, "the driver itself says where it runs"
    host = run.hosts()[1]
    os.kill(rank_processes(run)[1], signal.SIGKILL)
    status = run.wait_for(SUCCEEDED)
    first, second = status["attempts"]
    assert first["blamed"].startswith(f"rank 1 of 2 on {host} was killed by SIGKILL (pid "), first
    assert (first["exit_code"], first["decision"], second["decision"]) == (69, "requeue", "done")
    assert [event["step"] for event in run.events("resume")] == [first["step"]]
    assert losses(run.path) == expected
    note(f"named: {first['blamed'].split(';')[0]}; losses equal")
    run.submit()
    run.wait_for(SUCCEEDED)
    assert "nothing to do" in run.output()
    assert len(run.events("launch")) == 2


def test_hosts_that_share_no_run_directory_get_no_rank(run: RayRun, note: Callable[[str], None]) -> None:
    run.path.mkdir()
    for node in run.cluster.nodes[1:]:
        assert node.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(run.path)]).returncode == 0
    try:
        run.submit()
        status = run.wait_for("failed, exit code 73")
        assert "it is another directory than that of rank 0; put run.dir on a file system" in run.output()
        assert [attempt["decision"] for attempt in status["attempts"]] == ["giveup"]
        assert not run.events("start")
    finally:
        for node in run.cluster.nodes[1:]:
            node.run(["umount", str(run.path)])
    note("preflight names run.dir; exit code 73, no rank started")


def test_a_lost_node_with_one_to_spare(run: RayRun, expected: list[float], note: Callable[[str], None]) -> None:
    run.submit()
    run.wait_for_step(40)
    lost = next(name for name in run.hosts() if name != run.cluster.head.name)
    seconds = lose(run, lost)
    status = run.wait_for(SUCCEEDED)
    first, second = status["attempts"]
    assert f"lost its host {lost} (" in first["blamed"], first
    assert (first["exit_code"], first["decision"], second["decision"]) == (69, "requeue", "done")
    assert lost not in run.hosts()
    assert len(run.hosts()) == 2
    assert losses(run.path) == expected
    note(f"node power-off; next attempt after {seconds:.0f} s, on the spare node; losses equal")


def test_lost_nodes_down_to_one(run: RayRun, expected: list[float], note: Callable[[str], None]) -> None:
    spare = next(node for node in run.cluster.nodes[1:])
    spare.switch_off()
    run.cluster.wait_for_nodes(2)
    run.submit()
    run.wait_for_step(40)
    lost = next(name for name in run.hosts() if name != run.cluster.head.name)
    seconds = lose(run, lost)
    run.wait_for(SUCCEEDED)
    assert run.hosts() == [run.cluster.head.name]
    starts = run.events("start", "resume")
    assert [start["world_size"] for start in starts] == [2, 1], starts
    found = losses(run.path)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    note(f"next attempt after {seconds:.0f} s, 1 rank, same global batch; losses within {worst:.0e}")


def test_a_graceful_stop_and_another_submission(
    run: RayRun, expected: list[float], note: Callable[[str], None]
) -> None:
    # One regular save: the other is that of the stop, whichever step it comes at.
    run.config.write_text(run.config.read_text().replace("every_steps: 20", "every_steps: 110"))
    run.submit()
    run.wait_for_step(110)
    began = time.monotonic()
    done = run.steadfast("stop", str(run.path), "--graceful")
    assert done.returncode == 0, done.stderr
    status = run.wait_for("failed, exit code 75")
    note(f"ended {time.monotonic() - began:.0f} s after launch stop --graceful, exit code 75")
    (stopped,) = run.events("stop")
    assert (run.path / "stopped.json").is_file()
    assert status["committed"] == stopped["step"]
    assert [event["step"] for event in run.events("commit")] == [110, stopped["step"]]
    again = run.steadfast("stop", str(run.path), "--graceful")
    assert (again.returncode, "no run to stop" in again.stderr) == (66, True), again.stderr
    run.submit()
    run.wait_for(SUCCEEDED)
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == expected
    note("submitted again: resumed there, losses equal")


def test_a_driver_in_a_terminal_is_stopped_from_another(run: RayRun, note: Callable[[str], None]) -> None:
    address = f"{run.cluster.head.address}:{PORT}"
    words = [*STEADFAST, "launch", "ray", str(run.config), "--nodes", "2", "--address", address]
    with (run.config.parent / "terminal").open("wb") as terminal:
        driver = run.cluster.head.popen(words, run.cluster.environ(), stdout=terminal, stderr=terminal)
    try:
        run.wait_for_step(20)
        assert "started by hand" in run.status()["state"]
        began = time.monotonic()
        done = run.steadfast("stop", str(run.path), "--graceful")
        assert done.returncode == 0, done.stderr
        assert driver.wait(120) == 75
        note(f"ended {time.monotonic() - began:.0f} s after launch stop --graceful, exit code 75")
    finally:
        driver.kill()
        driver.wait()
    assert run.status()["committed"] == run.events("stop")[0]["step"]


def test_a_stop_and_a_killed_driver_leave_no_rank(run: RayRun, note: Callable[[str], None]) -> None:
    run.submit()
    run.wait_for_step(20)
    began = time.monotonic()
    assert len(rank_processes(run)) == 2
    done = run.steadfast("stop", str(run.path))
    assert done.returncode == 0, done.stderr
    run.wait_for("stopped", "stopped, exit code 75")
    until(lambda: not rank_processes(run), "no rank is left after a stop", 10)
    note(f"no rank {time.monotonic() - began:.0f} s after launch stop")
    run.submit()
    until(lambda: len(rank_processes(run)) == 2, "two ranks", 120)
    (driver,) = processes_with("launch", "ray", str(run.config), "--nodes")
    began = time.monotonic()
    os.kill(driver, signal.SIGKILL)
    until(lambda: not rank_processes(run), "no rank is left after the driver", 30)
    note(f"no rank {time.monotonic() - began:.0f} s after SIGKILL of the driver")


def test_no_token_and_a_wrong_one(run: RayRun, note: Callable[[str], None]) -> None:
    api = run.cluster.api
    submit = ("ray", str(run.config), "--nodes", "2", "--address", api)
    for method in ("GET", "POST"):
        asked = run.cluster.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, f"{api}/api/jobs/")
        assert asked.stdout == "401"
    none = run.steadfast(*submit, token=False)
    assert none.returncode == 2
    (line,) = none.stderr.splitlines()
    assert line.startswith(f"error: the Ray cluster at {api} asks for a token, and there is none; ")
    wrong = run.steadfast(*submit, environ={"RAY_AUTH_TOKEN": "wrong" * 8})
    assert wrong.returncode == 2
    (line,) = wrong.stderr.splitlines()
    assert line.startswith(f"error: the Ray cluster at {api} refuses our token; ")
    assert not run.path.exists()
    note("one line and exit code 2, nothing submitted")


def test_an_open_cluster_is_refused(run: RayRun, note: Callable[[str], None]) -> None:
    node = run.cluster.nodes[1]
    # It leaves the cluster that it was part of.
    node.switch_off()
    node.switch_on()
    try:
        address, api = run.cluster.start_open_cluster(node)
        submit = (*STEADFAST, "launch", "ray", str(run.config), "--address")
        for place in (api, address):
            done = run.cluster.run(*submit, place, on=node, timeout=120)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith(f"error: the Ray cluster at {place} asks for no token: ")
            assert "--allow-unauthenticated" in done.stderr
        assert not run.path.exists()
        note("through the job API and from within: refused with exit code 2")
        allowed = (*submit, address, "--allow-unauthenticated", "train.max_steps=2")
        done = run.cluster.run(*allowed, on=node, token=False, timeout=300)
        assert done.returncode == 0, done.stderr
    finally:
        # For the cluster it starts afresh.
        node.switch_off()


def lose(run: RayRun, name: str) -> float:
    """Pull the plug of a node; returns after how many seconds the next attempt began."""
    began, attempts = time.monotonic(), len(run.events("launch"))
    next(node for node in run.cluster.nodes if node.name == name).switch_off()
    until(lambda: len(run.events("launch")) > attempts, f"an attempt without {name}", 180)
    return time.monotonic() - began


def processes_with(*words: str) -> list[int]:
    """Living processes of Python whose command line has these words, in this order and side by side."""
    wanted = b"\0".join(word.encode() for word in words)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if wanted in line and line.split(b"\0")[0].endswith(b"python"):
                found.append(int(entry.name))
    return found
