"""Measure Steadfast on this machine: data path, checkpoints, steps, exports, serving.

    steadfast bench data                        all sections: about fifteen minutes on two cores
    steadfast bench data --quick                small sizes: shows that everything runs; the figures mean little
    steadfast bench data --corpus my.jsonl      tokenise your own conversations
    steadfast bench checkpoint                  time that training stands still: in the background and on the spot
    steadfast bench overhead                    what watching and recording a run cost of its steps
    steadfast bench export                      memory and time of an export, beside DeepSpeed's zero_to_fp32; 36 GB
    steadfast bench serve                       the gateway beside its engine, and many clients beside one by one

Sections: tokenise, read, start, pack, prepare. Figures of `data` are CPU seconds of processes that take turns, so the
*ratios* hold on a busy machine too; the best round counts. Data is made from a seed. Tools to compare with are not
installed with Steadfast: pip install --no-deps -r tools/bench-requirements.txt
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from tools.benchmarks.measure import Line, Say

SECTIONS = ("tokenise", "read", "start", "pack", "prepare")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    conversations: int
    vocabulary_size: int
    rows: int
    sequence_length: int
    start_rows: tuple[int, ...]
    samples: int
    capacities: tuple[int, ...]
    megabytes: float
    rounds: int


FULL = Sizes(4000, 32_000, 8192, 2048, (10_000, 1_000_000, 1_000_000_000), 100_000, (2048, 8192), 24.0, 3)
QUICK = Sizes(120, 8_000, 256, 1024, (10_000, 1_000_000, 1_000_000_000), 4000, (2048, 8192), 0.2, 1)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `steadfast bench data`, `checkpoint`, `overhead`, `export` and `serve`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    data = commands.add_parser("data", help="the data path: tokenise, read, start, pack, prepare")
    data.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    data.add_argument("--corpus", nargs="+", type=Path, metavar="PATH", help="your own conversations, for tokenise")
    data.add_argument(
        "--megabytes",
        type=float,
        metavar="MB",
        help="input of prepare (default: 24); 2200 shows that memory is bounded",
    )
    data.add_argument("--rounds", type=int, metavar="N", help="rounds, of which the best counts (default: 3)")
    data.add_argument("--quick", action="store_true", help="small sizes, one round")
    checkpoint = commands.add_parser("checkpoint", help="how long training stands still for a checkpoint")
    overhead = commands.add_parser("overhead", help="what watching and recording a run cost of its steps")
    for action in (checkpoint, overhead):
        action.add_argument(
            "--models", nargs="+", choices=("demo", "300m"), default=["demo", "300m"], help="300m takes 16 GB of memory"
        )
        action.add_argument("--rounds", type=int, metavar="N", help="runs of each kind (default: 1)")
        action.add_argument("--quick", action="store_true", help="a tiny model: shows that everything runs")
    export = commands.add_parser("export", help="an export beside DeepSpeed's own converter: memory and time")
    export.add_argument("--rounds", type=int, metavar="N", help="exports of each kind, of which the fastest counts (1)")
    export.add_argument("--quick", action="store_true", help="a tiny model: shows that everything runs")
    serve = commands.add_parser("serve", help="tokens a second through the gateway, and many clients at once")
    serve.add_argument("--rounds", type=int, metavar="N", help="rounds, of which the median counts (default: 5)")
    serve.add_argument("--quick", action="store_true", help="a tiny model, few tokens: shows that everything runs")
    for action in (data, checkpoint, overhead, export, serve):
        action.add_argument("--seed", type=int, default=0, metavar="S", help="of the made data")
        action.add_argument(
            "--work", type=Path, metavar="DIR", help="new directory for its files, kept (default: temporary)"
        )
        action.add_argument("--json", action="store_true", help="print the measurements as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds} is too few", "give 1 or more")
    action = arguments.action
    corpus = [path.resolve() for path in (action == "data" and arguments.corpus) or ()]
    for path in corpus:
        if not path.exists():
            raise MissingInputError(f"there is no {path}", "give files of conversations with --corpus")
    if arguments.work is not None and arguments.work.exists():
        raise UsageError(f"{arguments.work} exists", "give a new directory with --work")
    sizes = QUICK if arguments.quick else FULL
    if action == "data" and arguments.megabytes is not None:
        if arguments.megabytes <= 0:
            raise UsageError(f"--megabytes {arguments.megabytes} is nothing", "give a positive number")
        sizes = replace(sizes, megabytes=arguments.megabytes)
    usual = {"data": sizes.rounds, "checkpoint": 1, "overhead": 1, "export": 1, "serve": 1 if arguments.quick else 5}
    rounds = arguments.rounds or usual[action]
    with tempfile.TemporaryDirectory(prefix="steadfast-bench-") as temporary:
        work = Path(temporary) if arguments.work is None else arguments.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        if action == "export":
            from tools.benchmarks import export as exports

            lines = exports.run(work, arguments.quick, rounds, arguments.seed, _say)
        elif action == "serve":
            from tools.benchmarks import serving

            lines = serving.run(work, rounds, arguments.seed, _say, quick=arguments.quick)
        elif action in ("checkpoint", "overhead"):
            from tools.benchmarks import checkpoint as saves
            from tools.benchmarks import overhead as steps

            models = ["quick"] if arguments.quick else arguments.models
            lines = (saves if action == "checkpoint" else steps).run(work, models, rounds, arguments.seed, _say)
        else:
            lines = measure(arguments.sections, sizes, rounds, work, corpus, arguments.seed, _say)
    about = {"cores": os.cpu_count(), "python": platform.python_version(), "rounds": rounds, "seed": arguments.seed}
    if arguments.json:
        extra = {"sizes": asdict(sizes)} if action == "data" else {}
        print(json.dumps({**about, **extra, "lines": list(map(_as_json, lines))}, ensure_ascii=False))
    else:
        show(lines, about)
    return 0


def measure(
    sections: Sequence[str], sizes: Sizes, rounds: int, work: Path, corpus: Sequence[Path], seed: int, say: Say
) -> list[Line]:
    """Run the sections and return the lines of the report; files go to `work`."""
    from tools.benchmarks import packing, prepare, read, startup, tokenise

    lines: list[Line] = []
    if {"tokenise", "prepare"} & set(sections):
        rows, tokenizer = tokenise.prepare_inputs(work, sizes.conversations, sizes.vocabulary_size, seed, corpus, say)
    if "tokenise" in sections:
        lines += tokenise.run(work, rows, tokenizer, rounds, say)
    if "read" in sections:
        lines += read.run(work, sizes.rows, sizes.sequence_length, rounds, seed, say)
    if "start" in sections:
        lines += startup.run(work, sizes.start_rows, rounds, seed, say)
    if "pack" in sections:
        lines += packing.run(work, sizes.samples, sizes.capacities, rounds, seed, say)
    if "prepare" in sections:
        lines += prepare.run(work, tokenizer, sizes.megabytes, seed, say)
    return lines


def show(lines: Sequence[Line], about: dict[str, Any]) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Table

    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    table = Table(title="Steadfast, measured", caption=facts, title_justify="left")
    table.add_column("section")
    table.add_column("contender")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("Steadfast is", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("note")
    section = ""
    for line in lines:
        if section and line.section != section:
            table.add_section()
        table.add_row(
            "" if line.section == section else line.section,
            line.contender,
            "" if line.value is None else _number(line.value),
            "" if line.value is None else line.unit,
            "" if line.ratio is None else f"{_number(line.ratio)}x",
            "" if line.goal is None else f">= {line.goal:g}x{' missed' if line.met is False else ''}",
            line.note,
        )
        section = line.section
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _as_json(line: Line) -> dict[str, Any]:
    return {**asdict(line), "goal_met": line.met}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
