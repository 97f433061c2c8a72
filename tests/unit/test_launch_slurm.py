"""Slurm without Slurm: plans, what srun's lines mean, and a stand-in for srun at the boundary of processes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import command, places
from launch.contract import VARIABLES, resolve, world_of_step
from launch.processes import Ended, Output
from launch.slurm import task
from launch.slurm.job import (
    Allocation,
    allocation,
    asked_by,
    for_array_task,
    gpus_of,
    python_of_ranks,
    srun_command,
    srun_environment,
)
from launch.slurm.srun import ENDED, STARTED, Remark, SrunRanks, Started, read_line
from launch.slurm.submit import SCRIPT, plan_slurm
from launch.slurm.task import plan_task
from launch.supervise import TIME_LIMIT, Ending, supervise
from tests.support.fake_srun import family
from trainer.cli import parse
from trainer.errors import UsageError
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
FAKE_RANK = ROOT / "tests" / "support" / "ranks_launch.py"
FAKE_SRUN = ROOT / "tests" / "support" / "fake_srun.py"
TINY = ROOT / "configs" / "tiny.yaml"
TASK = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "MASTER_ADDR": "node1", "MASTER_PORT": "20007", "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
}  # fmt: skip
JOB = {"SLURM_JOB_ID": "1000", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "8"}


def test_a_task_knows_its_place() -> None:
    world = world_of_step(TASK)
    assert world is not None
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 7, 1, 2)
    assert (world.master_address, world.master_port) == ("node1", 20007)
    last = world_of_step(TASK | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert last is not None
    assert last.local_world_size == 1


def test_outside_of_a_task_no_rank_is_started() -> None:
    with pytest.raises(UsageError, match=r"sbatch slurm/sft\.sh"):
        plan_task(["train"], {"MASTER_ADDR": "node1", "MASTER_PORT": "1"}, cores=1, directory="/")


def test_a_rank_gets_six_variables_and_a_compiler_cache_of_its_node() -> None:
    half_set = {"RANK": "0", "WORLD_SIZE": "99"}
    plan = plan_task(["train"], TASK | half_set | {"NCCL_DEBUG": "INFO"}, cores=8, directory="/d")
    world = resolve(plan.environment)
    assert world == world_of_step(TASK)
    assert set(VARIABLES) <= plan.environment.keys()
    assert plan.environment["NCCL_DEBUG"] == "INFO"
    assert plan.environment["OMP_NUM_THREADS"] == "4"
    assert not plan.environment["TORCH_EXTENSIONS_DIR"].startswith(str(Path.home()))
    bound = plan_task(["train"], TASK | {"SLURM_CPUS_PER_TASK": "6"}, cores=6, directory="/d")
    assert bound.environment["OMP_NUM_THREADS"] == "6"
    told = plan_task(["train"], TASK | {"OMP_NUM_THREADS": "3", "TORCH_EXTENSIONS_DIR": "/x"}, cores=8, directory="/d")
    assert (told.environment["OMP_NUM_THREADS"], told.environment["TORCH_EXTENSIONS_DIR"]) == ("3", "/x")


def test_an_allocation_is_read_from_the_batch_step() -> None:
    assert allocation(JOB) == Allocation("1000", 0, 2, 8, 8)
    assert allocation(JOB).world_size == 16
    assert allocation(JOB | {"SLURM_RESTART_COUNT": "2", "SLURM_ARRAY_TASK_ID": "7"}).restart == 2
    cpu = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}
    assert allocation(cpu) == Allocation("1", 0, 1, 1, 0)
    assert allocation(cpu | {"SLURM_GPUS_ON_NODE": "4"}).ranks_per_node == 4
    with pytest.raises(UsageError, match="SLURM_JOB_ID"):
        allocation({})
    assert [gpus_of(text) for text in ("8", "a100:8", "a100:4,h100:2", "gpu:a100:2", "0")] == [8, 8, 6, 2, 0]


def test_a_restart_takes_another_port() -> None:
    """A requeued job may meet its own old ranks, or connections that the system has not closed yet."""
    ports = {Allocation(str(job), restart, 1, 1, 0).port for job in (1, 999_999) for restart in range(50)}
    assert len(ports) == 100
    assert min(ports) >= 20_000
    assert max(ports) < 32_000, "systems hand out ports from 32768 on by themselves"


def test_srun_leaves_it_to_us_to_end_ranks_and_the_site_has_the_last_word() -> None:
    words = srun_command(allocation(JOB), {"SFT_SRUN_ARGS": "--container-image='a b' --label=1"}, ["python", "x"])
    assert words[:4] == ["srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]
    assert {"--kill-on-bad-exit=0", "--wait=0", "--label"} <= set(words)
    assert words[-4:] == ["--container-image=a b", "--label=1", "python", "x"]
    assert not any("gpus-per-task" in word for word in words), "a task would see one GPU and be told it is the second"
    environ = srun_environment({"SLURM_CPUS_PER_TASK": "4", "HOME": "/h"}, "node1", 20007)
    assert environ == {
        "SLURM_CPUS_PER_TASK": "4", "SRUN_CPUS_PER_TASK": "4", "HOME": "/h", "MASTER_ADDR": "node1",
        "MASTER_PORT": "20007",
    }  # fmt: skip
    assert python_of_ranks({}) == [sys.executable]
    assert python_of_ranks({"SFT_PYTHON": "apptainer exec --nv i.sif python"})[0] == "apptainer"


def test_an_array_task_puts_its_index_where_it_is_asked_to() -> None:
    assert for_array_task(["run.dir=r-%a", "run.seed=%a"], "7") == ["run.dir=r-7", "run.seed=7"]
    assert for_array_task(["run.dir=r-%a"], "") == ["run.dir=r-%a"]


def test_who_asked_for_a_stop() -> None:
    assert asked_by(Ending(75, "SIGUSR2"), True) == "scheduler"
    assert asked_by(Ending(69, TIME_LIMIT), False) == "scheduler"
    assert asked_by(Ending(75, "SIGTERM"), True) == "person"
    assert asked_by(Ending(69), False) == "nobody"
    # Slurm has signalled the tasks alone.
    assert asked_by(Ending(75), True) == "scheduler"
    # Slurm ends a job that has lost a host, and requeues it by itself.
    assert asked_by(Ending(69, "SIGTERM"), False, ["node2"]) == "scheduler"


def test_lines_of_srun() -> None:
    assert read_line("3: hello: world", "stdout") == [Output(3, "stdout", "hello: world")]
    assert read_line(" 3: ", "stdout") == [Output(3, "stdout", "")]
    assert read_line("srun: error: Node failure on node2", "stderr") == [Remark("srun: error: Node failure on node2")]
    started = f'12: {STARTED}{{"host": "n", "step": "7.0"}}'
    assert read_line(started, "stderr") == [Started(12, "n", "7.0")]
    ended = f'0: {ENDED}{{"pid": 7, "status": -9, "when": 1.5, "host": "n"}}'
    assert read_line(ended, "stderr") == [Ended(0, 7, -9, 1.5, host="n")]
    # Half a line of the rank, then the task's own.
    torn = f'0: Fatal{ENDED}{{"pid": 7, "status": 1, "when": 1.5, "host": "n"}}'
    assert read_line(torn, "stderr") == [Output(0, "stderr", "Fatal"), Ended(0, 7, 1, 1.5, host="n")]
    # A rank that prints such words is still only printing.
    assert read_line(f"0: {ENDED}soon", "stderr") == [Output(0, "stderr", f"{ENDED}soon")]
    assert read_line(f"0: {ENDED}{{}}", "stdout") == [Output(0, "stdout", f"{ENDED}{{}}")]


def test_the_plan_of_a_submission_is_the_command_and_the_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_slurm(
        Path("c.yaml"), ["run.seed=1"], run_dir=Path("runs/mine"), nodes=2, ranks_per_node=8, gpus_per_node=8,
        sbatch_options=["--partition=gpu"],
    )  # fmt: skip
    assert plan.command == [
        "sbatch", "--job-name=mine", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu",
        str(SCRIPT), "c.yaml", "run.seed=1",
    ]  # fmt: skip
    assert plan.srun[:3] == ["srun", "--nodes=2", "--ntasks=16"]
    assert plan.srun[-3:] == ["slurm-task", "c.yaml", "run.seed=1"]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    words = ["slurm", str(TINY), "--nodes", "2", "--ranks-per-node", "1", "--dry-run", "--sbatch=--time=60 -p gpu"]
    arguments = parse(parser, words)
    arguments.traceback = False
    assert command.run(arguments) == 0
    text = capsys.readouterr().out
    assert "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --time=60 -p gpu" in text
    assert 'exec "$python" "$root/steadfast.py" launch slurm-job "$@"' in text


def test_the_script_names_no_site_and_is_valid_shell() -> None:
    text = SCRIPT.read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR2@300"} <= set(options)
    for word in ("partition", "account", "qos", "constraint", "exclusive", "mem"):
        assert not any(option.startswith(f"--{word}") for option in options), word
    assert "$USER" not in text, "it is unset for root and in containers, and set -u ends the script"
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize(
    ("environ", "fragment"),
    [({}, "submit from the checkout, or set SFT_ROOT"), ({"SFT_ROOT": str(ROOT), "SFT_PYTHON": "/no/python"}, "/no/")],
)
def test_the_script_says_what_it_misses(environ: dict[str, str], fragment: str, tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH",)}
    done = subprocess.run(
        ["bash", str(SCRIPT), "c.yaml"], env=kept | {"SLURM_SUBMIT_DIR": str(tmp_path)} | environ,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 66
    assert fragment in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_script_becomes_the_job_with_everything_of_the_site(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "slurm").mkdir(parents=True)
    (root / "slurm" / "site.env").write_text('SFT_SRUN_ARGS="--mem=0"\n')
    (root / "steadfast.py").write_text(
        "import os, signal, sys\n"
        "print(sys.argv[1:], os.environ['SFT_SRUN_ARGS'], signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN)\n"
    )
    done = subprocess.run(
        ["bash", str(SCRIPT), "c.yaml", "a.b=[1, 2]"], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(root), "SFT_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.stdout.strip() == "['launch', 'slurm-job', 'c.yaml', 'a.b=[1, 2]'] --mem=0 True", done.stderr


class StandIn:
    """A job whose srun is tests/support/fake_srun.py and whose ranks import no torch."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = tmp_path / "run"
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "srun").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_SRUN}" "$@"\n')
        # What scancel kills is written down by the stand-in of srun.
        (tools / "scancel").write_text(f'#!/bin/sh\ntouch "{tmp_path}/killed"; xargs kill -9 < "{tmp_path}/tasks"\n')
        self.killed = tmp_path / "killed"
        for tool in tools.iterdir():
            tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        self.environ = os.environ | {
            "MASTER_ADDR": "localhost", "MASTER_PORT": "20000", "FAKE_SRUN_TASKS": str(tmp_path / "tasks"),
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
        }  # fmt: skip

    def supervise(self, actions: dict[str, list[list[object]]], ranks: int = 2, **options: float) -> Ending:
        code = "import sys; sys.path.insert(0, sys.argv[1]); from launch.slurm.task import run_task; " \
               "sys.exit(run_task(sys.argv[2:]))"  # fmt: skip
        words = [sys.executable, "-c", code, str(ROOT), sys.executable, str(FAKE_RANK), json.dumps(actions)]
        srun = SrunRanks(srun_command(Allocation("7", 0, 1, ranks, 0), {}, words), self.environ, world_size=ranks)
        return supervise(srun, world_size=ranks, run_dir=self.run, grace_seconds=2.0, **options)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_ranks_under_srun_that_end_well(job: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.supervise({"*": [["print", "rank $RANK is here"]]}) == Ending(0)
    out = capsys.readouterr().out
    assert sorted(out.splitlines()) == ["[rank 0] rank 0 is here", "[rank 1] rank 1 is here"]


def test_the_first_of_many_deaths_is_named_with_signal_host_and_last_words(job: StandIn) -> None:
    """srun would report the highest code, 143 or 137, and nobody's name."""
    lost: list[list[object]] = [["error", "error: lost the connection to a peer"], ["exit", 69]]
    ending = job.supervise({"*": lost, "1": [["sleep", 0.5], ["error", "last words"], ["kill", "SIGSEGV"]]}, ranks=3)
    assert ending.code == 69
    assert ending.blamed.startswith("rank 1 of 3 on ")
    assert "was killed by SIGSEGV (pid " in ending.blamed
    assert ": last words;" in ending.blamed


def test_a_refusal_keeps_its_code_although_peers_die_with_higher_ones(job: StandIn) -> None:
    ending = job.supervise({"0": [["sleep", 60]], "1": [["error", "error: rows.jsonl:7: bad"], ["exit", 65]]})
    assert ending.code == 65
    assert ending.blamed.endswith("rows.jsonl:7: bad")


def test_peers_of_a_dead_rank_end_although_they_ignore_sigterm(job: StandIn) -> None:
    ending = job.supervise({"0": [["sleep", 60]], "1": [["sleep", 1.0], ["exit", 65]]}, ranks=2)
    assert ending.code == 65
    assert not job.killed.exists()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_reaches_every_rank_even_while_it_starts(job: StandIn, number: signal.Signals) -> None:
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), number))
    timer.start()
    ending = job.supervise({"*": [["stop", str(job.run / "stopped.json")]]})
    timer.join()
    assert ending == Ending(75, number.name)


