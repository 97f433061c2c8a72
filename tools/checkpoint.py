"""List, verify, prune, pin and import checkpoints.

steadfast checkpoint list runs/NAME
steadfast checkpoint verify runs/NAME                      every byte of every checkpoint; 74 when one is damaged
steadfast checkpoint prune runs/NAME --keep 2 --dry-run
steadfast checkpoint pin runs/NAME 1200                    retention never removes it; unpin lets go
steadfast checkpoint import my.yaml old/global_step900 --i-trust-this-file      go on from a DeepSpeed checkpoint

The newest valid checkpoint, the best (lowest evaluation loss) and those that are pinned are never removed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError, MissingInputError, RunLockedError, UsageError

if TYPE_CHECKING:
    from trainer.checkpoint.verify import Manifest


@dataclass(frozen=True)
class Entry:
    """One checkpoint as `list` shows it."""

    step: int
    path: str
    bytes: int
    ranks: int | None
    saved: str | None
    evaluation_loss: float | None
    best: bool
    pinned: bool
    problem: str | None
    """What is wrong at first sight (manifest and sizes); `verify` reads every byte."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = commands.add_parser("list", help="show the checkpoints of a run")
    listing.add_argument("run", type=Path, metavar="RUN")

    verify = commands.add_parser("verify", help="check every byte of a run's checkpoints, or of one")
    verify.add_argument("source", type=Path, metavar="RUN|CHECKPOINT")

    prune = commands.add_parser("prune", help="remove checkpoints beyond the newest ones")
    prune.add_argument("run", type=Path, metavar="RUN")
    prune.add_argument(
        "--keep", type=int, required=True, metavar="N", help="checkpoints that stay, counted from the newest valid"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")

    for name, text in (("pin", "keep a checkpoint whatever retention says"), ("unpin", "let retention remove it")):
        action = commands.add_parser(name, help=text)
        action.add_argument("run", type=Path, metavar="RUN")
        action.add_argument("step", type=int, metavar="STEP")

    imported = commands.add_parser("import", help="take over a run that DeepSpeed saved (reads pickles)")
    imported.add_argument("config", type=Path, metavar="CONFIG", help="the run that is to go on from it")
    imported.add_argument("source", type=Path, metavar="SOURCE", help="ZeRO or universal checkpoint directory")
    imported.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    imported.add_argument(
        "--i-trust-this-file",
        action="store_true",
        help="DeepSpeed's files are pickles: even the restricted unpickler had holes that run code",
    )

    for action in commands.choices.values():
        action.add_argument("--json", action="store_true", help="print what a program can read")


def run(arguments: argparse.Namespace) -> int:
    """Run the action that was typed."""
    actions = {"list": _list, "verify": _verify, "prune": _prune, "pin": _pin, "unpin": _pin, "import": _import}
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    entries = [*entries_of(_checkpoints_of(arguments.run))]
    if arguments.json:
        print(json.dumps([asdict(entry) for entry in entries]))
        return 0
    from tools.model_directory.writing import readable_bytes

    for entry in entries:
        marks = [mark for mark, there in (("best", entry.best), ("pinned", entry.pinned)) if there]
        loss = "" if entry.evaluation_loss is None else f"  evaluation loss {entry.evaluation_loss:.4f}"
        state = entry.problem or f"{entry.ranks} ranks  {readable_bytes(entry.bytes)}  saved {entry.saved}{loss}"
        print("  ".join([f"step {entry.step}", state, *marks]))
    if not entries:
        print(f"{arguments.run} holds no checkpoint")
    return 0


def entries_of(checkpoints: Path) -> list[Entry]:
    """The checkpoints in a directory, newest first; reads manifests and sizes only."""
    from trainer.checkpoint.retention import best_step, evaluation_loss, pinned_steps
    from trainer.checkpoint.verify import committed_steps, step_directory

    best, pinned = best_step(checkpoints), pinned_steps(checkpoints)
    entries = []
    for step in committed_steps(checkpoints):
        path = step_directory(checkpoints, step)
        manifest, problem = _first_sight(path)
        entries.append(
            Entry(
                step=step,
                path=str(path),
                bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                ranks=manifest.world_size if manifest else None,
                saved=manifest.provenance.get("saved") if manifest else None,
                evaluation_loss=evaluation_loss(checkpoints, step),
                best=step == best,
                pinned=step in pinned,
                problem=problem,
            )
        )
    return entries


def _first_sight(path: Path) -> tuple[Manifest | None, str | None]:
    from trainer.checkpoint.verify import inspect_checkpoint

    try:
        return inspect_checkpoint(path), None
    except CheckpointError as error:
        return None, error.fact


def _verify(arguments: argparse.Namespace) -> int:
    found = verified(arguments.source)
    if arguments.json:
        print(json.dumps([{"path": str(path), "problem": problem} for path, problem in found]))
    else:
        for path, problem in found:
            print(problem or f"{path} is whole")
    problems = [(path, problem) for path, problem in found if problem]
    if not problems:
        return 0
    raise CheckpointError(
        f"{len(problems)} of {len(found)} checked are damaged: {', '.join(path.name for path, _ in problems)}",
        "restore them from a copy, or go on from another one",
    )


def verified(source: Path) -> list[tuple[Path, str | None]]:
    """Every checkpoint that `source` stands for, newest first, and what is wrong with it.

    All bytes are read. Raises MissingInputError when there is nothing to verify.
    """
    from trainer.checkpoint.verify import committed_steps, is_checkpoint, step_directory, verify_checkpoint

    def problem_with(path: Path) -> str | None:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            return error.fact
        return None

    if is_checkpoint(source):
        return [(source, problem_with(source))]
    checkpoints = _checkpoints_of(source)
    paths = [step_directory(checkpoints, step) for step in committed_steps(checkpoints)]
    if not paths:
        raise MissingInputError(
            f"{source} holds no checkpoint", "give a run or a checkpoint; steadfast verify is for models"
        )
    return [(path, problem_with(path)) for path in paths]


def _prune(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.retention import removable, retain
    from trainer.checkpoint.verify import newest_valid_step, step_directory
    from trainer.run_directory import RunDirectory

    if arguments.keep < 1:
        raise UsageError(f"--keep {arguments.keep} would remove the newest checkpoint", "keep 1 or more")
    checkpoints = _checkpoints_of(arguments.run)
    if RunDirectory(checkpoints.parent).in_use():
        raise RunLockedError(f"{checkpoints.parent} is in use", "a live run removes its own checkpoints; stop it first")
    newest, damaged = newest_valid_step(checkpoints)
    doomed: list[int] = []
    if newest is not None:
        prune = removable if arguments.dry_run else retain
        doomed = prune(checkpoints, arguments.keep, newest)
    if arguments.json:
        print(json.dumps({"newest_valid": newest, "removed": doomed, "damaged": damaged, "dry_run": arguments.dry_run}))
        return 0
    for problem in damaged:
        print(f"{problem}; it stays: look at it, then remove it yourself")
    verb = "would remove" if arguments.dry_run else "removed"
    for step in doomed:
        print(f"{verb} {step_directory(checkpoints, step)}")
    if not doomed:
        print("nothing to remove" if newest is not None else "nothing to remove: no checkpoint is valid")
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.retention import pin, unpin
    from trainer.checkpoint.verify import committed_steps

    checkpoints = _checkpoints_of(arguments.run)
    if arguments.step not in (steps := committed_steps(checkpoints)):
        known = ", ".join(map(str, steps)) or "none"
        raise MissingInputError(f"{arguments.run} has no checkpoint of step {arguments.step}", f"steps there: {known}")
    (pin if arguments.action == "pin" else unpin)(checkpoints, arguments.step)
    result: dict[str, Any] = {"step": arguments.step, "pinned": arguments.action == "pin"}
    print(json.dumps(result) if arguments.json else f"step {arguments.step} is {arguments.action}ned")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from tools.deepspeed_import import import_checkpoint
    from trainer.config.load import load_config
    from trainer.engine import device

    if not arguments.i_trust_this_file:
        raise UsageError(
            f"{arguments.source} holds pickles, and a pickle can run code when it is read",
            "if you would run a program from whoever made it, add --i-trust-this-file",
        )
    sys.stderr.write(f"warning: reading pickles from {arguments.source} because you trust it\n")
    device.prepare()
    report = import_checkpoint(load_config(arguments.config, arguments.overrides), arguments.source)
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        print(
            f"{report.layout} checkpoint of {report.ranks} ranks, {report.parameters:,} parameters, is now "
            f"{report.checkpoint}; the run goes on after step {report.step}"
        )
    return 0


def _checkpoints_of(source: Path) -> Path:
    from trainer.checkpoint.verify import CHECKPOINTS

    if not source.is_dir():
        raise MissingInputError(f"there is no {source}", "give a run directory")
    return source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
