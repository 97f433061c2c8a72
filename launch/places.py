"""What can be done with a run that was launched, wherever that was: status, logs, stop.

The launcher leaves launched.json in the run directory: the name of its place and what that place needs to find the run
again. A place is a module with three functions:

    state(reference) -> str                     one line
    logs(reference, *, lines, follow) -> int    show the output; an exit code
    stop(reference, *, graceful) -> str         end the run, at once or after an agreed checkpoint; what was done
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.attempts import newest_step
from trainer.errors import MissingInputError
from trainer.observe.ledger import read_lines
from trainer.run_directory import RunDirectory

PLACES = {"local": "launch.local_place", "slurm": "launch.slurm.place", "ray": "launch.ray.place"}


def reference_of(run: RunDirectory) -> dict[str, Any]:
    """Where the run was launched last. Raises MissingInputError when nothing says so."""
    try:
        reference = json.loads(run.launched.read_text())
        if reference["place"] in PLACES:
            return dict(reference)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise MissingInputError(
        f"{run.path} does not say where it was launched", "give the run directory of a run that was launched"
    )


def place_of(reference: dict[str, Any]) -> Any:
    """The module that knows the place of a run."""
    return import_module(PLACES[reference["place"]])


def status_of(run: RunDirectory) -> dict[str, Any]:
    """Where the run is, how far it came, and how its attempts ended."""
    reference = reference_of(run)
    # Asked first: of a run that has ended, the files below are complete.
    state = place_of(reference).state(reference)
    newest = {}
    for entry in read_lines(run.metrics):
        if "train/loss" in entry:
            newest = entry
    ends = [entry for entry in read_lines(run.events) if entry["event"] == "end"]
    return {
        "run": str(run.path),
        "state": state,
        "reference": reference,
        "outcome": _read(run.outcome).get("status", "none yet"),
        "step": newest.get("step", 0),
        "max_steps": _read(run.plan).get("max_steps"),
        "loss": newest.get("train/loss"),
        "committed": newest_step(run),
        "attempts": [
            {name: entry[name] for name in ("time", "exit_code", "step", "blamed", "decision", "why")} for entry in ends
        ],
    }


def status_lines(status: dict[str, Any]) -> list[str]:
    """The status as a person reads it."""
    loss = "" if status["loss"] is None else f", loss {status['loss']:.4f}"
    lines = [
        f"{status['run']}: {status['state']}",
        f"outcome: {status['outcome']}; step {status['step']} of {status['max_steps'] or '?'}{loss}; "
        f"committed: step {status['committed']}",
    ]
    for number, end in enumerate(status["attempts"], start=1):
        blamed = f"; {end['blamed']}" if end["blamed"] else ""
        lines.append(
            f"attempt {number} ended {end['time'][:19]} at committed step {end['step']} with exit code "
            f"{end['exit_code']}{blamed}; {end['decision']}{': ' + end['why'] if end['why'] else ''}"
        )
    return lines


def show_file(path: str, *, lines: int, follow: bool) -> int:
    """Show the end of a file as tail does; with `follow`, until interrupted."""
    if not Path(path).is_file() and not follow:
        raise MissingInputError(f"there is no output {path} yet", "the run may still be waiting: see launch status")
    os.execvp("tail", ["tail", f"--lines={lines}", *(["--follow=name", "--retry"] if follow else []), path])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
