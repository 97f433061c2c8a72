"""Slow ranks are named after twenty slow steps in a row, once, and not for a hiccup."""

import pytest

from trainer.observe.stragglers import STEPS, STEPS_BETWEEN, Stragglers, pace
from trainer.state import StepResult, TrainState

HOSTS = ["a", "b", "c", "d"]


def events_of(steps: list[tuple[float, ...]]) -> list[tuple[int, int, float]]:
    found = []
    watch = Stragglers(HOSTS, lambda event, *, step, rank, host, ratio: found.append((step, rank, ratio)))
    for step, times in enumerate(steps, 1):
        watch.on_step(TrainState(step=step), None, result(times), None)
    return found


def result(times: tuple[float, ...]) -> StepResult:
    return StepResult(1.0, 1.0, 1e-3, 10, 10, True, False, 0.0, times)


SLOW, EVEN = (1.0, 1.0, 2.0, 1.1), (1.0, 1.0, 1.4, 1.1)


def test_named_once_after_twenty_steps(capsys):
    assert events_of([SLOW] * (STEPS + 30)) == [(STEPS, 2, 2.0)]
    assert "rank 2 on c is slow: its part of a step took 2.0 times the median" in capsys.readouterr().err


def test_named_again_after_a_thousand_more():
    assert [step for step, _, _ in events_of([SLOW] * (STEPS + STEPS_BETWEEN))] == [STEPS, STEPS + STEPS_BETWEEN]


@pytest.mark.parametrize("steps", [[SLOW] * (STEPS - 1), [EVEN] * 100, ([SLOW] * (STEPS - 1) + [EVEN]) * 4])
def test_a_hiccup_is_not_named(steps):
    assert events_of(steps) == []


def test_of_two_ranks_the_slower_is_compared_with_the_faster():
    assert [rank for _, rank, _ in events_of([(1.6, 1.0)] * STEPS)] == [0]


def test_metrics_of_a_step():
    assert pace(SLOW) == {"ranks/own_ms_median": 1000.0, "ranks/own_ms_slowest": 2000.0, "ranks/slowest": 2.0}
    assert pace((1.0,)) == {}
