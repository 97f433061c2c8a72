"""Start and resume: whether the time until the first batch depends on the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tools.benchmarks import ours
from tools.benchmarks.corpus import rows_as_documents
from tools.benchmarks.measure import Contender, Line, Outcome, Say, named, run_rounds

SECTION = "start"
UNIT = "ms"
BATCH_SIZE = 8
SEQUENCE_LENGTH = 2048
# The plan is computed; its rows are these, over and over.
STORED_ROWS = 4096
# A table of a billion rows takes 8 GB and minutes, so tables are measured at this number and fewer.
LARGEST_TABLE = 1_000_000


def run(work: Path, counts: Sequence[int], rounds: int, seed: int, say: Say) -> list[Line]:
    """First batch, and the batch at a far position, of plans of so many rows; what index tables of others cost."""
    store = work / "start-store"
    ids = np.random.default_rng(seed).integers(3, 32_000, (STORED_ROWS, SEQUENCE_LENGTH), dtype=np.int32)
    documents = rows_as_documents(ids, np.ones(ids.shape, dtype=np.uint8))
    ours.write_store(store, documents, SEQUENCE_LENGTH, 1 << 20)
    mine = [
        Contender(
            f"Steadfast, {rows:,} rows",
            "tools.benchmarks.ours:start",
            {"store": str(store), "rows": rows, "batch_size": BATCH_SIZE},
        )
        for rows in counts
    ]
    table = max(rows for rows in counts if rows <= LARGEST_TABLE)
    tables = [
        Contender(
            f"permuted index of {table:,} rows (Megatron-style)",
            "tools.benchmarks.readers:permuted_index",
            {"rows": table},
        ),
        Contender(
            f"MDS partition and py1e of {table:,} rows",
            "tools.benchmarks.readers:index_tables",
            {"rows": table, "batch_size": BATCH_SIZE},
            "mosaicml-streaming",
        ),
    ]
    outcomes = run_rounds([*mine, *tables], rounds, lambda text: say(f"{SECTION}: {text}"))
    own, others = outcomes[: len(mine)], outcomes[len(mine) :]
    lines = [
        line
        for key, label in (("first_batch", "first batch"), ("far_batch", "after a resume in the third epoch"))
        for line in _own_lines(own, key, label)
    ]
    first = own[list(counts).index(table)]
    return [*lines, *(_table_line(*pair, first) for pair in zip(tables, others, strict=True))]


def _own_lines(outcomes: Sequence[Outcome], key: str, label: str) -> list[Line]:
    smallest = outcomes[0].facts[key] if outcomes[0].facts else None
    lines = []
    for outcome in outcomes:
        name = f"{outcome.name}: {label}"
        if outcome.facts is None:
            lines.append(Line(SECTION, name, None, UNIT, note=outcome.why_not))
            continue
        seconds = float(outcome.facts[key])
        note = f"{seconds / smallest:.1f}x the time of {outcomes[0].name.partition(', ')[2]}; " if smallest else ""
        note += f"state {outcome.facts['state_bytes']} bytes"
        lines.append(Line(SECTION, name, seconds * 1e3, UNIT, note=note, facts=outcome.facts))
    return lines


def _table_line(contender: Contender, outcome: Outcome, first: Outcome) -> Line:
    if outcome.facts is None:
        return Line(SECTION, named(contender), None, UNIT, note=outcome.why_not)
    seconds = float(outcome.facts["wall"])
    return Line(
        SECTION,
        named(contender),
        seconds * 1e3,
        UNIT,
        ratio=seconds / float(first.facts["first_batch"]) if first.facts else None,
        note="before the first batch of every epoch; grows with the rows",
        facts=outcome.facts,
    )
