"""Drills: what they plan, and what they find wrong. The attempts here are small processes of their own."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

import tools.drills.attempt as attempts
import tools.drills.run as drill_run
from steadfast import main
from tools.drills.attempt import attempt, can_mount, empty, fill, signal_launcher, small_disk
from tools.drills.plan import KINDS, PHASES, SAVE_EVERY, STRETCH, plan_drill, steps_of
from trainer.errors import UsageError
from trainer.observe.faults import fail_at
from trainer.run_directory import RunDirectory

CONFIG = "run: {dir: here}\nmodel: {config: {model_type: llama}}\ndata: {train: store}\ntrain: {max_steps: 9}\n"


def strikes(*arguments, **named):
    return [strike for each in plan_drill(*arguments, **named) for strike in each.strikes]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("small", [True, False])
def test_a_plan_can_be_carried_out(seed, small):
    rounds = plan_drill(KINDS, 23, seed, 2, small_disk=small)
    assert rounds == plan_drill(KINDS, 23, seed, 2, small_disk=small)
    assert sum(len(each.strikes) for each in rounds) == 23
    faults = [fault for each in rounds for strike in each.strikes for fault in strike.faults]
    for each in rounds:
        told = [fault for strike in each.strikes for fault in strike.faults]
        assert len(set(told)) == len(told)
        kinds = [strike.kind for strike in each.strikes]
        assert "nan" not in kinds or set(kinds) == {"nan"}
        assert "enospc" not in kinds[:-1]
        inside = [strike.step for strike in each.strikes if strike.step]
        assert all(later - earlier >= 2 for earlier, later in pairwise(inside))
        assert not inside or (min(inside) > 2 * SAVE_EVERY + 1 and max(inside) <= steps_of(rounds) - SAVE_EVERY)
        for strike in each.strikes:
            if strike.phase == "evaluate" or strike.phase.startswith("save"):
                assert strike.step % SAVE_EVERY == 0
            if each.background and strike.kind == "flip" and strike.step:
                assert strike.step % STRETCH != 2, "the save before may not be committed yet"
    assert {fault.rank for fault in faults} == {0, 1}


def test_what_may_be_lost_follows_from_the_saves_that_are():
    kill, flip, full = (
        next(strike for strike in strikes(KINDS, 60, 1, 2, small_disk=True) if strike.kind == kind)
        for kind in ("kill", "flip", "enospc")
    )
    # The third save in a row that fails ends the run.
    assert [strike.most_lost(background=False) for strike in (kill, flip, full)] == [2, 4, 6]
    assert [strike.most_lost(background=True) for strike in (kill, flip, full)] == [4, 6, 8]


def test_every_kind_victim_and_phase_comes():
    many = strikes(KINDS, 600, 1, 2, small_disk=True)
    assert {strike.kind for strike in many} == set(KINDS)
    assert {strike.victim for strike in many} == {"rank 0", "rank 1", "all ranks", "launcher"}
    assert {phase for phases in PHASES.values() for phase in phases} <= {strike.phase for strike in many}
    assert {
        kind for kind in KINDS if any(strike.kind == kind for strike in strikes(KINDS, 6, 3, 2, small_disk=False))
    } == set(KINDS)


@pytest.mark.parametrize(("kinds", "count"), [(["explode"], 3), (["kill"], 0), ([], 3)])
def test_what_cannot_be_planned_is_refused(kinds, count):
    with pytest.raises(UsageError):
        plan_drill(kinds, count, 1, 2, small_disk=False)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def noted(run: RunDirectory, fault) -> str:
    """Code that says that `fault` fired."""
    line = json.dumps({"event": "fault injected", **vars(fault)})
    return f"open({str(run.path / 'faults.jsonl')!r}, 'a').write({line + chr(10)!r})\n"


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    return directory


def test_a_fault_that_never_fired_is_a_problem(tmp_path, run):
    ended = attempt(python("pass"), run, tmp_path / "log", [fail_at(0, "step", 3)])
    assert (ended.code, ended.problem) == (0, "the fault never fired")
    fault = fail_at(0, "step", 4)
    ended = attempt(python(noted(run, fault)), run, tmp_path / "log", [fault])
    assert (ended.code, ended.problem) == (0, "")


def test_where_all_ranks_are_struck_one_may_take_the_others_down(tmp_path, run):
    both = [fail_at(0, "step", 3), fail_at(1, "step", 3)]
    assert attempt(python(noted(run, both[0])), run, tmp_path / "log", both, one_is_enough=True).problem == ""
    other = [fail_at(0, "step", 4), fail_at(1, "step", 4)]
    assert attempt(python("pass"), run, tmp_path / "log", other, one_is_enough=True).problem == "the fault never fired"
    assert attempt(python(noted(run, other[0])), run, tmp_path / "log", other).problem == "the fault never fired"


def test_a_strike_comes_once_the_fault_has_fired_and_the_last_words_are_kept(tmp_path, run):
    fault = fail_at(0, "step", 3, "sleep")
    code = "import sys, time\nsys.stderr.write('first\\nlast words\\n')\nsys.stderr.flush()\n" + noted(run, fault)
    ended = attempt(
        python(code + "time.sleep(60)"), run, tmp_path / "log", [fault], signal_launcher(signal.SIGKILL)
    )  # fmt: skip
    assert (ended.code, ended.said, ended.problem) == (-9, "last words", "")


def test_an_attempt_that_hangs_is_ended_and_is_a_problem(tmp_path, run, monkeypatch):
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 0.3)
    ended = attempt(python("import time; time.sleep(60)"), run, tmp_path / "log")
    assert "did not end within" in ended.problem


def test_ranks_that_outlive_their_launcher_are_a_problem(tmp_path, run, monkeypatch):
    monkeypatch.setattr(attempts, "ORPHAN_SECONDS", 0.3)
    lock = str(run.path / "lock")
    child = subprocess.Popen(
        python(f"import fcntl, time; s = open({lock!r}, 'w'); fcntl.flock(s, fcntl.LOCK_EX); time.sleep(60)")
    )
    try:
        while not run.in_use():
            assert child.poll() is None
            time.sleep(0.01)
        assert attempt(python("pass"), run, tmp_path / "log").problem == "ranks outlived their launcher"
    finally:
        child.kill()
        child.wait()


def test_a_disk_is_filled_and_emptied_and_what_lay_there_stays(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount a tmpfs")
    place = tmp_path / "checkpoints"
    with small_disk(place, 1 << 20):
        (place / "kept").write_text("here")
        fill(place)(None)
        with pytest.raises(OSError, match="No space left"):
            (place / "more").write_bytes(bytes(1 << 16))
        empty(place)
        (place / "more").write_bytes(bytes(1 << 16))
    assert sorted(path.name for path in place.iterdir()) == ["kept", "more"]
    assert not place.is_mount()


@pytest.mark.parametrize(("problem", "equal", "code"), [("", True, 0), ("lost", True, 1), ("", False, 1)])
def test_one_fault_that_was_not_survived_fails_the_drill(tmp_path, monkeypatch, capsys, problem, equal, code):
    row = drill_run.Row(1, "kill", "rank 0", "step", 8, "said", 69, 7, 6, 1, problem, equal)
    monkeypatch.setattr(drill_run, "carry_out", lambda job, rounds, seed, say: [row])
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG)
    assert (
        main(["drill", str(config), "--faults", "kill", "--count", "1", "--json", "--out", str(tmp_path / "o")]) == code
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] == (code == 0)
    assert answer["faults"][0]["lost_steps"] == 1
