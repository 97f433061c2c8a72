"""What follows an attempt: every rule of `decide`, and the history it reads from a run directory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.attempts import earlier_attempts, ended, is_finished, record_end, record_launch, run_with_restarts
from launch.decide import CRASHES_ALLOWED, FRUITLESS_ALLOWED, REFUSALS, Attempt, Done, GiveUp, Requeue, decide
from launch.supervise import MEANINGS, Ending
from tests.support.training import settings
from trainer.checkpoint.verify import step_directory
from trainer.config.load import config_as_yaml
from trainer.config.schema import Config
from trainer.run_directory import RunDirectory

CRASH = Attempt(69, 10)
PREEMPTED = Attempt(75, 10, saved=True, asked_by="scheduler")
LOST = Attempt(69, 10, asked_by="scheduler")


def crash(step: int, code: int = 69) -> Attempt:
    return Attempt(code, step)


def test_a_complete_run_is_done() -> None:
    assert decide([Attempt(0, 20, finished=True)]) == Done()


def test_an_agreed_stop_of_the_scheduler_is_requeued_although_all_ranks_ended_with_0() -> None:
    assert isinstance(decide([Attempt(0, 10, saved=True, asked_by="scheduler")]), Requeue)
    assert isinstance(decide([PREEMPTED]), Requeue)


def test_the_marker_wins_over_an_exit_code_from_the_way_out() -> None:
    """The first rank that left a committed stop badly, or srun's highest code, does not undo the commit."""
    for code in (69, 70, 85, 143):
        assert isinstance(decide([Attempt(code, 10, saved=True, asked_by="scheduler")]), Requeue)


def test_no_exit_code_means_preempted() -> None:
    """A code of 75 or 85 without a marker is a crash like any other: it is not restarted for ever."""
    for code in (75, 85):
        history = [Attempt(code, 10)] * CRASHES_ALLOWED
        assert isinstance(decide(history), Requeue)
        assert isinstance(decide([*history, Attempt(code, 10)]), GiveUp)


def test_preemptions_are_not_counted_as_crashes() -> None:
    preempted = [Attempt(75, step, saved=True, asked_by="scheduler") for step in range(10, 110)]
    assert isinstance(decide(preempted), Requeue)
    assert isinstance(decide([*preempted, crash(110)]), Requeue)


def test_a_stop_that_a_person_asked_for_ends_the_job() -> None:
    assert decide([Attempt(75, 10, saved=True, asked_by="person")]) == GiveUp(
        75, "stopped on request at step 10, which is committed"
    )
    # Somebody signalled a rank directly: not the scheduler's wish either.
    assert isinstance(decide([Attempt(75, 10, saved=True)]), GiveUp)
    unsaved = decide([Attempt(69, 10, asked_by="person")])
    assert unsaved == GiveUp(69, "it was asked to stop, and could not save; step 10 is committed")


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_what_would_end_the_same_way_is_never_restarted(code: int) -> None:
    decision = decide([Attempt(code, 10)])
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == code
    assert MEANINGS[code] in decision.why
    # Nor is a refusal taken for success because an older configuration of the run was complete.
    assert isinstance(decide([Attempt(code, 20, finished=True)]), GiveUp)


def test_every_exit_code_is_either_refused_or_restartable() -> None:
    assert set(REFUSALS) == {2, 65, 66, 73, 74, 76, 78, 130}
    assert {code for code in MEANINGS if isinstance(decide([Attempt(code, 10)]), Requeue)} == {69, 70, 71, 75}
    assert set(MEANINGS) == set(REFUSALS) | {69, 70, 71, 75, 77}


def test_a_crash_is_restarted_twice_from_the_same_checkpoint() -> None:
    assert decide([crash(10)]) == Requeue("lost a rank; restart 1 of at most 2 from step 10")
    assert decide([crash(10), crash(10, 70)]) == Requeue(
        "failed with exit code 70; restart 2 of at most 2 from step 10"
    )
    assert decide([crash(10), crash(10, 70), crash(10, 71)]) == GiveUp(71, "crashed 3 times at step 10")
    assert decide([crash(0)] * 3) == GiveUp(69, "crashed 3 times at the beginning")


def test_progress_gives_new_restarts() -> None:
    assert isinstance(decide([crash(10), crash(10), crash(12)]), Requeue)
    assert isinstance(decide([crash(10), crash(10), crash(12), crash(12), crash(12)]), GiveUp)


def test_lost_nodes_in_between_are_not_counted_and_reset_nothing() -> None:
    assert isinstance(decide([LOST, LOST, LOST, crash(10)]), Requeue)
    assert isinstance(decide([crash(10), LOST, crash(10), LOST, crash(10)]), GiveUp)


def test_interruptions_without_any_progress_end_at_last() -> None:
    assert isinstance(decide([LOST] * FRUITLESS_ALLOWED), Requeue)
    assert isinstance(decide([LOST] * (FRUITLESS_ALLOWED + 1)), GiveUp)


def test_a_locked_run_directory_is_refused_at_first_and_tried_again_later() -> None:
    """After a lost host its lock may stay on the file server for a while."""
    assert isinstance(decide([Attempt(77, 10)]), GiveUp)
    assert isinstance(decide([LOST, Attempt(77, 10)]), Requeue)
    assert isinstance(decide([LOST, *[Attempt(77, 10)] * 3]), GiveUp)


