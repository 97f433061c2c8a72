"""Packing: samples to rows, by Steadfast's planner and by TRL's packer, on the same lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tools.benchmarks.corpus import sample_lengths
from tools.benchmarks.measure import Contender, Facts, Line, Say, compare, run_rounds, stopwatch

SECTION = "pack"
UNIT = "ksamples per CPU s"
GOAL = 10.0
MOST_WASTE = 0.005


def run(work: Path, samples: int, capacities: Sequence[int], rounds: int, seed: int, say: Say) -> list[Line]:
    """Compare packers at several sequence lengths; longer samples are cut to a row first."""
    lines = []
    for capacity in capacities:
        lengths = work / f"lengths-{capacity}.npy"
        np.save(lengths, np.minimum(sample_lengths(samples, seed), capacity))
        arguments = {"lengths": str(lengths), "capacity": capacity}
        contenders = [
            Contender(f"Steadfast, rows of {capacity:,}", "tools.benchmarks.ours:pack", arguments),
            Contender(f"TRL bfd, rows of {capacity:,}", "tools.benchmarks.packing:by_trl", arguments, "trl", GOAL),
        ]
        outcomes = run_rounds(contenders, rounds, lambda text: say(f"{SECTION}: {text}"))
        lines += compare(SECTION, UNIT, contenders, outcomes, _note)
    return lines


def _note(facts: Facts) -> str:
    waste = float(facts["waste"])
    excess = "" if waste <= MOST_WASTE else f", more than {MOST_WASTE:.1%}"
    return f"waste {waste:.2%}{excess}; {facts['rows']:,} rows{facts.get('besides', '')}"


def by_trl(lengths: str, capacity: int) -> Facts:
    """Measure `trl.pack_dataset` with its defaults (best-fit decreasing, a thousand samples at a time)."""
    import datasets
    import pyarrow
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    sizes = np.load(lengths)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = pyarrow.array(np.zeros(int(offsets[-1]), dtype=np.int32))
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), ids).cast(pyarrow.list_(pyarrow.int32()))
    data = datasets.Dataset(pyarrow.table({"input_ids": column}))
    with stopwatch() as watch:
        packed = pack_dataset(data, capacity, "bfd")
    return {
        "cpu": watch.cpu,
        "wall": watch.wall,
        "work": len(sizes) / 1e3,
        "rows": len(packed),
        "waste": 1 - int(sizes.sum()) / (len(packed) * capacity),
        "besides": "; copies the ids too",
    }
