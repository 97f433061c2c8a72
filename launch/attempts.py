"""What a run directory says about earlier attempts, and what a launcher adds to it.

The launcher writes to the same events.jsonl as rank 0, but only while no rank runs: `launch` before an attempt, `end`
after it. A `launch` without its `end` was lost together with the host of the launcher.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launch.decide import Attempt, Decision, Done, GiveUp, Requeue, decide
from launch.supervise import Ending
from trainer.checkpoint.verify import committed_steps
from trainer.config.load import config_as_yaml
from trainer.config.schema import Config
from trainer.durable import write_errors, write_file
from trainer.errors import PeerLostError, RunLockedError
from trainer.observe.ledger import JsonLines, read_lines
from trainer.run_directory import RunDirectory

RELEASE_SECONDS = 20.0


def newest_step(run: RunDirectory) -> int:
    """The newest committed step, not verified; 0 when there is none."""
    return next(iter(committed_steps(run.checkpoints)), 0)


def is_finished(run: RunDirectory, config: Config) -> bool:
    """Whether the run is complete for exactly this configuration.

    With any other configuration the ranks decide: more steps go on, other data is refused.
    """
    try:
        outcome = json.loads(run.outcome.read_text())
        return (
            outcome["status"] == "done"
            and outcome["step"] >= config.train.max_steps
            and run.config.read_text() == config_as_yaml(config)
            and newest_step(run) >= config.train.max_steps
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def ended(
    run: RunDirectory, config: Config, exit_code: int, asked_by: Literal["nobody", "scheduler", "person"]
) -> Attempt:
    """The attempt that has just ended, as the run directory shows it. No rank may be alive."""
    return Attempt(
        exit_code=exit_code,
        committed=newest_step(run),
        saved=run.stopped.exists(),
        finished=is_finished(run, config),
        asked_by=asked_by,
    )


def record_launch(run: RunDirectory, job: str, **details: Any) -> None:
    """Note that an attempt of `job` begins. Raises CannotWriteError."""
    _record(run, {"event": "launch", "job": job, "step": newest_step(run), **details})


def record_end(run: RunDirectory, job: str, attempt: Attempt, blamed: str, decision: Decision) -> None:
    """Note how an attempt of `job` ended, who is blamed for it, and what comes next. Raises CannotWriteError.

    A rank that was killed keeps its lock until the kernel has freed its memory: that is waited for.
    """
    end = time.monotonic() + RELEASE_SECONDS
    while attempt.exit_code != RunLockedError.exit_code and run.in_use() and time.monotonic() < end:
        time.sleep(0.1)
    entry = {
        "event": "end",
        "job": job,
        "step": attempt.committed,
        "exit_code": attempt.exit_code,
        "saved": attempt.saved,
        "asked_by": attempt.asked_by,
        "blamed": blamed,
        "decision": "requeue" if isinstance(decision, Requeue) else type(decision).__name__.lower(),
        "why": getattr(decision, "why", ""),
    }
    _record(run, entry)


def earlier_attempts(run: RunDirectory, job: str) -> list[Attempt]:
    """Attempts of `job` that have ended, oldest first; of one that was lost only its checkpoint is known."""
    attempts: list[Attempt] = []
    running = False
    for entry in read_lines(run.events):
        if entry.get("job") != job:
            continue
        if entry["event"] == "launch":
            if running:
                attempts.append(_lost(entry["step"]))
            running = True
        elif entry["event"] == "end":
            running = False
            attempts.append(Attempt(entry["exit_code"], entry["step"], entry["saved"], False, entry["asked_by"]))
    return [*attempts, _lost(newest_step(run))] if running else attempts


def write_reference(run: RunDirectory, reference: dict[str, Any]) -> None:
    """Leave in the run directory where this run was launched, for `launch status`, `logs` and `stop`.

    A directory in use keeps its own. Raises CannotWriteError.
    """
    if run.in_use():
        return
    with write_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    write_file(run.launched, json.dumps(reference, indent=1) + "\n")


def run_with_restarts(attempt: Callable[[], Ending], config: Config, max_restarts: int) -> int:
    """Call `attempt` until it is done, is given up or was asked to stop; returns the exit code of the run.

    With `max_restarts` 0 it is called once. A restart is said on stderr and noted in events.jsonl.
    """
    if max_restarts == 0:
        return attempt().code
    run = RunDirectory(Path(config.run.dir))
    job = f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
    history: list[Attempt] = []
    while True:
        record_launch(run, job)
        ending = attempt()
        history.append(ended(run, config, ending.code, "person" if ending.asked else "nobody"))
        decision = decide(history, max_restarts=max_restarts)
        record_end(run, job, history[-1], ending.blamed, decision)
        if isinstance(decision, Done):
            return 0
        if isinstance(decision, GiveUp):
            if ending.code and not ending.asked:
                sys.stderr.write(f"giving up: {decision.why}\n")
            return decision.exit_code
        sys.stderr.write(f"starting again: {decision.why}\n")


def _lost(step: int) -> Attempt:
    return Attempt(PeerLostError.exit_code, step, asked_by="scheduler")


def _record(run: RunDirectory, entry: dict[str, Any]) -> None:
    if run.in_use():
        # Another run is writing there; this one is about to be refused.
        return
    ledger = JsonLines(run.events, durable=True)
    try:
        ledger.append({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry})
    finally:
        ledger.close()