def test_sigterm_to_the_tasks_alone_is_a_wish_and_kills_nobody(job: StandIn) -> None:
    """So Slurm preempts a job in a partition that sends no warning: SIGTERM to the tasks and the ranks."""

    def preempt() -> None:
        until = time.monotonic() + 20
        while not (job.run.parent / "tasks").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.5)
        for pid_of_task in (job.run.parent / "tasks").read_text().split():
            for pid in family(int(pid_of_task)):
                os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=preempt)
    thread.start()
    ending = job.supervise({"*": [["stop", str(job.run / "stopped.json")]]})
    thread.join()
    assert ending == Ending(75)


def test_ranks_that_hear_nothing_are_killed_at_the_deadline(job: StandIn) -> None:
    began = time.monotonic()
    ending = job.supervise({"*": [["ignore", "SIGTERM"], ["sleep", 600]]}, deadline=time.time() + 3)
    assert (ending.code, ending.asked) == (69, TIME_LIMIT)
    assert time.monotonic() - began < 60


def test_ranks_that_were_never_started_are_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: StandIn
) -> None:
    srun = SrunRanks(["sh", "-c", "echo 'srun: error: Unable to create step' >&2; exit 1"], os.environ, world_size=2)
    ending = supervise(srun, world_size=2, run_dir=job.run, settle_seconds=0.1)
    assert ending.code == 69
    assert ending.blamed.startswith("rank 0 of 2 could not be started: srun: error: Unable to create step")


