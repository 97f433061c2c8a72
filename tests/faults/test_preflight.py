"""The preflight with real processes: each fault fires, its host is named, and nobody waits longer than the bound.

Two "hosts" are two processes that the scheduler's variable SLURMD_NODENAME gives different names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.contract import VARIABLES
from launch.preflight import facts

ROOT = Path(__file__).resolve().parents[2]
# What nobody has to wait out, and what a missing rank makes the others wait out; then what starting Python may take.
WITHIN, SHORT, SLACK = 40, 12, 20


class Hosts:
    """Ranks of a preflight, started by hand, one a host called node0, node1, ..."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path / "run"
        self.store = tmp_path / "store"
        self.store.mkdir()
        self.port = free_port()
        self.ranks: list[subprocess.Popen[str]] = []

    def start(
        self,
        rank: int,
        *overrides: str,
        ranks: int = 2,
        within: int = WITHIN,
        collectives: bool = False,
        cwd: Path = ROOT,
        **variables: str,
    ) -> subprocess.Popen[str]:
        environ = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", *VARIABLES))}
        environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(self.port), "SLURMD_NODENAME": f"node{rank}",
            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable, str(ROOT / "steadfast.py"), "preflight", str(ROOT / "configs" / "tiny.yaml"),
            f"run.dir={self.run_dir}", f"data.train={self.store}", *overrides, "--within", str(within),
        ]  # fmt: skip
        self.ranks.append(
            subprocess.Popen(
                command if collectives else [*command, "--no-collectives"], stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, cwd=cwd, env=environ | variables,
            )
        )  # fmt: skip
        return self.ranks[-1]

    def ends(self, rank: subprocess.Popen[str], seconds: float = WITHIN + SLACK) -> tuple[int, str]:
        """Exit code and output; a rank that says anything on stderr says one line, and never a traceback."""
        out, err = rank.communicate(timeout=seconds)
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 1, err
        return rank.returncode, out + err


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip("this machine does not know its own name")
    found = Hosts(tmp_path)
    yield found
    for rank in found.ranks:
        rank.kill()
        rank.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def errors(output: str) -> list[str]:
    return [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]


def test_two_hosts_that_fit_pass_the_first_collectives_and_leave_no_trace(hosts: Hosts) -> None:
    ranks = [hosts.start(rank, within=100, collectives=True) for rank in (0, 1)]
    (code, text), (other, silence) = [hosts.ends(rank, 120) for rank in ranks]
    assert (code, other) == (0, 0), text + silence
    assert silence == ""
    assert errors(text) == []
    for rank, line in enumerate(text.splitlines()[:2]):
        assert line.startswith(f"node{rank}  "), text
        assert f"rank {rank}, code " in line
        assert "GiB/s" in line
    assert text.splitlines()[-1].startswith("preflight: fit to train: 2 host(s), 2 rank(s), ")
    assert not hosts.run_dir.exists()


def test_a_host_that_never_answers_is_named_by_the_scheduler(hosts: Hosts, tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho node0; echo node1; echo node2\n")
    scontrol.chmod(0o755)
    path = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_STEP_NODELIST": "node[0-2]"}
    began = time.monotonic()
    ranks = [hosts.start(rank, ranks=3, within=SHORT, **path) for rank in (0, 1)]
    (code, text), (other, _) = map(hosts.ends, ranks)
    assert (code, other) == (69, 69)
    assert time.monotonic() - began < SHORT + SLACK
    assert errors(text) == ["node2: rank 2 on node2 did not answer; see whether its host is up and its process started"]
    assert "to leave the bad hosts out: --exclude=node2" in text


def test_a_killed_rank_is_named_and_not_waited_for(hosts: Hosts) -> None:
    # Rank 2 never starts, so the others wait, and rank 1 dies while it waits.
    first, second = (hosts.start(rank, ranks=3, within=SHORT) for rank in (0, 1))
    end = time.monotonic() + SLACK
    while not (hosts.run_dir / ".preflight" / "rank-00001.json").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.5)
    second.send_signal(signal.SIGKILL)
    code, text = hosts.ends(first)
    assert code == 69
    assert "node1: rank 1 ended during the preflight; see what it said" in errors(text)
    assert any(line.startswith("rank 2 did not answer") for line in errors(text))


