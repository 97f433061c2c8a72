"""Saves in the background under SIGKILL: whatever is announced as committed is there, whole, afterwards."""

import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support.hub import run_ranks
from trainer.checkpoint.slices import KINDS, SliceReader
from trainer.checkpoint.verify import committed_steps, find_checkpoint
from trainer.errors import MissingInputError

SCRIPT = Path(__file__).parents[1] / "support" / "saving_rank.py"
RANK_PHASES = ["open", "snapshot", "settle"]
WRITER_PHASES = ["write", "middle of the file", "written"]
COMMIT_PHASES = ["commit", "rename", "retain"]


def run(directory: Path, steps: int, fault: str = "", **more):
    """(last step announced as committed, steps given up, exit codes)."""
    messages, codes = run_ranks(SCRIPT, [directory, steps, fault], **more)
    committed = max((message["committed"] for message in messages if "committed" in message), default=0)
    return committed, {message["given up"]: message["problem"] for message in messages if "given up" in message}, codes


def kill_later(delay: float, victim: int, ranks: list) -> None:
    time.sleep(delay)
    ranks[victim].kill()


def check_newest(directory: Path, announced: int) -> int:
    try:
        reader = SliceReader(find_checkpoint(directory))
    except MissingInputError:
        assert announced == 0
        return 0
    assert reader.manifest.step >= announced
    for kind in KINDS:
        assert np.array_equal(reader.read(kind, "weight"), np.full(6_000, reader.manifest.step, np.float32))
    return reader.manifest.step


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", RANK_PHASES)
def test_a_rank_killed_in_every_phase(tmp_path, rank, phase):
    announced, _, codes = run(tmp_path, 10, f"rank:{rank}:{phase}:3")
    assert codes[rank] == -signal.SIGKILL, "the fault never fired"
    assert announced >= 2
    assert check_newest(tmp_path, announced) in (4, 6)
    announced, given_up, codes = run(tmp_path, 10)
    assert (announced, given_up, codes) == (10, {}, [0, 0])
    assert check_newest(tmp_path, 10) == 10
    assert committed_steps(tmp_path) == [10, 8]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("rank", "phase"),
    [(rank, phase) for rank in (0, 1) for phase in WRITER_PHASES] + [(0, phase) for phase in COMMIT_PHASES],
)
def test_a_writer_killed_in_every_phase_costs_its_save_and_not_the_run(tmp_path, rank, phase):
    count = 2 * len(KINDS) if phase == "middle of the file" else 2
    announced, given_up, codes = run(tmp_path, 10, f"writer:{rank}:{phase}:{count}")
    # The new writer counts anew, so it dies in its own second save: never two in a row, and the run goes on.
    assert codes == [0, 0]
    assert given_up, "the fault never fired"
    assert all(
        f"rank {rank}: the process that writes checkpoints was ended by SIGKILL" in why for why in given_up.values()
    )
    assert check_newest(tmp_path, announced) >= announced >= 8
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_three_saves_in_a_row_that_fail_end_the_run(tmp_path):
    announced, given_up, codes = run(tmp_path, 20, "writer:1:write:1")
    assert announced == 0
    assert sorted(given_up) == [2, 4]
    assert all(codes), "the third failure is an error on every rank"
    assert committed_steps(tmp_path) == []


def test_killed_at_random_moments(tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    inside = 0
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        delay, victim = dice.uniform(0.3, 0.8), dice.randrange(2)
        announced, _, codes = run(directory, 2000, on_start=partial(kill_later, delay, victim))
        inside += any(code < 0 for code in codes)
        check_newest(directory, announced)
    assert inside == 6, "a kill came too late"
