"""The contract of a rank, the names of faults, the plan of processes, who is blamed: all without a process."""

from __future__ import annotations

import argparse
import errno
import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from launch import command, rendezvous, train_command
from launch.contract import LAUNCHER_PID, VARIABLES, rank_environment, resolve
from launch.faults import name_of_fault
from launch.processes import Ended, Output, plan_ranks
from launch.rendezvous import resolve_address
from launch.supervise import MEANINGS, Ending, Screen, blame, describe, exit_code
from launch.train_command import rank_command, require_gpus
from trainer import errors
from trainer.checkout import ROOT
from trainer.cli import parse, run_command
from trainer.config import device as config_device
from trainer.config.device import guess_device, visible_gpus
from trainer.errors import CannotWriteError, ConfigError, DataError, PeerLostError, SteadfastError, UsageError
from trainer.run_directory import RunDirectory
from trainer.world import World, opens_store

WORLD = World(rank=3, world_size=8, local_rank=1, local_world_size=2, master_address="node7", master_port=2345)


def test_a_world_survives_the_environment() -> None:
    environment = rank_environment(WORLD)
    assert set(environment) == set(VARIABLES)
    assert resolve({"PATH": "/bin"} | environment) == WORLD
    assert not WORLD.is_first
    assert resolve({"PATH": "/bin"}) is None
    assert resolve(dict.fromkeys(VARIABLES, "")) is None


@pytest.mark.parametrize("missing", VARIABLES)
def test_half_an_environment_names_what_is_missing(missing: str) -> None:
    environment = rank_environment(WORLD)
    del environment[missing]
    with pytest.raises(UsageError, match=f"not {missing}"):
        resolve(environment)


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("RANK", "8", "RANK=8 is not below WORLD_SIZE=8"),
        ("RANK", "-1", "RANK='-1'"),
        ("RANK", "1.0", "RANK='1.0'"),
        ("RANK", "²", "whole number"),
        ("WORLD_SIZE", "99999999999999999999", "WORLD_SIZE="),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 is not below"),
        ("LOCAL_WORLD_SIZE", "9", "LOCAL_WORLD_SIZE=9 is above"),
        ("MASTER_PORT", "0", "MASTER_PORT=0 is not a port"),
        ("MASTER_PORT", "65536", "is not a port"),
        ("MASTER_PORT", "x", "MASTER_PORT='x'"),
    ],
)
def test_nonsense_in_the_environment_is_refused(name: str, text: str, fragment: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(rank_environment(WORLD) | {name: text})
    assert fragment in str(caught.value)


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def test_several_tasks_of_srun_without_the_contract_are_refused() -> None:
    with pytest.raises(UsageError, match=r"srun started 2 tasks, but none of RANK, .*sbatch slurm/sft.sh CONFIG"):
        resolve(STEP)
    with pytest.raises(UsageError, match=r"not WORLD_SIZE.*srun sets none of them: .*sbatch slurm/sft.sh"):
        resolve(STEP | {"RANK": "1"})
    assert resolve(STEP | rank_environment(WORLD)) == WORLD
    # One task of srun, a batch script and a shell of salloc may train alone.
    for alone in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}):
        assert resolve(STEP | alone) is None
    for name in ("SLURM_STEP_ID", "SLURM_PROCID"):
        assert resolve({key: text for key, text in STEP.items() if key != name}) is None