def test_a_rank_with_another_master_is_found_through_run_dir(hosts: Hosts) -> None:
    elsewhere = str(free_port())
    first, second = hosts.start(0, within=SHORT), hosts.start(1, within=SHORT, MASTER_PORT=elsewhere)
    (code, text), (other, said) = hosts.ends(first), hosts.ends(second)
    assert (code, other) == (69, 69)
    (line,) = errors(text)
    assert line.startswith("node1: rank 1 on node1 has written into run.dir but cannot reach rank 0; ")
    name = socket.gethostname()
    assert line.endswith(f"it has MASTER_ADDR:MASTER_PORT={name}:{elsewhere}, rank 0 has {name}:{hosts.port}")
    assert "--exclude=node1" in text
    assert f"cannot reach rank 0 at MASTER_ADDR:MASTER_PORT={name}:{elsewhere} (Connection refused, " in said
    assert not hosts.run_dir.exists()


def test_a_dead_rank_0_is_named_by_the_others(hosts: Hosts) -> None:
    began = time.monotonic()
    code, said = hosts.ends(hosts.start(1, within=SHORT))
    assert code == 69
    assert f"cannot reach rank 0 at MASTER_ADDR:MASTER_PORT={socket.gethostname()}:{hosts.port}" in said
    assert time.monotonic() - began < SHORT + SLACK


def test_another_configuration_on_one_host_is_refused_on_all(hosts: Hosts) -> None:
    ranks = [hosts.start(rank, f"train.max_steps={30 if rank == 2 else 20}", ranks=3) for rank in range(3)]
    ends = [hosts.ends(rank) for rank in ranks]
    assert [code for code, _ in ends] == [2, 2, 2]
    (line,) = errors(ends[0][1])
    assert line.startswith("node2: configuration is ")
    assert " on rank 2, elsewhere " in line
    assert "--exclude=node2" in ends[0][1]


def test_a_run_dir_that_is_not_shared_is_found_by_its_stale_nonce(hosts: Hosts, tmp_path: Path) -> None:
    # The same relative path is another directory on each host, and on one there is a nonce of an earlier start.
    places = [tmp_path / "here", tmp_path / "there"]
    stale = places[1] / "out" / ".preflight" / "nonce"
    stale.parent.mkdir(parents=True)
    stale.write_text("0123456789abcdef0123456789abcdef")
    places[0].mkdir()
    ranks = [hosts.start(rank, "run.dir=out", cwd=place) for rank, place in enumerate(places)]
    (code, text), (other, _) = map(hosts.ends, ranks)
    assert (code, other) == (73, 73)
    (line,) = errors(text)
    assert line.startswith(f"run.dir={places[1] / 'out'} on node1 (")
    assert ") has the file of an earlier start: it is another directory than that of rank 0" in line
    assert "--exclude" not in text, "no host is to blame"
    shutil.rmtree(stale.parent)
    hosts.port = free_port()
    ranks = [hosts.start(rank, "run.dir=out", cwd=place) for rank, place in enumerate(places)]
    (code, text), _ = map(hosts.ends, ranks)
    assert code == 73
    assert "has nothing of what rank 0 wrote" in text


def test_a_run_dir_that_cannot_be_written_is_named_on_its_host(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "out").write_text("a file")
    ranks = [hosts.start(0, "run.dir=out", cwd=tmp_path), hosts.start(1, "run.dir=out", cwd=tmp_path / "there")]
    (code, text), _ = map(hosts.ends, ranks)
    assert code == 73
    (line,) = errors(text)
    assert line.startswith("node1: cannot write out/.preflight: Not a directory; ")