def test_what_breaks_after_the_last_commit_does_not_matter() -> None:
    assert decide([Attempt(69, 20, finished=True)]) == Done()


def test_success_that_the_run_directory_does_not_know_of_is_no_success() -> None:
    decision = decide([Attempt(0, 10)])
    assert isinstance(decision, GiveUp)
    assert decision.exit_code == 70


def test_restarts_have_a_bound_of_their_own() -> None:
    assert isinstance(decide([crash(10)], max_restarts=1), Requeue)
    assert decide([crash(10), crash(20)], max_restarts=1) == GiveUp(69, "no restart is left of 1")
    assert decide([PREEMPTED], max_restarts=0) == GiveUp(75, "no restart is left of 0")
    assert decide([Attempt(0, 20, finished=True)], max_restarts=0) == Done()


def config_of(run: Path, **changes: object) -> Config:
    return Config.model_validate(settings(run, run.parent, train__max_steps=20) | changes)


def complete(run: RunDirectory, config: Config, step: int = 20) -> None:
    step_directory(run.checkpoints, step).mkdir(parents=True)
    run.config.write_text(config_as_yaml(config))
    run.outcome.write_text(json.dumps({"status": "done", "step": step}))


def test_only_the_configuration_that_was_trained_is_finished(tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path / "run"), config_of(tmp_path / "run")
    assert not is_finished(run, config)
    complete(run, config)
    assert is_finished(run, config)
    more = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 30})})
    other_data = config.model_copy(update={"data": config.data.model_copy(update={"train": "other"})})
    assert not is_finished(run, more)
    assert not is_finished(run, other_data)
    for broken in ('{"status": "failed"}', "{", "[]"):
        run.outcome.write_text(broken)
        assert not is_finished(run, config)


def test_a_marker_of_an_earlier_start_is_forgotten(tmp_path: Path) -> None:
    """An attempt that dies before rank 0 removes the marker must not look as if it had stopped on request."""
    run, config = RunDirectory(tmp_path / "run"), config_of(tmp_path / "run")
    run.path.mkdir()
    run.stopped.write_text("{}")
    assert ended(run, config, 69, "nobody").saved
    run.forget_last_start()
    assert not ended(run, config, 69, "nobody").saved


def test_history_is_that_of_the_job_and_knows_lost_attempts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert earlier_attempts(run, "7") == []
    record_launch(run, "6")
    record_end(run, "6", Attempt(70, 0), "rank 0", GiveUp(70, "why"))
    record_launch(run, "7")
    record_end(run, "7", Attempt(70, 0), "rank 1", Requeue("why"))
    record_launch(run, "7")
    step_directory(run.checkpoints, 5).mkdir(parents=True)
    assert earlier_attempts(run, "7") == [Attempt(70, 0), Attempt(69, 5, asked_by="scheduler")]
    record_launch(run, "7")
    step_directory(run.checkpoints, 9).mkdir(parents=True)
    assert [attempt.committed for attempt in earlier_attempts(run, "7")] == [0, 5, 9]
    # A host that died while it wrote leaves half a line behind, and the next entry must not be lost with it.
    with run.events.open("a") as stream:
        stream.write('{"event": "commit", "st')
    record_end(run, "7", Attempt(75, 9, saved=True, asked_by="scheduler"), "", Requeue("why"))
    assert earlier_attempts(run, "7")[-1] == Attempt(75, 9, saved=True, asked_by="scheduler")


def test_nothing_is_written_into_a_directory_in_use(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        record_launch(run, "7")
        assert not run.events.exists()
    record_launch(run, "7")
    assert run.events.exists()


def test_the_end_is_noted_although_a_killed_rank_still_holds_its_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    lock = run.lock()
    timer = threading.Timer(0.5, lock.close)
    timer.start()
    record_end(run, "7", Attempt(69, 0), "", Requeue("why"))
    timer.join()
    assert earlier_attempts(run, "7") == [Attempt(69, 0)]


def test_local_restarts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = RunDirectory(tmp_path / "run"), config_of(tmp_path / "run")

    def restarted(max_restarts: int, *endings: Ending) -> tuple[int, int]:
        left = list(endings)

        def attempt() -> Ending:
            ending = left.pop(0)
            if ending.code == 0:
                complete(run, config)
            return ending

        return run_with_restarts(attempt, config, max_restarts), len(endings) - len(left)

    assert restarted(0, Ending(69), Ending(0)) == (69, 1)
    assert restarted(1, Ending(69), Ending(70), Ending(0)) == (70, 2)
    assert restarted(9, Ending(65), Ending(0)) == (65, 1)
    assert restarted(9, Ending(69, asked="SIGINT"), Ending(0)) == (69, 1)
    assert restarted(9, Ending(69), Ending(69), Ending(69), Ending(0)) == (69, 3)
    assert "giving up: crashed 3 times at the beginning" in capsys.readouterr().err
    assert restarted(9, Ending(71), Ending(0)) == (0, 2)
    assert "starting again: failed with exit code 71; restart 1 of at most 2" in capsys.readouterr().err
    ends = [entry for entry in map(json.loads, run.events.read_text().splitlines()) if entry["event"] == "end"]
    assert [entry["decision"] for entry in ends[-2:]] == ["requeue", "done"]


def test_deciding_imports_no_torch() -> None:
    code = "import sys, launch.attempts; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