def test_torchruns_agent_serves_the_store_itself() -> None:
    first = replace(WORLD, rank=0)
    assert opens_store(first, {})
    assert not opens_store(WORLD, {})
    assert not opens_store(first, {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert opens_store(first, {"TORCHELASTIC_USE_AGENT_STORE": "False"})


def test_an_unknown_host_is_named_before_torch_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unknown(host: str, port: object, **_: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(rendezvous, "_RESOLVE_PAUSE_SECONDS", 0.0)
    with pytest.raises(PeerLostError, match=r"MASTER_ADDR=nope\.invalid"):
        resolve_address("nope.invalid")
    assert asked == ["nope.invalid"] * 3


class DistNetworkError(RuntimeError):
    """Stands for torch.distributed's class of this name, which derives from RuntimeError too."""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's class of this name."""


@pytest.mark.parametrize(
    ("exception", "kind", "fragment"),
    [
        (RuntimeError("[/pytorch/gloo/pair.cc:525] Read error [127.0.0.1]:5: Connection reset by peer"),
         PeerLostError, "lost the connection to a peer (Read error"),
        (RuntimeError("[x/tcp/pair.cc:534] Connection closed by peer [::1]:3"), PeerLostError, "lost the connection"),
        (RuntimeError("Application timeout caused pair closure"), PeerLostError, "did not answer"),
        (RuntimeError("[c10d] writeBytes: Broken pipe"), PeerLostError, "lost the connection"),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), PeerLostError, ""),
        (RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(...)"), PeerLostError, "answer"),
        (DistNetworkError("The server socket has failed to listen: EADDRINUSE, port 29500"), PeerLostError, "port is"),
        (DistNetworkError("failed to connect: Name or service not known"), PeerLostError, "MASTER_ADDR"),
        (DistNetworkError("The client socket has timed out after 10000ms while trying to connect to (a, 1)."),
         PeerLostError, "rendezvous in time"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), CannotWriteError, "no space left on the device (/a"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), CannotWriteError, "no space"),
        (OSError(errno.EROFS, "Read-only file system"), CannotWriteError, "read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), CannotWriteError, "cut short"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), SteadfastError, "memory ran out"),
        (MemoryError(), SteadfastError, "memory ran out"),
        (DataError("a.jsonl:3: bad row"), DataError, "bad row"),
    ],
)  # fmt: skip
def test_faults_of_the_libraries_get_our_names(exception: Exception, kind: type, fragment: str) -> None:
    fault = name_of_fault(exception)
    assert type(fault) is kind
    assert fragment in str(fault)
    assert len(str(fault).splitlines()) == 1


@pytest.mark.parametrize(
    "exception",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("Connection reset by peer"),
        KeyError("x"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_recognized_stays_a_bug_of_ours(exception: BaseException) -> None:
    assert name_of_fault(exception) is None


def test_the_cause_of_an_exception_counts() -> None:
    outer = ValueError("while saving")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(name_of_fault(outer), CannotWriteError)
    outer.__cause__.__context__ = outer
    assert isinstance(name_of_fault(outer), CannotWriteError)


def plan(environ: dict[str, str], ranks: int = 2) -> list[dict[str, str]]:
    planned = plan_ranks(
        ["python", "x"], ranks=ranks, first_rank=4, world_size=8, master_address="node0", master_port=7,
        environ=environ, launcher_pid=99, cores=6, directory="/w",
    )  # fmt: skip
    assert all(rank.command == ["python", "x"] and rank.directory == "/w" for rank in planned)
    return [rank.environment for rank in planned]


def test_a_host_of_a_larger_world_counts_on_from_its_first_rank() -> None:
    first, second = plan({"HOME": "/h"})
    assert [resolve(first), resolve(second)] == [World(4, 8, 0, 2, "node0", 7), World(5, 8, 1, 2, "node0", 7)]
    assert (first["HOME"], first[LAUNCHER_PID], first["PYTHONUNBUFFERED"]) == ("/h", "99", "1")


def test_threads_are_shared_out_unless_the_user_says_otherwise() -> None:
    assert plan({})[0]["OMP_NUM_THREADS"] == "3"
    assert plan({}, ranks=8)[0]["OMP_NUM_THREADS"] == "1"
    assert plan({"OMP_NUM_THREADS": "5"})[0]["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("failures", "culprit"),
    [
        ([(0, 69, 10.0), (1, -9, 10.4)], 1),
        ([(0, 69, 10.0), (1, 65, 11.0), (2, 69, 10.5)], 1),
        ([(0, 70, 10.0), (1, -6, 10.4)], 0),
        ([(0, -11, 10.0), (1, 70, 10.4)], 0),
        ([(2, 69, 10.2), (0, 69, 10.0)], 0),
        ([(2, 77, 10.2), (0, 76, 10.1)], 0),
    ],
)
def test_a_rank_that_only_lost_a_peer_is_blamed_last(failures: list[tuple[int, int, float]], culprit: int) -> None:
    assert blame([Ended(rank, 1, status, when) for rank, status, when in failures]).rank == culprit


def test_exit_codes_of_a_run() -> None:
    codes = {status: exit_code(Ended(0, 1, status, 0.0)) for status in (2, 65, 71, 78, 1, 42, 255, -9, -11)}
    assert codes == {2: 2, 65: 65, 71: 71, 78: 78, 1: 70, 42: 70, 255: 70, -9: 69, -11: 69}


def test_every_exit_code_of_an_error_has_a_meaning() -> None:
    documented = {int(code) for code in re.findall(r"── \w+ +(\d+)", str(errors.__doc__))}
    # A rank that ends with 1 has crashed in Python.
    assert set(MEANINGS) == documented - {errors.NotEqualError.exit_code} | {SteadfastError.exit_code}
    assert (MEANINGS[2], MEANINGS[70], MEANINGS[75]) == (
        "usage or configuration",
        "a bug of ours",
        "stopped on request",
    )


def test_the_last_line_names_rank_cause_and_remedy(tmp_path: Path) -> None:
    killed = describe(Ended(1, 123, -9, 0.0), 2, "Saving", None)
    assert killed is not None
    assert killed.startswith("rank 1 of 2 was killed by SIGKILL (pid 123) at ")
    assert ": Saving; " in killed
    assert "resumes from the last committed checkpoint" in killed
    report = tmp_path / "rank-1.txt"
    failed = describe(Ended(1, 123, 65, 0.0), 2, "error: x.jsonl:3 is bad", report)
    assert failed is not None
    assert "failed with exit code 65 (bad data) at" in failed
    assert failed.endswith(f": x.jsonl:3 is bad; details in {report}")
    assert describe(Ended(0, 1, 65, 0.0), 1, "error: said it", None) is None
    assert "signal 60" in (describe(Ended(0, 1, -60, 0.0), 1, "", None) or "")


def test_lines_of_several_ranks_are_prefixed_and_those_of_one_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    for ranks, prefix in ((2, "[rank 1] "), (1, "")):
        screen = Screen(ranks)
        for stream, line in (("stdout", "a"), ("stderr", "error: b"), ("stderr", "later"), ("stderr", " ")):
            screen.show(Output(1, stream, line))  # type: ignore[arg-type]
        captured = capsys.readouterr()
        assert captured.out == f"{prefix}a\n"
        assert captured.err == f"{prefix}error: b\n{prefix}later\n{prefix} \n"
        assert screen.last_words(1) == "error: b"
        assert screen.last_words(0) == ""


def test_what_all_ranks_say_alike_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(3)
    for rank in range(3):
        for line in ("error: 2 configuration problems", "  x.yaml:1: bad", f"  x.yaml:{rank}: own", "bye", "  bye"):
            screen.show(Output(rank, "stderr", line))
        screen.show(Output(rank, "stdout", "error: of the model's answers"))
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"[rank {rank}] error: of the model's answers" for rank in range(3)]
    lines = captured.err.splitlines()
    assert [line for line in lines if "configuration" in line] == ["[rank 0] error: 2 configuration problems"]
    assert [line for line in lines if "x.yaml:1: bad" in line] == ["[rank 0]   x.yaml:1: bad"]
    assert sum("own" in line for line in lines) == 3
    assert sum("bye" in line for line in lines) == 6
    assert screen.last_words(2) == "error: 2 configuration problems"
    screen.show(Output(0, "stderr", "error: 2 configuration problems"))
    assert "configuration" in capsys.readouterr().err, "a rank may repeat itself"


def test_error_reports_of_an_earlier_start_go_unless_the_run_is_alive(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.forget_last_start()
    assert not run.path.exists()
    with run.lock():
        run.error_report(3).parent.mkdir()
        run.error_report(3).write_text("old")
        (run.path / "errors" / "mine.txt").write_text("kept")
        run.forget_last_start()
        assert run.error_report(3).exists()
    run.forget_last_start()
    assert [path.name for path in (run.path / "errors").iterdir()] == ["mine.txt"]
    with run.lock():
        assert run.in_use()


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "cuda"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"}, "cpu"),
    ],
)
def test_the_device_is_guessed_without_torch(environ: dict[str, str], device: str) -> None:
    assert guess_device(environ) == device


def test_more_ranks_than_visible_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_device, "DEVICE_FILES", tmp_path)
    require_gpus("--nproc", 9, {})
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert guess_device({}) == "cuda"
    for text, count in {"0": 1, "0,1,2": 3, "MIG-a, MIG-b": 2, "0,-1,1": 1, "": 0, "-1": 0}.items():
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": text}) == count
    require_gpus("--nproc", 2, {})
    require_gpus("--nproc", 9, {"DS_ACCELERATOR": "cpu"})
    with pytest.raises(UsageError, match="--nproc 3 needs 3 GPUs, this machine shows 2"):
        require_gpus("--nproc", 3, {})
    for name, text in {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": ""}.items():
        monkeypatch.setenv(name, text)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="this machine shows 1"):
        train_command.run(train_arguments(Path("x.yaml"), [], 2))
    with pytest.raises(UsageError, match="--ranks-per-node 2 needs 2 GPUs"):
        command.run(launch("local", "x.yaml", "--ranks-per-node", "2"))


