"""Preparation: `steadfast data build` with one and with four worker processes: the same bytes, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from tools.benchmarks.corpus import make_conversations, write_json_lines
from tools.benchmarks.measure import Contender, Facts, Line, Say, compare, run_rounds

SECTION = "prepare"
UNIT = "MB per CPU s"
SEQUENCE_LENGTH = 2048
# So many conversations are made for a file; it repeats them under new numbers until it has the size asked for.
DISTINCT_ROWS = 4000
ROWS_A_MEGABYTE = 1000


def run(work: Path, tokenizer: Path, megabytes: float, seed: int, say: Say) -> list[Line]:
    """Build one input of so many megabytes with one and with four workers; one round, it takes a while."""
    source = write_json_lines(work / "input.jsonl", _rows(megabytes, seed))
    contenders = [
        Contender(
            f"Steadfast, {workers} worker{'s' if workers > 1 else ''}",
            "tools.benchmarks.ours:prepare",
            {
                "source": str(source),
                "tokenizer": str(tokenizer),
                "out": str(work / f"built-{workers}"),
                "sequence_length": SEQUENCE_LENGTH,
                "workers": workers,
            },
        )
        for workers in (1, 4)
    ]
    outcomes = run_rounds(contenders, 1, lambda text: say(f"{SECTION}: {text}"))
    one = outcomes[0].facts

    def note(facts: Facts) -> str:
        used = (
            f"{facts['wall']:.1f} s wall, {facts['cpu']:.1f} s CPU; {facts['anonymous'] / 1e6:,.0f} MB allocated, "
            f"{facts['mapped'] / 1e6:,.0f} MB of files mapped"
        )
        if one is None or facts is one:
            return f"{facts['files']} files; {used}"
        same = "the same bytes" if facts["sha256"] == one["sha256"] else "OTHER BYTES than with one worker"
        return f"{facts['files']} files, {same}; {used}, {one['wall'] / facts['wall']:.1f}x as fast"

    # Both are Steadfast: there is no one to be better than.
    return [replace(line, ratio=None) for line in compare(SECTION, UNIT, contenders, outcomes, note)]


def _rows(megabytes: float, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations until they fill the file, none like another."""
    made = make_conversations(min(DISTINCT_ROWS, int(megabytes * ROWS_A_MEGABYTE) + 1), seed + 1)
    size = 0
    for number in count():
        if size >= megabytes * 1e6:
            return
        first, *others = made[number % len(made)]["messages"]
        row = {"messages": [{**first, "content": f"{number}. {first['content']}"}, *others]}
        size += sum(len(message["content"].encode()) + 40 for message in row["messages"])
        yield row
