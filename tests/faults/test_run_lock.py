"""One run, one holder: concurrent starts, killed and frozen holders, other hosts, jobs that are gone."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer import run_lock
from trainer.errors import RunLockedError
from trainer.run_lock import Holder, living_holder, take

ROOT = Path(__file__).resolve().parents[2]
STARTS = ROOT / "tests/support/lock_starts.py"
ELSEWHERE = Holder(
    host="node007", pid=1234, process_start="5", namespace="pid:[1]", boot_id="other", job="", attempt=0, since="now"
)


def leave_holder(path: Path, holder: Holder, *, number: int = 1, silent: float = 0) -> Path:
    """A holder's file as another host left it, touched `silent` seconds ago."""
    file = path / f"holder-{number:08d}.json"
    file.write_text(json.dumps(asdict(holder)))
    os.utime(file, (time.time() - silent,) * 2)
    return file


@pytest.mark.parametrize("kind", ["kernel", "holder only"])
@pytest.mark.parametrize("before", ["nothing", "a dead holder"])
def test_of_fifty_starts_exactly_one_wins(kind, before, tmp_path):
    if before == "a dead holder":
        leave_holder(tmp_path, replace(ELSEWHERE, released=True), number=41)
    for _ in range(3):
        done = subprocess.run([sys.executable, STARTS, tmp_path, "50", kind], capture_output=True, text=True)
        assert sorted(json.loads(done.stdout)) == [0] + [77] * 49, done.stderr
    assert len([*tmp_path.glob("holder-*.json")]) == 1
    assert not [*tmp_path.glob(".holder-*")]


def test_a_killed_holder_is_taken_over_and_named(tmp_path, capsys):
    code = "import sys; from pathlib import Path; from trainer.run_lock import take; lock = take(Path(sys.argv[1]));"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); sys.stdin.read()", tmp_path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert f"pid {holder.pid} on" in living_holder(tmp_path)
    with pytest.raises(RunLockedError, match=f"is in use by pid {holder.pid} on"):
        take(tmp_path)
    holder.kill()
    holder.wait()
    assert living_holder(tmp_path) is None
    with take(tmp_path) as lock:
        assert lock.taken_over.endswith("its process has ended")
    assert f"taking over {tmp_path} from pid {holder.pid}" in capsys.readouterr().err
    with take(tmp_path) as lock:
        assert lock.taken_over is None, "a released directory needs no taking over"


@pytest.mark.parametrize(
    ("holder", "silent", "reason"),
    [
        (ELSEWHERE, 0, None),
        (ELSEWHERE, -3600, None),  # its clock, or the server's, was an hour ahead
        (ELSEWHERE, 3600, "no sign of life"),
        ("unreadable", 0, None),
        ("unreadable", 3600, "no sign of life"),
        ("this host before it booted", 0, "its host has booted since"),
        ("a pid that came again", 0, "its process has ended"),
        ("another container here", 0, None),
    ],
)
def test_who_counts_as_gone(holder, silent, reason, tmp_path, monkeypatch):
    me = run_lock._myself({})
    known = {
        "unreadable": ELSEWHERE,
        "this host before it booted": replace(me, boot_id="an earlier boot"),
        "a pid that came again": replace(me, process_start="1"),
        "another container here": replace(me, namespace="pid:[1]", process_start="1"),
    }
    file = leave_holder(tmp_path, known.get(holder, holder), silent=silent)
    if holder == "unreadable":
        file.write_text("{torn")
        os.utime(file, (time.time() - silent,) * 2)
    if reason is None:
        with pytest.raises(RunLockedError):
            take(tmp_path, period=0.2)
        assert living_holder(tmp_path) is not None
    else:
        with take(tmp_path, period=0.2) as lock:
            assert reason in lock.taken_over


