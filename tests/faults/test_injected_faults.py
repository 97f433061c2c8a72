"""The fault injector itself: each kind does what it says, once in the life of a run directory, and says so before."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import UsageError
from trainer.observe.faults import FAULTS, Faults, as_text, fail_at, fired, not_fired, planned

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_travels_as_text():
    faults = [fail_at(1, "backward", 7), fail_at(0, "save:rename", 4, "sleep", 2.5), fail_at(0, "step", 2, after=0.1)]
    assert planned({FAULTS: as_text(faults)}) == faults
    assert planned({}) == []


@pytest.mark.parametrize("text", ["{", "[1]", '[{"rank": 1}]', as_text([fail_at(0, "x", 1, "explode")])])
def test_a_plan_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match=FAULTS):
        planned({FAULTS: text})


def test_a_fault_fires_once_for_its_rank_phase_and_step(tmp_path):
    faults = [fail_at(0, "data", 2, "raise"), fail_at(1, "data", 2, "raise")]
    armed = Faults(faults, 0, tmp_path)
    armed("data", 1)
    armed("forward", 2)
    assert not_fired(tmp_path, faults) == faults
    with pytest.raises(RuntimeError, match="injected on rank 0 at data of step 2"):
        armed("data", 2)
    armed("data", 2)
    Faults(faults, 0, tmp_path)("data", 2)
    assert fired(tmp_path) == faults[:1]
    assert not_fired(tmp_path, faults) == faults[1:]


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
@pytest.mark.parametrize("after", [0.0, 0.01])
def test_signals_end_the_process_after_the_line_was_written(kind, number, after, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from trainer.observe.faults import *\n"
        f"Faults([fail_at(0, 'step', 3, '{kind}', after={after})], 0, Path(sys.argv[1]))('step', 3); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -number
    assert [fault.kind for fault in fired(tmp_path)] == [kind]
