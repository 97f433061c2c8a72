"""Run a small job under random faults, again and again, and show that it ends as if nothing had happened.

steadfast drill configs/tiny.yaml --faults kill,term,stop,enospc,nan,flip --count 12 --seed 7 --nproc 2

First the job runs alone. Then it is struck: in every round a new run gets up to five faults, one an attempt, at random
phases of random steps, and is started again after each; at its end every step and every weight is compared, to the bit,
with the run that was left alone. The same seed strikes at the same places.

    kill, term, stop   SIGKILL, SIGTERM, SIGSTOP to a rank, to all ranks or to the launcher
    enospc             the disk of the checkpoints is full (a small tmpfs for root, else an injected error)
    nan                a loss or gradient of one rank is NaN: the step is skipped everywhere
    flip               a kill, and one bit of the newest checkpoint is flipped before the next start

Exit code 0: every fault fired, every attempt ended in time and as documented, nothing committed was lost, and every
run ended with equal weights; else 1. The configuration's model and data are used; steps, saves and evaluations are
the drill's own, and section.key=value wins over them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.arguments import add_config_arguments
from trainer.config.load import load_config

if TYPE_CHECKING:
    from tools.drills.run import Row

_LONGEST = 60


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `drill CONFIG [section.key=value ...] --faults KINDS --count N --seed S`."""
    add_config_arguments(parser)
    parser.add_argument("--faults", default="kill,term,stop,enospc,nan,flip", metavar="KINDS", help="comma-separated")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="faults in all")
    parser.add_argument("--seed", type=int, default=7, metavar="S", help="what chance begins with")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep all runs and their output here (a new directory)")
    parser.add_argument("--json", action="store_true", help="print what a program can read")


def run(arguments: argparse.Namespace) -> int:
    """Plan, strike, compare, and print the table."""
    from tools.drills.attempt import can_mount
    from tools.drills.plan import plan_drill, steps_of
    from tools.drills.run import Job, carry_out

    config = load_config(arguments.config, arguments.overrides)
    if arguments.out is None:
        out = Path(tempfile.mkdtemp(prefix="steadfast-drill-"))
    else:
        out = arguments.out
        out.mkdir(parents=True)
    say = _silent if arguments.json else _say
    rounds = plan_drill(
        arguments.faults.split(","), arguments.count, arguments.seed, arguments.nproc, small_disk=can_mount(out)
    )
    # Evaluation is a phase to be struck in, whatever it evaluates.
    evaluated = [] if config.data.eval is not None else [f"data.eval={config.data.train}"]
    job = Job(arguments.config, (*evaluated, *arguments.overrides), arguments.nproc, steps_of(rounds), out)
    say(f"seed {arguments.seed}: {arguments.count} faults in {len(rounds)} rounds; everything is in {out}")
    rows = []
    for row in carry_out(job, rounds, arguments.seed, say):
        rows.append(row)
        say(line(row))
    failed = [row for row in rows if row.problem or not row.equal]
    if arguments.json:
        print(json.dumps({"seed": arguments.seed, "passed": not failed, "faults": [asdict(row) for row in rows]}))
    else:
        say(verdict(rows))
    if arguments.out is None and not failed:
        shutil.rmtree(out, ignore_errors=True)
    return 1 if failed else 0


def line(row: Row) -> str:
    """One fault as a person reads it."""
    said = row.said if len(row.said) <= _LONGEST else f"{row.said[: _LONGEST - 3]}..."
    resumed = "no restart" if row.resumed_at is None else f"resumed at {row.resumed_at}"
    end = f"FAILED: {row.problem}" if row.problem else "bitwise equal"
    return (
        f"{row.fault:<7}{row.victim:<10}{row.phase:<12}step {row.step:<4}exit {row.exit_code:<4}{resumed:<14}"
        f"lost {row.lost_steps:<3}{end}  | {said}"
    )


def verdict(rows: Sequence[Row]) -> str:
    """The last line."""
    good = sum(not row.problem and row.equal for row in rows)
    lost = sum(row.lost_steps for row in rows)
    return (
        f"{good} of {len(rows)} faults: ended as documented, nothing committed lost, equal to the bit; "
        f"{lost} steps done again"
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    return None
