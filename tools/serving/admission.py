"""Who may come in: API keys, the bounds of the service, and how it empties."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.serving.protocol import RequestError
from trainer.errors import MissingInputError, UsageError

LEAST_KEY_LENGTH = 3


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; a request beyond one is refused with its number."""

    max_new_tokens: int
    """Most tokens of one answer."""
    max_running: int
    """Requests answered at once."""
    max_waiting: int
    """Requests that may wait for their turn; more are refused with 429."""
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """A body that has not arrived by then is refused with 408."""
    request_seconds: float = 600.0
    """An answer that is not complete by then is ended with 503."""


class Admission:
    """Counts requests in and out. Used in the event loop's thread only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, *, ready: bool) -> None:
        """RequestError 503 while not ready, 429 when too many are here. Cheap: asked before a body is read, too."""
        if self.draining:
            raise RequestError(503, "the server is stopping", code="stopping")
        if not ready:
            raise RequestError(503, "the engine is not ready; try again soon", code="not_ready")
        if self.in_flight >= self.limits.max_running + self.limits.max_waiting:
            raise RequestError(429, f"{self.in_flight} requests are here already; try again later", code="queue_full")

    @contextmanager
    def admitted(self, *, ready: bool) -> Iterator[None]:
        """Hold a place; what `check` raises."""
        self.check(ready=ready)
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some still ran after `seconds`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Keys:
    """The API keys of a server. Nothing about a key, not even its length, shows in how long a check takes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def number(self, authorization: str) -> int | None:
        """Which key an Authorization header holds, counted from 1; None when it holds none of ours."""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given)
        found = None
        for number, expected in enumerate(self._digests, 1):
            if hmac.compare_digest(digest, expected):
                found = number
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(word: str | None, file: Path | None, variable: str | None) -> list[str]:
    """The keys from the command line, a file (one a line, # begins a comment) or a variable (commas between keys)."""
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MissingInputError(f"the key file {file} cannot be read: {error}", "check --api-key-file") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        source = str(file)
    elif word is not None:
        keys, source = [word.strip()], "--api-key"
    elif variable is not None:
        keys, source = [key.strip() for key in variable.split(",")], "the variable of keys"
    else:
        return []
    if not keys or not all(len(key) >= LEAST_KEY_LENGTH for key in keys):
        raise UsageError(
            f"{source} holds an empty API key or one of less than {LEAST_KEY_LENGTH} characters",
            "give a real key, or none at all",
        )
    return keys
