"""A rank is named when it was slow in nearly all of the last twenty steps: once, until it has recovered."""

import pytest

from trainer.observe.stragglers import ENOUGH, STEPS, Stragglers, pace
from trainer.state import StepResult, TrainState

HOSTS = ["a", "b", "c", "d"]


def events_of(steps: list[tuple[float, ...]]) -> list[tuple[int, str, int, float]]:
    found, shown = [], []
    watch = Stragglers(
        HOSTS,
        lambda event, *, step, rank, host, ratio: found.append((step, event, rank, ratio)),
        lambda step, text: shown.append((step, text)),
    )
    for step, times in enumerate(steps, 1):
        watch.on_step(TrainState(step=step), None, result(times), None)
    assert [(step, f"rank {rank} on {HOSTS[rank]}") for step, _, rank, _ in found] == [
        (step, text.partition(" is ")[0]) for step, text in shown
    ]
    return found


def result(times: tuple[float, ...]) -> StepResult:
    return StepResult(1.0, 1.0, 1e-3, 10, 10, True, False, 0.0, times)


SLOW, EVEN = (1.0, 1.0, 2.0, 1.1), (1.0, 1.0, 1.4, 1.1)


def test_named_once_until_it_has_recovered(capsys):
    steps = [SLOW] * (STEPS + 30) + [EVEN] * STEPS + [SLOW] * STEPS
    assert [entry[:3] for entry in events_of(steps)] == [
        (STEPS, "straggler", 2),
        (STEPS + 30 + ENOUGH, "recovered", 2),
        (STEPS + 30 + STEPS + ENOUGH, "straggler", 2),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert "warning: rank 2 on c is slow: its part of a step took 2.0 times the median" in lines[0]
    assert "note: rank 2 on c is as fast as the others again" in lines[1]


@pytest.mark.parametrize("place", [0, 7, STEPS - 1])
def test_two_good_steps_do_not_hide_it(place):
    steps = [SLOW] * STEPS
    steps[place] = steps[place - 1] = EVEN
    assert [entry[:3] for entry in events_of(steps)] == [(STEPS, "straggler", 2)]


@pytest.mark.parametrize("steps", [[SLOW] * (STEPS - 1), [EVEN] * 100, ([SLOW] * (ENOUGH - 1) + [EVEN] * 3) * 4])
def test_a_hiccup_is_not_named(steps):
    assert events_of(steps) == []


def test_a_rank_at_the_limit_is_named_once():
    steps = [SLOW] * STEPS + ([SLOW] * 10 + [EVEN] * 10) * 5
    assert [entry[1] for entry in events_of(steps)] == ["straggler"]


def test_of_two_ranks_the_slower_is_compared_with_the_faster():
    assert [rank for _, _, rank, _ in events_of([(1.6, 1.0)] * STEPS)] == [0]


def test_metrics_of_a_step():
    assert pace(SLOW) == {"ranks/own_ms_median": 1000.0, "ranks/own_ms_slowest": 2000.0, "ranks/slowest": 2.0}
    assert pace((1.0,)) == {}
