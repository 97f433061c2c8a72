"""Where the time of a run went, second by second, across all its restarts; and how often it should save.

steadfast goodput runs/NAME
steadfast goodput runs/NAME --price-per-hour 2.5        what each class cost, for 2.5 an hour and rank

Every second between the first and the last record of the run has one class; they add up. Reads only the ledgers
(events.jsonl, time.jsonl), of a run that is over or still going on.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import MissingInputError
from trainer.observe.goodput import CLASSES, Table, account, advise, timeline
from trainer.run_directory import RunDirectory

_MEANINGS = {
    "queue": "no attempt ran",
    "start": "launcher, imports, rendezvous",
    "load": "store, model, engine, checkpoint",
    "compile": "slowness of first steps",
    "data_wait": "steps waiting for data",
    "compute": "forward, backward and optimizer of steps that count",
    "communication_wait": "waiting for other ranks (on GPUs only at the end of steps)",
    "checkpoint": "training stood still for a save",
    "evaluation": "loss on held-out data",
    "hang": "no progress until an attempt was ended",
    "lost_work": "done again after a restart, or cut off",
    "shutdown": "after the last step",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `goodput RUN [--price-per-hour X] [--json]`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--price-per-hour", type=_price, metavar="X", help="price of one rank (one GPU) for an hour; queueing is free"
    )
    parser.add_argument("--json", action="store_true", help="print what a program can read")


def run(arguments: argparse.Namespace) -> int:
    """Print the account."""
    directory = RunDirectory(arguments.run)
    if not directory.times.is_file() and not directory.events.is_file():
        raise MissingInputError(f"{arguments.run} has no time ledger", "give the directory of a run that has begun")
    table = account(timeline(directory))
    if arguments.json:
        print(json.dumps(report(table, arguments.price_per_hour)))
    else:
        print("\n".join(lines(table, arguments.price_per_hour)))
    return 0


def report(table: Table, price: float | None) -> dict[str, Any]:
    """The account as JSON."""
    advice = advise(table)
    return {
        "goodput": table.goodput,
        **asdict(table),
        "accounted": sum(table.seconds.values()) / table.wall_seconds if table.wall_seconds else 1.0,
        "cost": None if price is None else costs(table, price),
        "advice": None if advice is None else asdict(advice),
    }


def costs(table: Table, price: float) -> dict[str, float]:
    """What each class cost, for `price` an hour and rank."""
    return {kind: seconds / 3600 * price for kind, seconds in table.rank_seconds.items()}


def lines(table: Table, price: float | None) -> list[str]:
    """The account as a person reads it."""
    wall = table.wall_seconds or 1.0
    money = {} if price is None else costs(table, price)
    result = []
    for kind in CLASSES:
        seconds = table.seconds[kind]
        cost = f"{money[kind]:>12,.2f}" if money else ""
        result.append(f"{kind:<18}  {seconds:>12,.1f} s  {seconds / wall:>6.1%}{cost}  {_MEANINGS[kind]}")
    total = f"{sum(money.values()):>12,.2f}" if money else ""
    result.append(
        f"{'wall time':<18}  {table.wall_seconds:>12,.1f} s  {sum(table.seconds.values()) / wall:>6.1%}{total}"
    )
    result.append(
        f"goodput {table.goodput:.1%}; {_count(table.attempts, 'attempt')}, {_count(table.failures, 'failure')}, "
        f"{_count(table.lost_steps, 'step')} done again"
    )
    advice = advise(table)
    if advice is None or table.save_seconds is None:
        result.append("no advice on checkpoint.every_steps yet: nothing was saved")
    else:
        steps = "" if advice.steps is None else f", that is checkpoint.every_steps={advice.steps}"
        result.append(
            f"advice: a save stops training for {table.save_seconds:.2f} s and a failure comes about every "
            f"{advice.hours_between_failures:.1f} h, so save every {advice.seconds:,.0f} s{steps}; saves and failures "
            f"then cost {advice.waste:.2%}"
        )
    return result


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price, e.g. 2.5")
    return price
