"""Inputs that are almost right: seeds of a format, mutated; and a bound on what an input may cost."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trainer.errors import SteadfastError

SECONDS = 1.0
TOKENS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"=", b".", b"-", b"--", b"\n",
    b"\r\n", b"\t", b" ", b"#", b"&a", b"*a", b"<<", b"!!python/object/apply:os.system", b"|", b">", b"%", b"{%", b"%}",
    b"{{", b"}}", b"null", b"true", b"~", b"NaN", b"Infinity", b"-0",
    b"1e999", b"9" * 400, b"0x1f", b"1_000", b"\\u0000",
    b"\\ud800", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"[" * 200, b"{'a':" * 100, b"a" * 5000, b"../", b"/etc/passwd",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e308, "", "x", "../x", "\0", "\ud800",
    "1",
    "F32", "a" * 3000, [], [[]], {}, {"a": 1}, [None], ["x"], [1, 2], {"": None}, [10**30], "step-00000001",
]  # fmt: skip


class Hang(BaseException):
    """An input took more than SECONDS of processor time."""


def mutated_bytes(seeds: Sequence[bytes], generator: random.Random) -> bytes:
    """One of `seeds` with a few bytes, tokens or pieces changed."""
    content = bytearray(generator.choice(seeds))
    for _ in range(generator.choice([1, 1, 2, 3, 8])):
        at = generator.randrange(len(content) + 1)
        length = generator.choice([0, 1, 1, 2, 8, 64, len(content)])
        kind = generator.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[at : at + min(length, 4096)]
        elif kind == 3:
            content[at : at + generator.choice([0, length])] = generator.choice(TOKENS)
        elif kind == 4:
            other = generator.choice(seeds)
            begin = generator.randrange(len(other) + 1)
            content[at : at + length] = other[begin : begin + min(length, 4096)]
        elif kind == 5:
            del content[at:]
        else:
            content[at : at + 8] = generator.randbytes(generator.choice([1, 8]))
    return bytes(content)


def mutated_value(value: Any, generator: random.Random) -> Any:
    """JSON values with one to three places replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        holder, key = generator.choice([*_places(value)] or [(None, None)])
        if holder is None:
            return copy.deepcopy(generator.choice(VALUES))
        kind = generator.randrange(5)
        if kind <= 1:
            holder[key] = copy.deepcopy(generator.choice(VALUES))
        elif kind == 2:
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            holder[generator.choice(["", "x", "a/b", "..", "\0", "é"])] = holder.pop(key)
        else:
            other, place = generator.choice([*_places(value)])
            if holder is not other:
                holder[key] = copy.deepcopy(other[place])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner):
        yield value, key
        yield from _places(item)


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hang inside the block after SECONDS of processor time: waiting for a busy machine is no hang."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def survives(
    count: int, seed: int, make: Callable[[random.Random], Any], parse: Callable[[Any], Any], *also: type[BaseException]
) -> dict[str, int]:
    """Parse `count` inputs that `make` makes; returns how many were accepted and how many refused with which code.

    AssertionError with the input and its number for anything but a result, a SteadfastError other than "a bug of ours",
    or one of the exceptions `also`.
    """
    outcomes: dict[str, int] = {}
    for number in range(count):
        given = make(random.Random(f"{seed} {number}"))
        try:
            with bounded():
                parse(given)
            outcome = "accepted"
        except SteadfastError as error:
            if error.exit_code == SteadfastError.exit_code:
                raise AssertionError(f"input {number} of seed {seed}, {given!r}: {error!r}") from error
            if any("\n" in line for line in error.lines()):
                raise AssertionError(f"input {number} of seed {seed}: a message of several lines: {error}") from error
            outcome = f"exit {error.exit_code}"
        except also as error:
            outcome = type(error).__name__
        except (Exception, Hang) as error:
            raise AssertionError(f"input {number} of seed {seed}, {_short(given)}: {error!r}") from error
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def _short(given: Any) -> str:
    text = repr(given) if isinstance(given, bytes | str | list) else json.dumps(given, default=repr)
    return text if len(text) < 3000 else f"{text[:3000]}... ({len(text)} characters)"
