"""Drills on a real Slurm: the same run, preempted, killed and requeued, without a hand on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.cluster.runs import ROOT, STEPS, Run, Runs, environment_of, rank_processes
from tests.cluster.slurm import SlurmCluster
from tests.support.training import losses
from tests.support.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

Note = Callable[[str], None]


def finished(run: Run) -> dict[str, str]:
    """Wait for the end of the job; it must be a good one."""
    known = run.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=400)
    assert (known["JobState"], known["ExitCode"]) == ("COMPLETED", "0:0"), run.output()
    return known


def test_a_fresh_run(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("fresh")
    run.submit(SFT_PREFLIGHT="1")
    run.wait_for_step(20)
    note("2 nodes, ZeRO-2, with preflight; step 20 committed")
    finished(run)
    assert losses(run.path) == runs.expected()
    note("all steps; every loss equal to the local run")


def test_a_warning_saves_and_requeues(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("warned")
    job = run.submit()
    run.wait_for_step(40)
    slurm.run("scancel", "--batch", "--signal=USR2", job)
    began = time.monotonic()
    run.wait_for("PENDING")
    (stopped,) = run.events("stop")
    waited = time.monotonic() - began
    note(f"saved at step {stopped['step']}, back in the queue {waited:.1f} s after the warning")
    assert finished(run)["Restarts"] == "1"
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == runs.expected()
    note("resumed there; every loss equal")


def test_a_job_with_priority_takes_the_nodes(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("preempted")
    job = run.submit("--partition=low")
    run.wait_for_step(40)
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    began = time.monotonic()
    slurm.wait_for(urgent, ["RUNNING", "COMPLETED"], 60)
    note(f"the urgent job runs {time.monotonic() - began:.1f} s after it was submitted")
    assert slurm.job(job)["JobState"] in ("PENDING", "COMPLETING")
    (stopped,) = run.events("stop")
    finished(run)
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == runs.expected()
    note(f"saved at step {stopped['step']}, resumed there; every loss equal")


def test_a_preemption_without_a_warning_saves_too(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    """Where Slurm does not warn the batch step, it sends SIGTERM to every process of the step."""
    run = runs.new("terminated")
    job = run.submit()
    run.wait_for_step(40)
    slurm.run("scancel", "--signal=TERM", job)
    run.wait_for("PENDING", "FAILED")
    (stopped,) = run.events("stop")
    assert finished(run)["Restarts"] == "1"
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == runs.expected()
    note(f"saved at step {stopped['step']}, resumed there; every loss equal")


def test_what_is_too_slow_to_save_is_requeued_before_the_time_limit(
    slurm: SlurmCluster, runs: Runs, note: Note
) -> None:
    """A rank that stands still is one that saves too slowly: Slurm would end the job for good at its limit."""
    # Long enough that neither its peer nor the watchdog gives up waiting for it before the limit.
    run = runs.new("late", engine__timeout_seconds=600, engine__hang_seconds=500)
    job = run.submit("--time=3", "--signal=B:USR2@60")
    until(lambda: "step   1/" in run.output(), "the first step", 140)
    os.kill(rank_processes(run)[1], signal.SIGSTOP)
    run.wait_for("PENDING", "TIMEOUT", "FAILED", seconds=180)
    (end,) = run.events("end")
    assert (end["asked_by"], end["decision"]) == ("scheduler", "requeue"), run.output()
    assert "the time limit is near" in end["blamed"]
    slurm.run("scancel", job)
    note("killed half a minute before the limit, requeued")


def test_a_killed_rank_is_named_and_the_job_requeued(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("crashed")
    run.submit()
    run.wait_for_step(40)
    os.kill(rank_processes(run)[1], signal.SIGKILL)
    began = time.monotonic()
    run.wait_for("PENDING", "FAILED")
    note(f"back in the queue {time.monotonic() - began:.1f} s after the crash")
    (end,) = run.events("end")
    assert end["blamed"].startswith("rank 1 of 2 on node2 was killed by SIGKILL (pid ")
    assert end["why"].startswith("lost a rank; restart 1 of at most 2 from step")
    assert "error: rank 1 of 2 on node2 was killed by SIGKILL" in run.output()
    finished(run)
    assert [event["step"] for event in run.events("resume")] == [end["step"]]
    assert losses(run.path) == runs.expected()
    note(f"resumed at step {end['step']}; every loss equal")


@pytest.mark.parametrize("victim", ["node1", "node2"])
def test_power_off_of_a_node(slurm: SlurmCluster, runs: Runs, note: Note, victim: str) -> None:
    """node1 holds the batch step and rank 0, node2 only a rank."""
    run = runs.new(f"power-off-{victim}")
    job = run.submit()
    run.wait_for_step(40)
    slurm.node(victim).switch_off()
    began = time.monotonic()
    slurm.wait_for(job, ["PENDING"], 120)
    note(f"{victim}: back in the queue {time.monotonic() - began:.0f} s after the power went")
    slurm.restore(victim)
    began = time.monotonic()
    slurm.wait_for(job, ["RUNNING"], 120)
    note(f"{victim}: runs again {time.monotonic() - began:.0f} s after the node is back")
    assert finished(run)["Restarts"] == "1"
    (resumed,) = run.events("resume")
    assert resumed["step"] >= 40
    assert losses(run.path) == runs.expected()
    note(f"{victim}: resumed at step {resumed['step']}; every loss equal")


def test_a_lost_node_that_stays_away(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    """The waiting job is given fewer nodes; the global batch and so the losses stay."""
    run = runs.new("fewer-nodes")
    job = run.submit()
    run.wait_for_step(40)
    slurm.node("node2").switch_off()
    slurm.wait_for(job, ["PENDING"], 120)
    slurm.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
    finished(run)
    (resumed,) = run.events("resume")
    assert resumed["world_size"] == 1
    expected = runs.expected()
    found = losses(run.path)
    assert found[: resumed["step"]] == expected[: resumed["step"]]
    difference = float(np.abs(np.array(found) - np.array(expected)).max())
    assert len(found) == STEPS
    assert difference < 1e-4
    note(f"resumed at step {resumed['step']} on one node; losses within {difference:.0e}")


def test_three_crashes_at_one_place_are_enough(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("hopeless")
    job = run.submit()
    for restart in range(3):
        until(lambda: 1 in rank_processes(run), f"rank 1 lives:\n{run.output()}", 120)
        os.kill(rank_processes(run)[1], signal.SIGKILL)
        until(lambda: len(run.events("end")) > restart, f"attempt {restart} has ended:\n{run.output()}", 120)  # noqa: B023
    known = slurm.wait_for(job, ["FAILED"], 60)
    assert known["ExitCode"] == "69:0"
    assert known["Restarts"] == "2"
    assert "giving up: crashed 3 times at the beginning" in run.output()
    note("gave up after the second restart, exit code 69")


def test_a_finished_run_ends_at_once(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("finished", train__max_steps=20)
    job = run.submit()
    finished(run)
    before = losses(run.path)
    slurm.run("scontrol", "requeue", job)
    began = time.monotonic()
    run.wait_for("PENDING")
    finished(run)
    assert "nothing to do" in run.output()
    assert losses(run.path) == before
    assert len(run.events("launch")) == 1
    note(f"requeued by hand: exit code 0 after {time.monotonic() - began:.0f} s, no rank started")


def test_what_a_restart_cannot_help_is_not_restarted(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("refused")
    run.submit(script=(f"data.train={run.place}/absent",))
    known = run.wait_for("FAILED", "PENDING", "COMPLETED", seconds=120)
    known = run.wait_for("FAILED", "COMPLETED", seconds=120)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "66:0", "0"), run.output()
    assert "giving up: a restart does not help: input missing" in run.output()
    wrong = runs.new("wrong")
    wrong.submit(script=("train.max_stepz=1",))
    known = wrong.wait_for("FAILED", "COMPLETED", seconds=120)
    assert (known["ExitCode"], known["Restarts"]) == ("2:0", "0"), wrong.output()
    assert "did you mean" in wrong.output()
    note("no store: 66, wrong key: 2, neither requeued")


def test_gpus_are_asked_for_and_seen(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    """Devices that are none: enough to see that Slurm hands two of them to two ranks."""
    run = runs.new("gpus", train__max_steps=20)
    job = run.submit("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
    until(lambda: len(rank_processes(run)) == 2, f"two ranks:\n{run.output()}", 120)
    assert "gres:gpu:2" in slurm.run("scontrol", "--oneliner", "show", "job", job).stdout
    seen = [environment_of(pid) for _, pid in sorted(rank_processes(run).items())]
    assert [environ["CUDA_VISIBLE_DEVICES"] for environ in seen] == ["0,1", "0,1"]
    assert [environ["LOCAL_RANK"] for environ in seen] == ["0", "1"]
    assert [environ["LOCAL_WORLD_SIZE"] for environ in seen] == ["2", "2"]
    slurm.run("scancel", job)
    note("2 fake GPUs, 2 ranks on a node: CUDA_VISIBLE_DEVICES=0,1, LOCAL_RANK 0 and 1")


def test_launch_refuses_the_impossible_before_it_queues(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("impossible")

    def launch(*options: str) -> subprocess.CompletedProcess[str]:
        return slurm.run(sys.executable, str(ROOT / "steadfast.py"), "launch", "slurm", str(run.config), *options)

    before = slurm.run("squeue", "--noheader", "--states=all").stdout
    for options in (("--nodes", "3"), ("--gpus-per-node", "4"), ("--sbatch=--partition=nowhere",)):
        began = time.monotonic()
        done = launch(*options)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: Slurm refuses the request: ")
        assert not (run.path / "launched.json").exists()
    assert slurm.run("squeue", "--noheader", "--states=all").stdout == before
    took = time.monotonic() - began
    note(f"3 nodes of 2, 4 GPUs of 2, no such partition: exit code 2 each, the last after {took:.1f} s")


def test_launch_status_logs_and_a_graceful_stop(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("stopped")
    environ = {"SFT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def steadfast(*words: str) -> str:
        done = slurm.run(sys.executable, str(ROOT / "steadfast.py"), "launch", *words, environ=environ, cwd=run.place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = steadfast("slurm", str(run.config), "--nodes", "2", "--ranks-per-node", "1", "--sbatch=--time=30")
    run.job = text.split()[2].rstrip(";")
    run.wait_for_step(40)
    status = json.loads(steadfast("status", str(run.path), "--json"))
    assert status["reference"]["job"] == run.job
    assert "running node[1-2]" in status["state"]
    assert status["max_steps"] == STEPS
    assert status["committed"] >= 40
    assert f"job {run.job}, restart 0: 2 ranks on 2 nodes" in steadfast("logs", str(run.path), "--lines", "1000")
    steadfast("stop", str(run.path), "--graceful")
    known = run.wait_for("FAILED", "COMPLETED", "PENDING", seconds=120)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "75:0", "0")
    (stopped,) = run.events("stop")
    assert stopped["step"] > 40
    assert "stopped on request" in steadfast("status", str(run.path))
    note(f"graceful stop: saved at step {stopped['step']}, exit code 75, not requeued")
    # Another job, on one node only, goes on from there.
    run.submit("--nodes=1")
    finished(run)
    (resumed,) = run.events("resume")
    assert (resumed["step"], resumed["world_size"]) == (stopped["step"], 1)
    expected, found = runs.expected(), losses(run.path)
    assert found[: stopped["step"]] == expected[: stopped["step"]]
    difference = float(np.abs(np.array(found) - np.array(expected)).max())
    assert difference < 1e-4
    note(f"resumed on one node of two; losses within {difference:.0e}")


def test_a_cancelled_job_stays_cancelled(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    run = runs.new("cancelled")
    job = run.submit()
    run.wait_for_step(20)
    slurm.run("scancel", job)
    slurm.wait_for(job, ["CANCELLED"], 60)
    time.sleep(10)
    known = slurm.job(job)
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0")
    until(lambda: rank_processes(run) == {}, "no rank is left", 10)
    note("not requeued, no process left")


def test_a_job_array_is_a_sweep(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    """%a in an override is the index of the task."""
    run = runs.new("sweep", train__max_steps=20)
    run.submit("--nodes=1", "--array=1-2", script=(f"run.dir={run.place}/run-%a", "run.seed=%a"))
    until(
        lambda: all((run.place / f"run-{index}" / "outcome.json").exists() for index in (1, 2)),
        "both are done",
        300,
    )
    first, second = (losses(run.place / f"run-{index}") for index in (1, 2))
    assert len(first) == len(second) == 20
    assert first != second
    note("--array=1-2, run.seed=%a: two run directories, different losses")


def test_a_chain_of_jobs_goes_on_where_the_one_before_ended(slurm: SlurmCluster, runs: Runs, note: Note) -> None:
    """Jobs of one name, one after the other: for clusters that forbid requeueing, or limit the time of a job."""
    run = runs.new("chain")
    chain = ("--dependency=singleton", "--job-name=chain", "--no-requeue")
    first, second, third = (run.submit(*chain) for _ in range(3))
    run.job = first
    run.wait_for_step(40)
    assert slurm.job(second)["Reason"] == "Dependency"
    slurm.run("scancel", "--batch", "--signal=USR2", first)
    slurm.wait_for(first, ["FAILED"], 120)
    for job in (second, third):
        run.job = job
        finished(run)
    (stopped,) = run.events("stop")
    assert [event["step"] for event in run.events("resume")] == [stopped["step"]]
    assert losses(run.path) == runs.expected()
    assert run.output().count("nothing to do") == 1
    note(f"stopped at step {stopped['step']}, the second job went on, the third had nothing to do; every loss equal")