def test_a_lost_host_is_blamed_before_the_ranks_that_were_ended_with_it(job: StandIn) -> None:
    lines = [
        f'0: {STARTED}{{"host": "node1", "step": "7.0"}}',
        f'1: {STARTED}{{"host": "node2", "step": "7.0"}}',
        f'0: {ENDED}{{"pid": 7, "status": -15, "when": 1.5, "host": "node1"}}',
        "srun: error: Node failure on node2",
        "srun: error: node1: task 0: Killed",
    ]
    script = "".join(f"echo '{line}' >&2; " for line in lines)
    srun = SrunRanks(["sh", "-c", script], os.environ, world_size=2)
    ending = supervise(srun, world_size=2, run_dir=job.run, settle_seconds=0.1)
    assert ending.blamed.startswith("rank 1 of 2 lost its host node2")


def test_status_without_a_launch_says_so(tmp_path: Path) -> None:
    from trainer.errors import MissingInputError

    with pytest.raises(MissingInputError, match="does not say where it was launched"):
        places.reference_of(RunDirectory(tmp_path))


def test_a_local_run_has_a_status_and_is_not_mistaken_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    run.launched.write_text(json.dumps({"place": "local", "host": os.uname().nodename, "pid": gone.pid}))
    run.events.write_text(
        '{"event": "end", "time": "2026-01-01T00:00:00.000+00:00", "job": "x", "step": 5, "exit_code": 69,'
        ' "saved": false, "asked_by": "nobody", "blamed": "rank 1 of 2 was killed", "decision": "requeue",'
        ' "why": "lost a rank"}\n'
    )
    arguments = argparse.Namespace(place="status", run=tmp_path, json=False)
    assert command.run(arguments) == 0
    text = capsys.readouterr().out
    assert "ended" in text.splitlines()[0]
    assert "with exit code 69; rank 1 of 2 was killed; requeue: lost a rank" in text
    assert task.DEFAULTS["NCCL_DEBUG"] == "WARN"
