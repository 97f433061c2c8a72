"""A rank and its watchdog, without torch: bounds of phases, and what is left when it is dismissed."""

import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from trainer.observe.heartbeat import Heartbeat, step_bound
from trainer.observe.watchdog import Post, read_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("durations", "hang_seconds", "expected"),
    [
        ([], None, 60.0),
        ([1.0] * 100, None, 60.0),
        ([20.0] * 100, None, 200.0),
        ([20.0] * 100 + [400.0] * 4, None, 200.0),
        ([100.0] * 100, None, 540.0),
        ([20.0] * 100, 5.0, 5.0),
        ([], 9999.0, 540.0),
    ],
)
def test_bound_of_a_step(durations, hang_seconds, expected):
    assert step_bound(deque(durations), hang_seconds, 540.0) == expected


def test_only_steps_after_the_first_of_a_process_are_held_to_the_short_bound(tmp_path):
    heartbeat = Heartbeat(Post(0, 1, os.getpid(), str(tmp_path), "a"), 7.0, 100.0)
    found = []
    for phase, step in [
        ("load", 0), ("data", 5), ("forward", 5), ("save", 5), ("data", 6), ("backward", 6), ("save:write", 6),
        ("evaluate", 6), ("end", 6),
    ]:  # fmt: skip
        heartbeat(phase, step)
        mark = read_page(heartbeat._page)
        assert (mark.phase, mark.step) == (phase, step)
        found.append((mark.bound, mark.patient))
    heartbeat.close()
    slow, quick = (90.0, True), (7.0, False)
    assert found == [slow, slow, slow, slow, quick, quick, slow, quick, slow]
    assert mark.marks == 9, "phases inside a save do not count"
    assert not list((tmp_path / "errors").iterdir())


RANK = """
import os, sys, time
from trainer.observe.heartbeat import Heartbeat
from trainer.observe.watchdog import Post
heartbeat = Heartbeat(Post(0, 1, os.getpid(), sys.argv[1], "a"), 0.5, 600.0)
for step in (1, 2):
    heartbeat("data", step)
if sys.argv[2] == "load":
    heartbeat._longest = 0.4
    heartbeat("load", 0)
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("phase", "seconds", "code"), [("data", 60.0, 71), ("data", 0.1, 0), ("load", 0.9, 0), ("load", 60.0, 71)]
)
def test_a_phase_that_may_take_long_is_only_ended_after_three_times_its_bound(phase, seconds, code, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(tmp_path), phase, str(seconds)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == code, done.stderr
    if code:
        assert f"error: rank 0 on {os.uname().nodename} does not move: {phase}" in done.stderr
        assert time.monotonic() - began < 30
