"""How ranks tell rank 0 what they found: lines of JSON over one TCP connection a rank, at MASTER_ADDR:MASTER_PORT.

That is where torch will meet too, so the port, the name and the way there are tried on the side. A rank asks, rank 0
answers; nothing waits longer than it was told to:

    {"ask": "time"}                         -> {"time": seconds since the epoch}, at once
    {"ask": "report", "body": RankFacts}    -> {"body": Instructions} when all have reported, or time is up
    {"ask": "result", "body": RankResult}   -> {"body": Verdict} when all have answered, or time is up

Torch's own store would do the same only after torch was imported, which takes long on a cold file system and not at
all on a host where it is broken.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launch.preflight.facts import Facts
from launch.preflight.reports import RankFacts, RankResult
from trainer.errors import PeerLostError

_LONGEST_LINE = 1 << 20
_GREETING_SECONDS = 5.0
_CLOCK_QUESTIONS = 5


class Instructions(Facts):
    """What rank 0 asks of every rank after it has heard of all, or of all that came."""

    nonce: str
    """What to look for in run.dir; empty when rank 0 could not write it."""
    probe_port: int | None
    """Where the collectives meet; None when not everybody came, so that they would only wait."""
    probe_seconds: float


class Verdict(Facts):
    """How it ended, for the exit code of every rank."""

    code: int


class Desk:
    """Rank 0's side: collects reports and results and hands out instructions and the verdict. Thread-safe.

    `world_size` ranks are awaited, rank 0 among them: it puts its own report and result in with `put`.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._changed = threading.Condition()
        self.reports: dict[int, RankFacts] = {}
        self.results: dict[int, RankResult] = {}
        self.gone: set[int] = set()
        self.doubles: list[str] = []
        self._answered: set[int] = set()
        self._instructions: Instructions | None = None
        self._verdict: Verdict | None = None

    def put(self, rank: int, body: RankFacts | RankResult) -> None:
        """Take in what a rank says."""
        with self._changed:
            if isinstance(body, RankResult):
                self.results[rank] = body
            elif rank in self.reports:
                other = self.reports[rank]
                self.doubles.append(
                    f"two processes say that they are rank {rank}: pid {other.pid} on {other.host.node} and "
                    f"pid {body.pid} on {body.host.node}"
                )
            else:
                self.reports[rank] = body
            self._changed.notify_all()

    def await_reports(self, until: float) -> set[int]:
        """The ranks that have not reported when all had time until then (of time.monotonic)."""
        return self._await(lambda: set(range(self._world_size)) - self.reports.keys(), until)

    def await_results(self, until: float) -> set[int]:
        """The ranks that reported but gave no result in time; those that went away are not waited for."""
        return self._await(lambda: self.reports.keys() - self.results.keys() - self.gone, until)

    def await_goodbyes(self, until: float) -> None:
        """Until all that gave a result have got the verdict."""
        self._await(lambda: self.results.keys() - self._answered - self.gone - {0}, until)

    def instruct(self, instructions: Instructions) -> None:
        """Answer all reports, those to come too."""
        with self._changed:
            self._instructions = instructions
            self._changed.notify_all()

    def decide(self, verdict: Verdict) -> None:
        """Answer all results, those to come too."""
        with self._changed:
            self._verdict = verdict
            self._changed.notify_all()

    def serve(self, listener: socket.socket) -> None:
        """Answer everybody who connects, each in a thread, until the listener is closed."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _await(self, missing: Callable[[], set[int]], until: float) -> set[int]:
        with self._changed:
            self._changed.wait_for(lambda: not missing(), timeout=max(0.0, until - time.monotonic()))
            return missing()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        rank = None
        # A stranger at our port gets no answer and does no harm.
        with suppress(OSError, ValueError, KeyError, TypeError), connection:
            stream = connection.makefile("rwb")
            while line := stream.readline(_LONGEST_LINE):
                request = json.loads(line)
                if request["ask"] == "time":
                    answer: dict[str, Any] = {"time": time.time()}
                elif request["ask"] == "report":
                    report = RankFacts.model_validate(request["body"])
                    rank = report.rank
                    self.put(rank, report)
                    answer = {"body": self._wait_for(lambda: self._instructions)}
                elif rank is not None:
                    self.put(rank, RankResult.model_validate(request["body"]))
                    answer = {"body": self._wait_for(lambda: self._verdict)}
                else:
                    raise ValueError("a result without a report")
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()
                if self._verdict is not None and rank is not None:
                    self._note(self._answered, rank)
                    return
        if rank is not None:
            self._note(self.gone, rank)

    def _note(self, ranks: set[int], rank: int) -> None:
        with self._changed:
            ranks.add(rank)
            self._changed.notify_all()

    def _wait_for(self, what: Callable[[], Facts | None]) -> dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: what() is not None)
            found = what()
        return found.model_dump() if found is not None else {}


class Visitor:
    """Another rank's side: a connection to rank 0 on which questions are asked; each is bounded by `until`.

    Every method raises PeerLostError when rank 0 does not answer in time, or answers nonsense.
    """

    def __init__(self, connection: socket.socket, place: str) -> None:
        self._connection = connection
        self._stream = connection.makefile("rwb")
        self._place = place

    def clock_skew(self) -> float:
        """Seconds by which our clock is ahead of rank 0's: that of the quickest of a few answers."""
        best: tuple[float, float] | None = None
        for _ in range(_CLOCK_QUESTIONS):
            sent = time.time()
            answer = self._ask({"ask": "time"}, time.monotonic() + _GREETING_SECONDS)
            back = time.time()
            skew = (sent + back) / 2 - float(answer["time"])
            if best is None or back - sent < best[0]:
                best = (back - sent, skew)
        return best[1] if best else 0.0

    def report(self, facts: RankFacts, until: float) -> Instructions:
        """Tell rank 0 our facts; what it wants of us next."""
        answer = self._ask({"ask": "report", "body": facts.model_dump()}, until)
        return Instructions.model_validate(answer["body"])

    def result(self, result: RankResult, until: float) -> Verdict:
        """Tell rank 0 what we saw; how it all ended."""
        answer = self._ask({"ask": "result", "body": result.model_dump()}, until)
        return Verdict.model_validate(answer["body"])

    def _ask(self, question: dict[str, Any], until: float) -> dict[str, Any]:
        try:
            self._connection.settimeout(max(0.1, until - time.monotonic()))
            self._stream.write(json.dumps(question).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline(_LONGEST_LINE)
            if not line:
                raise PeerLostError(f"rank 0 at {self._place} went away", "see its output")
            answer = json.loads(line)
            if not isinstance(answer, dict) or not answer.keys() & {"time", "body"}:
                raise ValueError("not an answer")
        except TimeoutError as error:
            raise PeerLostError(f"rank 0 at {self._place} did not answer in time", "see its output") from error
        except OSError as error:
            raise PeerLostError(f"lost rank 0 at {self._place}: {error.strerror or error}", "see its output") from error
        except ValueError as error:
            raise PeerLostError(
                f"who listens at {self._place} is not the preflight of rank 0", "choose another MASTER_PORT"
            ) from error
        return answer
