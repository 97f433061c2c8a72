"""Are two runs equal, step by step? If not: the first step that differs, and what differs there.

steadfast prove runs/A runs/B

For every step: position, samples and learning rate; random numbers, loss and gradient norm; for every step of which
both have a checkpoint: all weights and moments. To the bit as long as both runs had the same number of ranks; from
the first step on that had not, the numbers may differ by 1e-5 (relative), samples and learning rate not at all.
Restarts and lost work do not matter: a step that was done again stands in the ledger once. Exit code 0: equal; 1: they
differ.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trainer.checkpoint.verify import committed_steps, read_manifest, step_directory, verify_checkpoint
from trainer.errors import MissingInputError
from trainer.observe.chain import CAME_TO, CONSUMED, verified_steps
from trainer.run_directory import RunDirectory

TOLERANCE = 1e-5
"""Relative, for runs on different numbers of ranks."""


@dataclass(frozen=True)
class Difference:
    """The first thing that differs."""

    step: int
    what: str
    first: Any
    second: Any


@dataclass
class Proof:
    """What was compared, and the first difference if there is one."""

    steps: int = 0
    """Steps that are equal in both."""
    exact_steps: int = 0
    """Of these, how many to the bit."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps whose weights and moments are equal in both."""
    difference: Difference | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return self.difference is None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `prove RUN_A RUN_B [--json]`."""
    parser.add_argument("first", type=Path, metavar="RUN_A", help="run directory")
    parser.add_argument("second", type=Path, metavar="RUN_B", help="run directory")
    parser.add_argument("--json", action="store_true", help="print what a program can read")


def run(arguments: argparse.Namespace) -> int:
    """Compare and say so."""
    proof = prove(arguments.first, arguments.second)
    if arguments.json:
        print(json.dumps({"equal": proof.equal, **asdict(proof)}))
    else:
        print("\n".join(lines(proof)))
    return 0 if proof.equal else 1


def prove(first: Path, second: Path) -> Proof:
    """Compare two run directories.

    Raises MissingInputError when one has no step ledger, DataError when a ledger was changed or lacks a step,
    CheckpointError when a checkpoint that both have is damaged.
    """
    runs = [RunDirectory(first), RunDirectory(second)]
    for run_directory in runs:
        if not run_directory.step_ledger.is_file():
            raise MissingInputError(
                f"{run_directory.path} has no step ledger", "give the directory of a run that has begun"
            )
    proof = Proof()
    proof.difference = _other_identity(runs, proof)
    if proof.difference is None:
        proof.difference = _first_other_step(runs, proof)
    _compare_checkpoints(runs, proof)
    return proof


def lines(proof: Proof) -> list[str]:
    """The verdict as a person reads it."""
    found = proof.difference
    if found is not None:
        place = f"at step {found.step}" if found.step else "before their first step"
        result = [f"the runs differ {place}: {found.what} is {found.first} and {found.second}"]
        if proof.steps:
            result.append(f"the {proof.steps} steps before it are equal{_how(proof)}")
    else:
        result = [f"equal: {proof.steps} steps{_how(proof)}"]
    if proof.checkpoints:
        shown = ", ".join(map(str, proof.checkpoints))
        result.append(f"weights and moments are equal at step {shown}")
    return [*result, *proof.notes]


def _how(proof: Proof) -> str:
    if proof.exact_steps == proof.steps:
        return " to the bit: samples, learning rate, random numbers, loss, gradient norm"
    return (
        f" in samples and learning rate; loss and gradient norm to the bit up to step {proof.exact_steps}, then to "
        f"{TOLERANCE:g} (the numbers of ranks differ)"
    )


def _other_identity(runs: list[RunDirectory], proof: Proof) -> Difference | None:
    """The first fingerprint of model, data or batch that differs: equal numbers of samples could be other texts."""
    identities = []
    for run_directory in runs:
        steps = committed_steps(run_directory.checkpoints)
        if not steps:
            proof.notes.append(f"{run_directory.path} has no checkpoint: that both read the same data was not compared")
            return None
        identities.append(read_manifest(step_directory(run_directory.checkpoints, steps[0])).identity)
    first, second = identities
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return Difference(0, name, first.get(name, "absent"), second.get(name, "absent"))
    return None


def _first_other_step(runs: list[RunDirectory], proof: Proof) -> Difference | None:
    exact = True
    for one, other in zip_longest(*(verified_steps(run_directory.step_ledger) for run_directory in runs)):
        if one is None or other is None:
            longer, end = (runs[1], runs[0]) if one is None else (runs[0], runs[1])
            proof.notes.append(f"{end.path} ends after step {proof.steps}, {longer.path} goes on")
            there = ("absent" if entry is None else "there" for entry in (one, other))
            return Difference(proof.steps + 1, "the step", *there)
        exact = exact and one["ranks"] == other["ranks"]
        for name in (*CONSUMED, *CAME_TO):
            if not _same(name, one[name], other[name], exact=exact):
                return Difference(int(one["step"]), name, one[name], other[name])
        proof.steps += 1
        proof.exact_steps += exact
    return None


def _same(name: str, one: Any, other: Any, *, exact: bool) -> bool:
    if exact or name in CONSUMED:
        return bool(one == other)
    if name == "rng":
        # Each number of ranks has streams of its own.
        return True
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=TOLERANCE)


def _compare_checkpoints(runs: list[RunDirectory], proof: Proof) -> None:
    """Compare the checkpoints that both have, oldest first, up to the first that differs."""
    first, second = (set(committed_steps(run_directory.checkpoints)) for run_directory in runs)
    for step in sorted(first & second):
        if proof.difference is not None and proof.difference.step <= step:
            return
        paths = [step_directory(run_directory.checkpoints, step) for run_directory in runs]
        for path in paths:
            verify_checkpoint(path)
        found = next(_other_tensors(*paths, exact=step <= proof.exact_steps), None)
        if found is not None:
            proof.difference = Difference(step, *found)
            return
        proof.checkpoints.append(step)
    if not first & second:
        proof.notes.append("no step has a checkpoint in both runs: weights and moments were not compared")


def _other_tensors(one: Path, other: Path, *, exact: bool) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two checkpoints of the same step, as (what, here, there)."""
    import numpy as np

    from trainer.checkpoint.slices import KINDS, SliceReader

    first, second = SliceReader(one), SliceReader(other)
    if first.parameters != second.parameters:
        yield "the list of parameters", len(first.parameters), len(second.parameters)
        return
    for name in first.parameters:
        for kind in KINDS:
            here, there = first.read(kind, name), second.read(kind, name)
            if here.tobytes() == there.tobytes():
                continue
            size = float(np.linalg.norm(here.astype(np.float64)))
            distance = float(np.linalg.norm(here.astype(np.float64) - there))
            if exact or not distance <= TOLERANCE * size:
                yield f"{kind} of {name}", f"{size!r} in norm", f"{distance:.3g} away from it"
    if exact:
        for rank in range(first.manifest.world_size):
            states = [reader.random_states(rank) for reader in (first, second)]
            digests = [
                None if found is None else {key: array.tobytes() for key, array in found.items()} for found in states
            ]
            if digests[0] != digests[1]:
                yield "random numbers", f"those of rank {rank}", "others"