def test_a_disk_too_small_for_a_checkpoint_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    hosts.run_dir.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", hosts.run_dir], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        code, text = hosts.ends(hosts.start(0, ranks=1))
    finally:
        subprocess.run(["umount", hosts.run_dir], check=True)
    assert code == 73
    (line,) = errors(text)
    assert line.startswith("node0: 3 MiB free for run.dir, a checkpoint takes about ")
    assert "free some space" in line


def test_a_rank_that_is_there_twice_is_refused(hosts: Hosts) -> None:
    hosts.start(1, ranks=3, within=SHORT, SLURMD_NODENAME="twin")
    first, second = (hosts.start(rank, ranks=3, within=SHORT) for rank in (0, 1))
    code, text = hosts.ends(first)
    assert code == 2
    assert any("two processes say that they are rank 1: pid " in line for line in errors(text))
    hosts.ends(second)


def test_who_listens_at_the_master_port_may_be_somebody_else(hosts: Hosts) -> None:
    with socket.create_server(("", hosts.port)) as server:
        code, said = hosts.ends(hosts.start(0))
        assert code == 69
        assert f"port {hosts.port} of {socket.gethostname()} (MASTER_PORT) is in use by pid {os.getpid()}" in said
        visitor = hosts.start(1)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        code, said = hosts.ends(visitor)
        assert code == 69
        assert f"who listens at {socket.gethostname()}:{hosts.port} is not the preflight of rank 0" in said
        connection.close()


def test_a_file_system_that_hangs_ends_with_the_bound(hosts: Hosts, tmp_path: Path) -> None:
    # Reading a named pipe that nobody writes to hangs like a dead file server.
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "model.safetensors")
    began = time.monotonic()
    code, said = hosts.ends(hosts.start(0, "model.config=null", f"model.path={model}", ranks=1, within=SHORT))
    assert code == 69
    assert "was still looking at run.dir after 12 s; a file server or a driver of that host hangs" in said
    assert time.monotonic() - began < SHORT + SLACK


def test_a_process_with_no_launcher_starts_the_ranks_here(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "steadfast.py"), "preflight", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}",
        f"data.train={tmp_path}", "--nproc", "2", "--no-collectives", "--json",
    ]  # fmt: skip
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", *VARIABLES))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert [facts["local_rank"] for facts in report["ranks"].values()] == [0, 1]
    assert report["ranks"]["0"]["pid"] != report["ranks"]["1"]["pid"]
    assert {result["nonce"] for result in report["results"].values()} == {"seen"}
    absent = [word.replace(f"data.train={tmp_path}", "data.train=nowhere") for word in command]
    done = subprocess.run(absent, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60)
    assert done.returncode == 66
    assert "there is no data.train=nowhere" in done.stdout


def test_the_doctor_looks_at_this_machine_with_torch_and_without() -> None:
    command = [sys.executable, str(ROOT / "steadfast.py"), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"]
    assert report["torch"]["stage"] == "done", report["torch"]
    assert report["facts"]["versions"]["torch"] == report["torch"]["torch"]
    levels = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert levels["python"] == levels["torch runs"] == "ok"
    quick = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:], "--no-torch"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert json.loads(quick.stdout)["torch"] is None
    imported = {line.rpartition("|")[2].strip() for line in quick.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "deepspeed"}


def test_the_driver_is_asked_and_may_fail_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(facts, "_NVIDIA_SMI_SECONDS", 0.3)
    for script, expected in (
        ("echo 0, H100, 570.1, 81559, 4, 0, 34", (1, "")),
        ("echo 'Unable to determine the device handle for GPU0'; exit 15",
         (0, "nvidia-smi: Unable to determine the device handle for GPU0")),
        ("exec sleep 20", (0, "nvidia-smi did not answer in 0 s")),
    ):  # fmt: skip
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        gpus, problem = facts._gpus({})
        assert (len(gpus), problem) == expected
    assert facts._gpus({"CUDA_VISIBLE_DEVICES": ""}) == ([], "")
