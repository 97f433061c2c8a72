"""The commit protocol under SIGKILL: whatever is announced as committed is there, whole, afterwards."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commit_model import newest_step
from trainer.checkpoint.verify import committed_steps

RANK = Path(__file__).parents[1] / "support" / "commit_rank.py"
KILLS = RANK.with_name("random_kills.py")
PHASES = ["open", "write", "middle of the file", "commit", "rename", "retain"]


def run_ranks(directory: Path, steps: int, fault: str = "", world_size: int = 2):
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


@pytest.mark.parametrize(
    ("victim", "phase"), [(0, phase) for phase in PHASES] + [(1, phase) for phase in PHASES if phase != "rename"]
)
def test_killed_at_every_phase(tmp_path, victim, phase):
    announced, codes = run_ranks(tmp_path, steps=3, fault=f"{victim}:{phase}:2")
    assert codes[victim] == -signal.SIGKILL, "the fault never fired"
    assert announced in (1, 2)
    assert newest_step(tmp_path, announced) in (1, 2)
    # The next run sweeps what is left and goes on.
    assert run_ranks(tmp_path, steps=3)[0] == 3
    assert newest_step(tmp_path, 3) == 3
    assert committed_steps(tmp_path) == [3, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kills", [200, pytest.param(5_000, marks=[pytest.mark.soak, pytest.mark.timeout(0)])])
def test_killed_at_random_moments(kills, tmp_path, seed):
    done = subprocess.run(
        [sys.executable, str(KILLS), str(tmp_path), str(kills), str(seed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    assert report["bad"] == []
    assert report["left"] == [], "the next save sweeps what kills have left"
    assert report["committed"] > kills / 10
    hit = {phase for phase, count in report["by_phase"].items() if count}
    assert {"open", "middle of the file", "commit", "retain"} <= hit, "kills missed the commits"
