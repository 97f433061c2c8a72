"""Every second of a run has one class: whatever happened, in whatever order, they add up to its wall time."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.observe.goodput import CLASSES, PHASES, account, advise, best_interval, timeline
from trainer.run_directory import RunDirectory


def lines_of(*marks):
    """Lines from (seconds since the line before, mark, details)."""
    at, lines = 1000.0, []
    for seconds, mark, *details in marks:
        at += seconds
        lines.append({"at": at, "mark": mark} | dict(*details))
    return lines


def step(seconds, number, data=0.0, wait=0.0):
    return seconds, "step", {"step": number, "data_wait": data, "communication_wait": wait}


START = (1, "start", {"process": "a", "ranks": 2})


def spent(lines):
    return {kind: seconds for kind, seconds in account(lines).seconds.items() if seconds}


def test_an_attempt_from_submission_to_its_end():
    lines = lines_of(
        (0, "submit"), (60, "launch"), START, (2, "load"), (8, "train", {"resumed": 0}), step(5, 1, 1.0, 0.5),
        step(2, 2, 0.25, 0.25), step(2, 3), (0, "evaluation"), (3, "checkpoint"), (4, "shutdown"), (1, "gone"),
        (0.5, "end", {"exit_code": 0}),
    )  # fmt: skip
    assert spent(lines) == {
        "queue": 60, "start": 3, "load": 8, "compile": 3, "data_wait": 1.25, "communication_wait": 0.75,
        "compute": 4, "evaluation": 3, "checkpoint": 4, "shutdown": 1.5,
    }  # fmt: skip
    table = account(lines)
    assert (table.attempts, table.failures, table.lost_steps) == (1, 0, 0)
    assert table.wall_seconds == 88.5
    assert table.rank_seconds["compute"] == 8
    assert table.rank_seconds["queue"] == 0
    assert table.save_seconds == 4
    assert table.restart_seconds == 3 + 8 + 3


def test_steps_after_the_resumed_one_were_lost():
    lines = lines_of(
        (0, "launch"), START, (1, "load"), (1, "train", {"resumed": 0}), step(2, 1), step(2, 2), (0, "checkpoint"),
        (1, "train"), step(2, 3), step(2, 4), (0.75, "end", {"exit_code": 69}), (0.25, "launch"),
        (1, "start", {"process": "b", "ranks": 1}), (1, "load"), (1, "train", {"resumed": 2}), step(2, 3), step(2, 4),
        (1, "gone"), (0, "end", {"exit_code": 0}),
    )  # fmt: skip
    table = account(lines)
    assert table.seconds["lost_work"] == 4
    assert table.seconds["hang"] == 0.75
    assert table.seconds["compute"] == 8 + 1
    assert table.seconds["queue"] == 0.25
    assert (table.attempts, table.failures, table.lost_steps) == (2, 1, 2)
    assert table.rank_seconds["compute"] == 2 * 4 + 5


def test_a_step_lost_twice_is_lost_twice():
    attempt = [(0, "load"), (0, "train", {"resumed": 0}), step(1, 1), step(1, 2)]
    starts = [(0, "start", {"process": name, "ranks": 1}) for name in "abc"]
    table = account(lines_of(*[mark for start in starts for mark in (start, *attempt)]))
    assert (table.lost_steps, table.seconds["lost_work"], table.seconds["compute"]) == (4, 4, 2)


@pytest.mark.parametrize(
    ("code", "phase", "kind"),
    [
        (71, "train", "hang"), (69, "checkpoint", "hang"), (73, "checkpoint", "checkpoint"), (70, "train", "lost_work"),
        (66, "load", "load"), (75, "shutdown", "shutdown"),
    ],
)  # fmt: skip
def test_what_comes_after_the_last_sign_of_progress(code, phase, kind):
    before = lines_of(START, (1, phase, {"resumed": 0}))
    after = [*before, {"at": before[-1]["at"] + 7, "mark": "end", "exit_code": code}]
    assert account(after).seconds[kind] - account(before).seconds[kind] == 7


def test_what_rank_0_waited_for_is_known_when_the_attempt_has_ended():
    begin = [
        (0, "launch"),
        START,
        (1, "load"),
        (1, "train", {"resumed": 0}),
        step(1, 1),
        (30, "gone", {"failed": True}),
    ]
    stuck = spent(lines_of(*begin, (2, "end", {"exit_code": 71})))
    assert stuck == {"start": 2, "load": 1, "compute": 1, "hang": 32}
    broken = spent(lines_of(*begin, (2, "end", {"exit_code": 70})))
    assert broken == {"start": 2, "load": 1, "compute": 1, "lost_work": 30, "shutdown": 2}


def test_nothing_is_known_between_the_last_line_of_a_killed_process_and_the_next_start():
    lines = lines_of(
        START, (1, "load"), (1, "train", {"resumed": 0}), step(1, 1), (100, "start", {"process": "b", "ranks": 1})
    )
    assert spent(lines) == {"start": 1, "load": 1, "compute": 1, "queue": 100}
    assert account(lines).failures == 1


def test_an_empty_ledger():
    table = account([])
    assert table.wall_seconds == 0
    assert table.goodput == 0
    assert advise(table) is None


PAUSES = st.floats(0, 1e4, allow_nan=False)
MARKS = st.one_of(
    st.tuples(PAUSES, st.sampled_from(["submit", "launch"]), st.just({})),
    st.tuples(PAUSES, st.just("end"), st.builds(dict, exit_code=st.sampled_from([0, 69, 70, 71, 75, 137]))),
    st.tuples(PAUSES, st.just("gone"), st.sampled_from([{}, {"failed": True}])),
    st.tuples(
        PAUSES, st.just("start"), st.builds(dict, process=st.sampled_from("abc"), ranks=st.integers(1, 8))
    ),
    st.tuples(PAUSES, st.sampled_from(sorted(PHASES - {"start"})), st.just({})),
    st.tuples(PAUSES, st.just("train"), st.builds(dict, resumed=st.integers(0, 9))),
    st.tuples(
        PAUSES, st.just("step"),
        st.builds(dict, step=st.integers(1, 9), data_wait=st.floats(-1, 1e5), communication_wait=st.floats(-1, 1e5)),
    ),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(MARKS, max_size=60), st.randoms(use_true_random=False))
def test_classes_add_up_to_the_wall_time_whatever_happened(marks, chance):
    lines = lines_of(*marks)
    wall = lines[-1]["at"] - lines[0]["at"] if lines else 0.0
    chance.shuffle(lines)
    table = account(lines)
    assert table.wall_seconds == wall
    assert set(table.seconds) == set(CLASSES)
    assert all(seconds >= 0 for seconds in table.seconds.values())
    assert math.isclose(sum(table.seconds.values()), wall, rel_tol=1e-9, abs_tol=1e-6)
    assert 0 <= table.failures <= table.attempts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_step_counts_once_however_often_the_run_restarts(data):
    """Runs that are killed after any step and resume from any step before; a step takes one second."""
    marks, reached, done = [], 0, 0
    for name in range(data.draw(st.integers(1, 6))):
        resumed = data.draw(st.integers(0, reached))
        reached = data.draw(st.integers(resumed, resumed + 5))
        marks += [(1, "start", {"process": name, "ranks": 1}), (1, "load"), (1, "train", {"resumed": resumed})]
        marks += [step(1, number + 1) for number in range(resumed, reached)]
        done += reached - resumed
    table = account(lines_of(*marks))
    assert table.seconds["compute"] == reached
    assert table.seconds["lost_work"] == done - reached == table.lost_steps


def test_files_of_a_run_become_one_timeline(tmp_path):
    run = RunDirectory(tmp_path)
    run.times.write_text(
        json.dumps({"at": 1.5, "mark": "start", "process": "a", "ranks": 1})
        + "\n"
        + json.dumps({"at": 3.0, "mark": "gone"})
        + '\n{"at": 4.0, "mar'
    )
    events = [
        {"event": "launch", "time": "1970-01-01T00:00:01+00:00"},
        {"event": "commit", "time": "1970-01-01T00:00:02+00:00"},
        {"event": "end", "time": "1970-01-01T00:00:05+00:00", "exit_code": 0},
    ]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    lines = list(timeline(run))
    assert [line["mark"] for line in lines] == ["launch", "start", "gone", "end"]
    assert spent(lines) == {"start": 2.0, "shutdown": 2.0}


def waste(interval, save, mean):
    """Expected run time over useful time, for failures that come at random (Daly's exact model, no restart time)."""
    return mean * (math.exp((interval + save) / mean) - 1) / interval


@pytest.mark.parametrize(("save", "mean"), [(1, 3600), (30, 86400), (120, 7200), (0.05, 600), (600, 3600)])
def test_the_advised_interval_is_where_least_is_lost(save, mean):
    """Against the optimum found by trying thousands of intervals."""
    tried = [mean * 1.002**power for power in range(-6000, 1000)]
    least = min(waste(interval, save, mean) for interval in tried)
    assert waste(best_interval(save, mean), save, mean) <= 1.001 * least


def test_advice_follows_from_what_was_measured():
    attempt = [
        (1, "load"), (9, "train", {"resumed": 0}), step(2, 1), step(2, 2), (0, "checkpoint"), (10, "train"), step(2, 3),
    ]  # fmt: skip
    advice = advise(account(lines_of(START, *attempt)))
    assert advice.hours_between_failures == pytest.approx(24, rel=1e-3)
    assert advice.seconds == pytest.approx(best_interval(10, 24 * 3600), rel=1e-3)
    assert advice.steps == round(advice.seconds / 2)
    often = advise(account(lines_of(*[line for _ in range(4) for line in (START, *attempt)])))
    assert often.hours_between_failures == pytest.approx(6, rel=1e-2)
    assert often.seconds < advice.seconds / 1.9
