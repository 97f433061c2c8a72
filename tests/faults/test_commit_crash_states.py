"""The commit protocol under power cuts: every state that a crash can leave loads a step that was committed.

The protocol runs once, really, with ranks as threads; its file-system calls are recorded. Then thousands of states
are built that a crash after any call may leave (see `tests.support.crash_states`), and each is loaded.
"""

import os
import random
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.commit_model import commit_step, newest_step
from tests.support.crash_states import Recorder, States
from trainer.durable import make_directory
from trainer.errors import SteadfastError

STEPS, RANKS = 4, 3
ELEMENTS = 36_000
"""Of the model: pages enough that what of them is on the disk makes more states than are asked for."""


class Meeting:
    """All-gather among threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS)
        self._messages = [None] * RANKS

    def exchange(self, rank: int, message: dict) -> list:
        self._messages[rank] = message
        self._barrier.wait()
        everything = [*self._messages]
        self._barrier.wait()
        return everything


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recorder:
    """Calls of STEPS commits of all ranks; the third step is then found damaged and committed again."""
    root = tmp_path_factory.mktemp("recorded")
    recorder, meeting = Recorder(root), Meeting()
    checkpoints = recorder.root / "run" / "checkpoints"

    def be_rank(rank: int) -> None:
        for step in [*range(1, STEPS), "damage", STEPS - 1, STEPS]:
            if step == "damage":
                if rank == 0:
                    recorder.mark(STEPS - 2)
                    with next(checkpoints.glob(f"step-*{STEPS - 1}/rank-00001*")).open("rb+") as stream:
                        stream.seek(5_000)
                        stream.write(b"flipped")
                meeting.exchange(rank, {})
                continue
            commit_step(
                checkpoints, step, rank=rank, world_size=RANKS, elements=ELEMENTS,
                exchange=lambda message: meeting.exchange(rank, message),
            )  # fmt: skip
            if rank == 0:
                recorder.mark(step)

    with recorder.watching():
        make_directory(recorder.root / "run")
        ranks = [threading.Thread(target=be_rank, args=(rank,)) for rank in range(RANKS)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
    assert States(recorder.calls, recorder.directories).marks_before(len(recorder.calls))[-1] == STEPS
    return recorder


def ram_or(tmp_path: Path) -> Path:
    """A directory in memory where there is one: states are many and live for a millisecond."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else tmp_path


def find_losses(recorder: Recorder, count: int, seed: int, tmp_path: Path) -> tuple[int, str | None]:
    """Build and load `count` different states; returns how many there were, and the first loss.

    First after every call: all that was not synced is lost, then all is there. Then at random, oftenest where most is
    in the balance.
    """
    generator = random.Random(seed)
    states = States(recorder.calls, recorder.directories)
    ends = range(len(recorder.calls) + 1)
    weights = [1 + states.in_the_balance(end) for end in ends]
    systematic = [(end, survival) for survival in (0.0, 1.0) for end in ends]
    known: dict[bytes, int] = {}
    for number in range(20 * count):
        if len(known) == count:
            break
        if number < len(systematic):
            end, survival = systematic[number]
        else:
            end, survival = generator.choices(ends, weights)[0], generator.uniform(0.02, 0.98)
        tree = states.after(end, generator, survival)
        announced = [0, *states.marks_before(end)][-1]
        if known.get(tree.digest, -1) >= announced:
            continue
        place = Path(tempfile.mkdtemp(dir=ram_or(tmp_path)))
        try:
            tree.write(place)
            known[tree.digest] = newest_step(place / "run" / "checkpoints", announced)
            if number % 50 == 0:
                # And the run goes on from there.
                commit_step(place / "run/checkpoints", 99, rank=0, world_size=1, exchange=lambda message: [message])
                assert newest_step(place / "run" / "checkpoints", 99) == 99
        except (AssertionError, SteadfastError) as error:
            return len(known), f"state {number}, a crash after call {end} of {ends[-1]}, survival {survival}: {error}"
        finally:
            shutil.rmtree(place)
    return len(known), None


@pytest.mark.parametrize("count", [10_000, pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(0)])])
def test_every_state_after_a_crash_loads_a_committed_step(count, recording, tmp_path, seed):
    different, loss = find_losses(recording, count, seed, tmp_path)
    assert loss is None
    assert different == count


@pytest.mark.parametrize(
    "broken", ["files are not synced", "directories are not synced", "announced before the commit"]
)
def test_a_protocol_that_is_broken_is_found(broken, recording, tmp_path, seed):
    """The states can fail: without its syncs, or with an early announcement, the protocol loses steps."""
    calls = [call for call in recording.calls if call.kind != "mark"] if "announced" in broken else recording.calls
    if "announced" in broken:
        marks = [replace(call, mark=STEPS) for call in recording.calls if call.kind == "mark"]
        calls = [*calls[: len(calls) // 2], marks[-1], *calls[len(calls) // 2 :]]
    else:
        directories = "directories" in broken
        calls = [
            call for call in calls if call.kind != "sync" or (call.node in recording.directories) != directories
        ]  # fmt: skip
    damaged = replace(recording, root=tmp_path)
    damaged.calls, damaged.directories = calls, recording.directories
    assert find_losses(damaged, 3_000, seed, tmp_path)[1]
