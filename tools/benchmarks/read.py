"""Reading: the same rows through Steadfast's store, order and feed, and through other readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tools.benchmarks import ours, readers
from tools.benchmarks.corpus import make_token_documents, rows_as_documents
from tools.benchmarks.measure import (
    Contender,
    Facts,
    Line,
    Outcome,
    Say,
    compare,
    installed_version,
    run_apart,
    run_rounds,
)

SECTION = "read"
UNIT = "Mtok per CPU s"
BATCH_SIZE = 8
STORES = ("whole", "packed")
OURS = "tools.benchmarks.ours:read"
THEIRS = "tools.benchmarks.readers:read"

# Name, reader, package, goal, ready for training. The goals are for the forms that the peers' documentation shows.
PEERS = (
    ("Megatron-style mmap", "megatron", None, 1.0, True),
    ("Megatron-style mmap, ids and mask only", "megatron", None, None, False),
    ("litdata, tensors", "litdata", "litdata", 4.0, True),
    ("litdata, raw bytes", "litdata-fast", "litdata", None, True),
    ("litdata, its loader of tokens", "litdata-tokens", "litdata", None, True),
    ("MDS py1e, arrays", "mosaic", "mosaicml-streaming", 25.0, True),
    ("MDS py1e, raw bytes", "mosaic-fast", "mosaicml-streaming", None, True),
    ("datasets streaming, DataLoader", "datasets", "datasets", 25.0, True),
    ("datasets streaming, whole batches", "datasets-fast", "datasets", None, True),
    ("webdataset, arrays", "webdataset", "webdataset", 25.0, True),
    ("webdataset, raw bytes", "webdataset-fast", "webdataset", None, True),
)


def run(work: Path, rows: int, sequence_length: int, rounds: int, seed: int, say: Say) -> list[Line]:
    """Compare readers over `rows` rows of `sequence_length` tokens."""
    directory = work / SECTION
    make_rows(directory, rows, sequence_length, seed)
    for reader, package in dict.fromkeys((reader, package) for _, reader, package, _, _ in PEERS):
        if package is None or installed_version(package):
            say(f"{SECTION}: writing for {reader}")
            try:
                run_apart("tools.benchmarks.readers:write", {"reader": reader, "directory": str(directory)})
            except RuntimeError as error:
                say(f"{SECTION}: writing for {reader} failed: {error}")
    contenders = _contenders(directory, rows)
    outcomes = run_rounds(contenders, rounds, lambda text: say(f"{SECTION}: {text}"))
    expected = next((outcome.facts["sums"] for outcome in outcomes if outcome.facts), [None, None])

    def compared(outcome: Outcome) -> Outcome:
        if outcome.facts is None or outcome.facts["sums"][0] == expected[0]:
            return outcome
        return Outcome(outcome.name, None, "failed: it read other rows")

    def note(facts: Facts) -> str:
        same = "same rows, same targets" if facts["sums"] == expected else "same rows"
        return f"{same}; first batch {facts['first_batch'] * 1e3:.0f} ms"

    return compare(SECTION, UNIT, contenders, [compared(outcome) for outcome in outcomes], note)


def make_rows(directory: Path, rows: int, sequence_length: int, seed: int) -> None:
    """The rows as two stores, packed documents and one document a row, and as arrays for the writers of others."""
    # A little more than needed: the rows that are packed last are not full.
    documents = make_token_documents((rows + 70) * sequence_length, sequence_length, seed)
    shard_tokens = max(1 << 16, rows * sequence_length // 8)
    ours.write_store(directory / "packed", documents, sequence_length, shard_tokens)
    ids, targets = ours.stored_rows(directory / "packed", rows)
    mask = np.zeros(ids.shape, dtype=np.uint8)
    mask[:, 1:] = targets[:, :-1] != readers.IGNORED
    np.save(directory / readers.IDS, ids)
    np.save(directory / readers.MASK, mask)
    ours.write_store(directory / "whole", rows_as_documents(ids, mask), sequence_length, shard_tokens)


def _contenders(directory: Path, rows: int) -> list[Contender]:
    whole, packed = ({"store": str(directory / name), "batch_size": BATCH_SIZE, "rows": rows} for name in STORES)
    # As the others hold them: rows that were packed before. Steadfast packs while it reads, too.
    found = [
        Contender("Steadfast, rows as they are", OURS, {**whole, "ahead": False}),
        Contender("Steadfast, packed while reading", OURS, {**packed, "ahead": False}),
        Contender("Steadfast, packed, in the feed's thread", OURS, {**packed, "ahead": True}),
    ]
    found += [
        Contender(
            name,
            THEIRS,
            {"reader": reader, "directory": str(directory), "batch_size": BATCH_SIZE, "ready": ready},
            package,
            goal,
        )
        for name, reader, package, goal, ready in PEERS
    ]
    return found
