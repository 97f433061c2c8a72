"""Learning-rate schedules at their corner points."""

import pytest

from trainer.config.schema import Schedule
from trainer.optim.schedules import share_of_peak


def test_warm_up_starts_moving_and_ends_at_the_peak():
    share = share_of_peak(Schedule(type="constant", warmup_steps=4), max_steps=10)
    assert [share(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_ends_exactly_at_the_final_ratio(kind):
    share = share_of_peak(Schedule(type=kind, warmup_steps=2, final_ratio=0.1), max_steps=12)
    values = [share(step) for step in range(12)]
    assert values[2] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values[2:] == sorted(values[2:], reverse=True)
    assert share(50) == pytest.approx(0.1)


def test_one_step_runs_have_a_learning_rate():
    assert share_of_peak(Schedule(), max_steps=1)(0) > 0