def test_traceback_reaches_the_ranks_by_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--traceback" not in rank_command(Path("x.yaml"), ["a.b=1"], show_traceback=False)
    assert rank_command(Path("x.yaml"), ["a.b=1"], show_traceback=True)[-3:] == ["x.yaml", "a.b=1", "--traceback"]
    permissions = ["--allow-change=data", "--trust-remote-code=sha256:00"]
    assert rank_command(Path("x.yaml"), [], permissions, show_traceback=False)[-3:] == ["x.yaml", *permissions]
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train_command, "run", lambda arguments: seen.append(arguments) or 0)
    for words in (["train", "x.yaml"], ["train", "--traceback", "x.yaml"]):
        assert run_command({"train": ("t", "help")}, lambda _: train_command, words) == 0
    assert [arguments.traceback for arguments in seen] == [False, True]


def test_bfloat16_on_a_cpu_is_warned_of_at_the_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(train_command, "launch_local", lambda *_, **__: Ending(0))
    monkeypatch.setattr(train_command, "_be_a_rank", lambda *_, **__: 0)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tiny = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
    for dtype, said in (("bfloat16", 1), ("float32", 0)):
        arguments = train_arguments(tiny, [f"model.dtype={dtype}"], 2)
        assert train_command.run(arguments) == 0
        assert capsys.readouterr().err.count("warning: model.dtype=bfloat16 on a CPU is about 80 times") == said
    # A rank says it when no launcher of ours did, and only the first one.
    slow = train_arguments(tiny, ["model.dtype=bfloat16"], None)
    for more, said in (({"RANK": "0", "LOCAL_RANK": "0"}, 1), ({LAUNCHER_PID: "1"}, 0), ({"RANK": "1"}, 0)):
        for name, text in (rank_environment(WORLD) | more).items():
            monkeypatch.setenv(name, text)
        assert train_command.run(slow) == 0
        assert capsys.readouterr().err.count("warning: model.dtype") == said
        monkeypatch.delenv(LAUNCHER_PID, raising=False)


