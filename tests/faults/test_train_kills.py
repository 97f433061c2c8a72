"""A real two-rank run is killed inside a save; what was committed is kept and the resumed run ends bitwise equal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.training import digest, losses, settings
from trainer.checkpoint.verify import committed_steps

ROOT = Path(__file__).resolve().parents[2]


def command(config: Path) -> list[str]:
    return [sys.executable, str(ROOT / "steadfast.py"), "train", str(config), "--nproc", "2"]


def write_config(path: Path, run: Path, store) -> Path:
    values = settings(run, store.path, train__max_steps=24, checkpoint__every_steps=2, checkpoint__keep=3)
    path.write_text(yaml.safe_dump(values))
    return path


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """In the order of ranks; the launcher has another child, which watches over what ranks leave behind."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, store):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = subprocess.run(
        command(write_config(directory / "c.yaml", directory / "run", store)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.mark.parametrize("victim", ["first rank", "second rank", "launcher"])
def test_killed_inside_a_save(victim, tmp_path, store, uninterrupted):
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", run, store)
    launcher = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # Any save after the second one will do: each is open for some ten milliseconds only, and this process may sleep.
    while not any(attempt.name >= ".tmp-step-00000006" for attempt in (run / "checkpoints").glob(".tmp-step-*")):
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.0005)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    os.kill({"first rank": ranks[0], "second rank": ranks[1], "launcher": launcher.pid}[victim], signal.SIGKILL)
    message = launcher.stderr.read()
    code = launcher.wait(timeout=60)
    if victim == "launcher":
        assert code == -signal.SIGKILL
    else:
        assert code == 69
        assert "SIGKILL" in message.splitlines()[-1]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlived the run"
        time.sleep(0.05)
    announced = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    newest = max(event["step"] for event in announced if event["event"] == "commit")
    # The save before the one that was hit is committed; its announcement may have been next.
    assert committed_steps(run / "checkpoints")[0] >= max(newest, 4)
    again = subprocess.run(command(config), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert losses(run) == losses(uninterrupted)
    assert digest(run) == digest(uninterrupted)
    if victim != "second rank":
        # Rank 0 held the directory and had no time to release it.
        assert '"takeover"' in (run / "events.jsonl").read_text()
        assert "taking over" in again.stderr


def test_a_run_that_lost_a_rank_starts_again_by_itself(tmp_path, store, uninterrupted):
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", run, store)
    launcher = subprocess.Popen(
        [*command(config), "--max-restarts", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not committed_steps(run / "checkpoints"):
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    message = launcher.stderr.read()
    assert launcher.wait(timeout=60) == 0, message
    assert "starting again: lost a rank; restart 1 of at most 2 from step" in message
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event for event in events if event in ("launch", "end", "resume", "done")] == [
        "launch", "end", "launch", "resume", "done", "end",
    ]  # fmt: skip
    assert losses(run) == losses(uninterrupted)
    assert digest(run) == digest(uninterrupted)


def test_two_starts_at_once(tmp_path, store):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", store)
    both = [
        subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    messages = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 77], messages
    assert "is in use by pid" in messages[codes.index(77)]


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, store):
    """A file-size limit stands for the full disk: writes beyond it fail while everything small still works."""
    import resource

    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", run, store)
    stopped = subprocess.run([*command(config), "train.max_steps=2"], capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr
    before = digest(run)
    done = subprocess.run(
        command(config),
        capture_output=True,
        text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        ),
    )
    assert done.returncode == 73, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] or "no space" in done.stderr.splitlines()[-1]
    assert committed_steps(run / "checkpoints") == [2]
    assert digest(run) == before
