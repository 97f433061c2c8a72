"""The commit protocol under SIGKILL: whatever is announced as committed is there, whole, afterwards."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.checkpoint.slices import SliceReader
from trainer.checkpoint.verify import committed_steps, find_checkpoint
from trainer.errors import MissingInputError

RANK = Path(__file__).parents[1] / "support" / "commit_rank.py"
PHASES = ["open", "write", "middle of the file", "commit", "rename", "retain"]


def run_ranks(directory: Path, steps: int, fault: str = "", kill_after: float | None = None, world_size: int = 2):
    """Run the ranks with a hub between them; returns (last step announced by any rank, exit codes)."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(directory), str(rank), str(world_size), str(steps), fault],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    if kill_after is not None:
        threading.Timer(kill_after, lambda: random.choice(ranks).kill()).start()
    announced = 0
    waiting: dict[int, dict] = {}
    try:
        while True:
            for rank, process in enumerate(ranks):
                while rank not in waiting:
                    line = process.stdout.readline()
                    if not line:
                        raise EOFError
                    message = json.loads(line)
                    announced = max(announced, message.get("committed", 0))
                    if "exchange" in message:
                        waiting[rank] = message["exchange"]
            reply = json.dumps([waiting.pop(rank) for rank in range(world_size)]) + "\n"
            for process in ranks:
                process.stdin.write(reply)
                process.stdin.flush()
    except (EOFError, BrokenPipeError):
        # One rank is gone: the others are ended as a launcher would, but what they announced before counts.
        time.sleep(0.02)
        for process in ranks:
            process.kill()
        for process in ranks:
            for line in process.stdout:
                announced = max(announced, json.loads(line).get("committed", 0) if line.endswith("}\n") else 0)
    return announced, [process.wait() for process in ranks]


def check_newest(directory: Path, announced: int) -> int:
    """The newest checkpoint is valid, not older than announced, and holds its own step's numbers."""
    try:
        path = find_checkpoint(directory)
    except MissingInputError:
        assert announced == 0
        return 0
    reader = SliceReader(path)
    assert reader.manifest.step >= announced
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert np.array_equal(reader.read(kind, "weight"), np.full(6_000, reader.manifest.step, np.float32))
    return reader.manifest.step


@pytest.mark.parametrize(
    ("victim", "phase"), [(0, phase) for phase in PHASES] + [(1, phase) for phase in PHASES if phase != "rename"]
)
def test_killed_at_every_phase(tmp_path, victim, phase):
    announced, codes = run_ranks(tmp_path, steps=3, fault=f"{victim}:{phase}:2")
    assert codes[victim] == -signal.SIGKILL, "the fault never fired"
    assert announced in (1, 2)
    assert check_newest(tmp_path, announced) in (1, 2)
    # The next run sweeps what is left and goes on.
    assert run_ranks(tmp_path, steps=3)[0] == 3
    assert check_newest(tmp_path, 3) == 3
    assert committed_steps(tmp_path) == [3, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_killed_at_random_moments(tmp_path):
    random.seed(7)
    inside = 0
    for attempt in range(15):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        announced, codes = run_ranks(directory, steps=2000, kill_after=random.uniform(0.15, 0.5))
        inside += any(code < 0 for code in codes)
        check_newest(directory, announced)
    assert inside >= 10, "hardly any kill hit a running commit"