def train_arguments(config: Path, overrides: list[str], nproc: int | None) -> argparse.Namespace:
    """What `steadfast train` gets of its parser."""
    return argparse.Namespace(
        config=config,
        overrides=overrides,
        nproc=nproc,
        max_restarts=0,
        traceback=False,
        allow_change=[],
        trust_remote_code=None,
        strict=False,
    )


def launch(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parse(parser, words)
    arguments.traceback = False
    return arguments


def test_a_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    tiny = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")
    assert command.run(launch("local", tiny, "--ranks-per-node", "2", "run.seed=1", "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"][1:] == [str(ROOT / "steadfast.py"), "train", tiny, "run.seed=1"]
    assert [rank["RANK"] for rank in plan["ranks"]] == ["0", "1"]
    assert plan["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("NCCL_DEBUG", "WARN-value")
    monkeypatch.setenv("HF_TOKEN", "hidden")
    assert command.run(launch("ray", tiny, "--nodes", "2", "--ranks-per-node", "2", "--dry-run")) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("forwarded_variables: ")]
    assert "NCCL_DEBUG" in line.split()
    assert "WARN-value" not in text
    assert "HF_TOKEN" not in text
    assert "STRICT_SPREAD" in text
    assert "world_size: 4" in text
    with pytest.raises(UsageError, match="use launch slurm or ray"):
        command.run(launch("local", tiny, "--nodes", "2", "--dry-run"))
    with pytest.raises(UsageError, match="--ranks-per-node 0"):
        command.run(launch("local", tiny, "--ranks-per-node", "0", "--dry-run"))
    with pytest.raises(ConfigError, match="there is no 'zero9'"):
        command.run(launch("local", tiny, "--dry-run", "engine.deepspeed=zero9"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="not WORLD_SIZE"):
        command.run(launch("local", tiny, "--dry-run"))


def test_nproc_inside_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in rank_environment(WORLD).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match="--nproc 2 inside a launched rank"):
        train_command.run(train_arguments(Path("x.yaml"), [], 2))