def test_a_holder_whose_clock_jumped_is_seen_alive_while_we_look_on(tmp_path):
    file = leave_holder(tmp_path, ELSEWHERE, silent=3600)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(file, (time.time() - 3600,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="pid 1234 on node007"):
            take(tmp_path, period=0.2)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ("echo RUNNING", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("true", True),
        ("echo COMPLETED", True),
        ("echo 'cannot connect' >&2; exit 1", False),
        ("sleep 30", False),
    ],
)
def test_slurm_is_asked_whether_the_job_is_gone(answer, gone, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(run_lock, "SQUEUE_SECONDS", 1.0)
    leave_holder(tmp_path, replace(ELSEWHERE, job="slurm 77"))
    if gone:
        with take(tmp_path) as lock:
            assert lock.taken_over == "pid 1234 on node007 (slurm 77): its job is gone"
    else:
        with pytest.raises(RunLockedError, match="slurm 77"):
            take(tmp_path)


def test_a_requeued_job_takes_over_from_its_earlier_start_and_waits_for_a_lost_host(tmp_path):
    leave_holder(tmp_path, replace(ELSEWHERE, job="slurm 77"))
    with take(tmp_path, environ={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}) as lock:
        assert lock.taken_over.endswith("an earlier start of this job")
    # The same start, on another host after the first was lost: its launcher knows, the file does not yet.
    leave_holder(tmp_path, replace(ELSEWHERE, job="slurm 77"), number=9)
    assert living_holder(tmp_path, environ={"SLURM_JOB_ID": "77"}) is None
    with take(tmp_path, period=0.2, environ={"SLURM_JOB_ID": "77"}) as lock:
        assert "no sign of life" in lock.taken_over


def test_a_frozen_holder_that_was_superseded_may_not_commit(tmp_path):
    lock = take(tmp_path)
    lock.check()
    leave_holder(tmp_path, ELSEWHERE, number=2)
    with pytest.raises(RunLockedError, match="taken over by pid 1234 on node007"):
        lock.check()
    lock.close()


def test_a_holder_shows_that_it_lives(tmp_path):
    with take(tmp_path, period=0.05):
        file = next(tmp_path.glob("holder-*.json"))
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 30
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)


def test_rubbish_in_a_holders_file_is_no_traceback(tmp_path):
    generator = random.Random(5)
    text = json.dumps(asdict(ELSEWHERE)).encode()
    values = [b"null", b"[]", b"{}", b"1e999", b'"x"', b"true", b"\xff", b"[" * 5000, b'{"pid": "x"}']
    for _ in range(500):
        content = bytearray(text)
        for _ in range(generator.randrange(1, 4)):
            begin = generator.randrange(len(content))
            content[begin : begin + generator.randrange(20)] = generator.choice(values)
        (tmp_path / "holder-00000001.json").write_bytes(content)
        with pytest.raises(RunLockedError):
            take(tmp_path, period=3600)


def test_a_second_command_is_refused_before_it_starts_a_rank(tmp_path, store):
    """Through the command line, with a holder on another host: no rank is started, so no torch is imported."""
    run = tmp_path / "run"
    run.mkdir()
    leave_holder(run, ELSEWHERE)
    done = subprocess.run(
        [sys.executable, ROOT / "steadfast.py", "train", ROOT / "configs/tiny.yaml", f"run.dir={run}"],
        capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONVERBOSE": "1"},
    )  # fmt: skip
    assert done.returncode == 77
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {run} is in use by pid 1234 on node007; {run_lock.REMEDY}"]
    assert "import 'torch'" not in done.stderr
    assert [file.name for file in run.iterdir()] == ["holder-00000001.json"]


def test_the_lock_ends_with_a_stopped_process_only_when_it_ends(tmp_path):
    """A stopped (SIGSTOP) holder on this host still holds the kernel's lock: nobody takes over from it."""
    code = "import sys; from pathlib import Path; from trainer.run_lock import take; lock = take(Path(sys.argv[1]));"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); sys.stdin.read()", tmp_path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    os.utime(next(tmp_path.glob("holder-*.json")), (0, 0))
    try:
        with pytest.raises(RunLockedError):
            take(tmp_path, period=0.05)
    finally:
        holder.kill()
        holder.wait()
