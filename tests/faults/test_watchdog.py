"""Real ranks that hang: the one that holds up the run is named with its phase, all stacks are kept, the code is 71."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.training import settings
from trainer.observe.faults import FAULTS, as_text, fail_at, not_fired

ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 3


class ForkServer:
    """Starts runs whose ranks are forked from a warm process."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "fork_ranks.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, place: Path, faults=(), *, ranks: int = 2, before: str | None = None, overrides=()):
        """(exit codes, stderr of each rank) of one run in place/run."""
        request = {
            "config": str(self._config), "overrides": [f"run.dir={place / 'run'}", *overrides],
            "environ": {FAULTS: as_text(faults)}, "ranks": ranks, "output": str(place), "before": before,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())["codes"]
        assert not_fired(place / "run", faults) == []
        return codes, [(place / f"{rank}.err").read_text() for rank in range(ranks)]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory, store):
    config = tmp_path_factory.mktemp("watchdog") / "c.yaml"
    values = settings(Path("unused"), store.path, engine__hang_seconds=HANG_SECONDS, train__max_steps=8)
    config.write_text(yaml.safe_dump(values))
    started = ForkServer(config)
    yield started
    started.close()


def verdict(place: Path, outputs: list[str]) -> tuple[list[int], str]:
    """The ranks that are blamed and the sentence, which every rank has said."""
    hang = json.loads((place / "run" / "errors" / "hang.json").read_text())
    for output in outputs:
        assert f"error: {hang['verdict']}; the stacks of all ranks are in" in output
    return hang["ranks"], hang["verdict"]


def test_a_rank_that_sleeps_in_the_data_path(tmp_path, server):
    codes, outputs = server.run(tmp_path, [fail_at(1, "data", 4, "sleep")])
    assert codes == [71, 71]
    ranks, sentence = verdict(tmp_path, outputs)
    assert ranks == [1]
    assert "rank 1 on " in sentence
    assert "is behind: data of step 4, at observe/faults.py" in sentence
    assert "; rank 0 waits in backward of step 4, in all_reduce called at zero/stage_1_and_2.py" in sentence
    stacks = [(tmp_path / "run" / "errors" / f"rank-{rank}.stacks.txt").read_text() for rank in (0, 1)]
    assert "in all_reduce" in stacks[0]
    assert "in next_step" not in stacks[1]
    assert "in fit" in stacks[1]


def test_a_stopped_rank(tmp_path, server):
    codes, outputs = server.run(tmp_path, [fail_at(0, "backward", 5, "stop")])
    assert codes == [-signal.SIGKILL, 71]
    ranks, sentence = verdict(tmp_path, outputs)
    assert ranks == [0]
    assert "is stopped (SIGSTOP, a debugger or the scheduler): backward of step 5" in sentence


def test_a_rank_that_never_lets_go_of_the_interpreter(tmp_path, server):
    codes, outputs = server.run(tmp_path, [fail_at(1, "forward", 4, "spin")])
    assert codes == [71, -signal.SIGKILL]
    ranks, sentence = verdict(tmp_path, outputs)
    assert ranks == [1]
    assert "is behind: forward of step 4, at re/__init__.py" in sentence


def test_collectives_that_do_not_match(tmp_path, server):
    codes, outputs = server.run(tmp_path, before="tests.support.hangs:mismatched_collectives")
    assert codes == [71, 71]
    _, sentence = verdict(tmp_path, outputs)
    assert "collectives that do not match" in sentence
    assert "in all_reduce called at trainer/collectives.py" in sentence
    assert "in all_gather called at support/hangs.py" in sentence


def test_a_hang_before_a_save_of_three_ranks(tmp_path, server):
    codes, outputs = server.run(
        tmp_path, [fail_at(2, "observe", 3, "sleep")], ranks=3, overrides=["train.micro_batch_size=1"]
    )
    assert codes == [71, 71, 71]
    ranks, sentence = verdict(tmp_path, outputs)
    assert ranks == [2]
    assert "is behind: observe of step 3" in sentence


def test_a_slow_rank_is_named_and_the_run_goes_on(tmp_path, server):
    faults = [fail_at(1, "data", step, "sleep", 1.5) for step in range(3, 7)]
    codes, outputs = server.run(tmp_path, faults, before="tests.support.hangs:impatient")
    assert codes == [0, 0]
    assert "warning: rank 1 on " in outputs[0]
    assert " in the 3 steps up to step " in outputs[0]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    # On a busy machine it may have been slow by itself in a step or two before the fault.
    assert [event["rank"] for event in events if event["event"] == "straggler" and 3 <= event["step"] <= 5] == [1]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    slowest = {entry["step"]: entry["ranks/slowest"] for entry in metrics if "ranks/slowest" in entry}
    assert [slowest[step] for step in range(3, 7)] == [1.0] * 4


def test_a_run_that_another_start_took_over_ends_with_77_on_all_ranks(tmp_path, server):
    overrides = ["checkpoint.every_steps=2", "train.max_steps=400"]
    codes, outputs = server.run(tmp_path, before="tests.support.takeover:before_the_second_save", overrides=overrides)
    assert codes == [77, 77]
    assert all("was taken over by pid 1234 on node007" in output for output in outputs)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_a_launcher_says_71_when_its_only_rank_had_to_be_killed(tmp_path, store):
    config = tmp_path / "c.yaml"
    run = tmp_path / "run"
    config.write_text(yaml.safe_dump(settings(run, store.path, engine__hang_seconds=HANG_SECONDS)))
    done = subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "train", str(config)],
        capture_output=True, text=True, env=os.environ | {FAULTS: as_text([fail_at(0, "step", 3, "spin")])},
    )  # fmt: skip
    assert done.returncode == 71, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: rank 0 on ")
    assert "does not move: step of step 3" in last
    assert "start the same command again" in last


def test_a_killed_run_that_starts_again_gets_past_the_fault(tmp_path, server):
    faults = [fail_at(1, "backward", 4, "kill")]
    codes, _ = server.run(tmp_path, faults)
    assert codes == [69, -signal.SIGKILL]
    codes, outputs = server.run(tmp_path, faults)
    assert codes == [0, 0], outputs
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "done"


def test_no_watchdog_outlives_its_rank(tmp_path, server):
    server.run(tmp_path, [fail_at(1, "step", 3, "kill"), fail_at(0, "step", 3, "kill")])
    deadline = time.monotonic() + 5
    while any(str(tmp_path).encode() in text for text in command_lines()):
        assert time.monotonic() < deadline, "a watchdog outlived its rank"
        time.sleep(0.05)


def command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found.append((entry / "cmdline").read_bytes())
            except OSError:
                continue
    return found
