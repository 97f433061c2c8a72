"""When checkpoints are due: fixed, or as the measured costs advise, the same on all ranks."""

import pytest
from pydantic import ValidationError

from trainer.config.schema import Checkpoint
from trainer.observe.interval import save_schedule


class Advised:
    """Advises what it is told."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def advised_steps(self):
        return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]


def due(schedule, begin, end):
    return [step for step in range(begin + 1, end + 1) if schedule(step)]


def alone(values):
    return list(values)


def test_a_number_of_steps_counts_from_the_beginning_of_the_run():
    assert due(save_schedule(Checkpoint(every_steps=4), 6, alone, None), 6, 17) == [8, 12, 16]


def test_auto_saves_early_once_and_then_as_advised_within_bounds():
    settings = Checkpoint(every_steps="auto", auto_at_least=5, auto_at_most=40)
    schedule = save_schedule(settings, 100, alone, Advised(None, 12, 1, 900, 20))
    assert due(schedule, 100, 200) == [105, 117, 122, 162, 182]


def test_all_ranks_agree_with_rank_0():
    """Three ranks in turn; the sum is what each of them gets."""
    settings = Checkpoint(every_steps="auto", auto_at_least=2, auto_at_most=100)
    said = []

    def rank_0(values):
        said.append(values[0])
        return alone(values)

    first = due(save_schedule(settings, 0, rank_0, Advised(None, 7, 30)), 0, 50)
    for _ in range(2):
        heard = iter(said)

        def another(values, heard=heard):
            assert values == [0.0]
            return [next(heard)]

        assert due(save_schedule(settings, 0, another, None), 0, 50) == first == [2, 9, 39]


@pytest.mark.parametrize(
    "values", [{"every_steps": "often"}, {"every_steps": 0}, {"auto_at_least": 9, "auto_at_most": 8}]
)
def test_what_makes_no_sense_is_refused(values):
    with pytest.raises(ValidationError):
        Checkpoint(**values)
