"""The chain of the step ledger: how a line follows from the one before it. Torch-free.

`chain` covers what a step consumed: position, samples and learning rate, which are the same for any number of ranks.
`state_chain` covers what it came to as well: random numbers, loss and gradient norm, to the bit. Equal chains at a
step therefore mean equal steps up to it, and a line that was changed afterwards no longer fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.observe.ledger import read_lines

CONSUMED = ("position", "samples", "learning_rate")
CAME_TO = ("rng", "loss", "gradient_norm")


def linked(entry: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, str]:
    """`chain` and `state_chain` of a line that follows `before` (None: the first line). `entry` is plain JSON."""
    chain = _hash([before["chain"] if before else "", *(entry[name] for name in CONSUMED)])
    state = _hash([before["state_chain"] if before else "", chain, *(entry[name] for name in CAME_TO)])
    return {"chain": chain, "state_chain": state}


def verified_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a step ledger, in order, each checked against the one before it.

    Raises DataError at the first line that is missing or was changed.
    """
    before: dict[str, Any] | None = None
    for entry in read_lines(path):
        expected = before["step"] + 1 if before else 1
        if entry.get("step") != expected:
            raise DataError(f"{path} lacks step {expected}", "the run cannot be proved past the step before it")
        try:
            found = linked(entry, before)
            fits = all(entry[name] == value for name, value in found.items())
        except KeyError as error:
            raise DataError(f"{path}: step {expected} has no {error}", "it was written by an older version") from error
        if not fits:
            raise DataError(f"{path}: step {expected} was changed after it was written", "it proves nothing")
        before = entry
        yield entry


def _hash(values: list[Any]) -> str:
    # Numbers are written with all their bits, so equal text is equal numbers.
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
