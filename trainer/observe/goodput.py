"""Where the time of a run went: every second between its first and its last record has exactly one class.

    queue               no attempt ran: waiting for an allocation, or for somebody to start it again
    start               launcher, interpreter, imports, rendezvous
    load                token store, model, engine, checkpoint
    compile             what the first step of an attempt took longer than the median of the others
    data_wait           a step waited for its batch
    compute             forward, backward and optimizer of steps that count
    communication_wait  rank 0 waited in collectives, ZeRO's included (on GPUs only in the sum that ends a step)
    checkpoint          training stood still for a save
    evaluation          loss on held-out data
    hang                from the last sign of progress to the end of an attempt that lost a peer or stopped moving
    lost_work           everything of steps that a restart had to do again, and of a step that was cut off
    shutdown            from the last step to the end of the processes

A step counts until an attempt resumes before it; then its first execution is lost work, and the second one counts.
Communication is measured where it costs nothing: gloo's collectives block the program, so their time is known
(`trainer.collectives.blocked_seconds`). Those of a GPU run beside it, and to time them would stop it; there only the
one small sum over all ranks that ends every step is counted, and the rest is in compute. Torch-free.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from statistics import fmean, median
from typing import Any

from trainer.errors import HangError, PeerLostError, StoppedOnRequest
from trainer.observe.ledger import read_lines
from trainer.run_directory import RunDirectory

CLASSES = (
    "queue", "start", "load", "compile", "data_wait", "compute", "communication_wait", "checkpoint", "evaluation",
    "hang", "lost_work", "shutdown",
)  # fmt: skip
PHASES = {"start", "load", "train", "checkpoint", "evaluation", "shutdown"}
"""What a time ledger's phases are called; in `train`, what no step claims is compute."""
_REDONE = {"compile", "data_wait", "compute", "communication_wait", "checkpoint", "evaluation"}
_STUCK = (PeerLostError.exit_code, HangError.exit_code)
_HOURS = 3600.0
ASSUMED_HOURS_BETWEEN_FAILURES = 24.0
"""Believed before anything was seen; weighs as much as one failure that was seen."""


@dataclass(frozen=True)
class Span:
    """A stretch of time with one class."""

    kind: str
    seconds: float
    step: int | None
    """The step that was being worked on; None outside of training."""
    attempt: int
    """0 before the first attempt."""


@dataclass(frozen=True)
class Table:
    """The account of a run."""

    wall_seconds: float
    """From the first to the last record."""
    seconds: dict[str, float]
    """Class to seconds; they add up to the wall time."""
    rank_seconds: dict[str, float]
    """The same times the ranks of each attempt: what an allocation is paid for. Queueing costs nothing."""
    attempts: int
    failures: int
    """Attempts that ended otherwise than done or stopped on request; an attempt that is still running is none."""
    lost_steps: int
    """Steps that were done more than once, counted each time they were lost."""
    step_seconds: float | None
    """Median wall time of a step; None before the first one."""
    save_seconds: float | None
    """Mean time training stood still for a save; None before the first one."""
    restart_seconds: float | None
    """Mean time from the start of an attempt to its first step, the slowness of that step included."""

    @property
    def goodput(self) -> float:
        """Share of the wall time that was compute of steps that count."""
        return self.seconds["compute"] / self.wall_seconds if self.wall_seconds else 0.0


@dataclass
class _State:
    """Where the walk over the lines stands."""

    at: float
    kind: str = "queue"
    step: int | None = None
    attempt: int = 0
    launched: bool = False
    """The launcher has announced this attempt and will announce its end."""
    process: Any = None
    """The rank 0 that is writing; None before it does."""
    spans: list[Span] = field(default_factory=list)

    def spend(self, kind: str, seconds: float, step: int | None) -> None:
        if seconds > 0:
            self.spans.append(Span(kind, seconds, step, self.attempt))

    def until(self, at: float, kind: str | None = None) -> None:
        """Give the time up to `at` to `kind` (default: the phase we are in)."""
        kind = kind or self.kind
        step = self.step if kind in _REDONE or kind == "train" else None
        self.spend("compute" if kind == "train" else kind, at - self.at, step)
        self.at = at

    def finish(self, kind: str) -> None:
        self.kind, self.step, self.process = kind, None, None


def account(lines: Iterable[Mapping[str, Any]]) -> Table:
    """Class every second between the first and the last of `lines` (see `timeline`), in whatever order they come."""
    ordered = sorted(lines, key=lambda line: float(line["at"]))
    if not ordered:
        return _table([], {}, wall=0.0, attempts=0, failures=0, lost_steps=0, step_seconds=[])
    state = _State(float(ordered[0]["at"]))
    ranks: dict[int, int] = {}
    ended_well: dict[int, bool] = {}
    resumes: list[tuple[int, int]] = []
    steps: list[tuple[int, float, int]] = []
    cut_off: int | None = None
    for line in ordered:
        at = float(line["at"])
        match line["mark"]:
            case "submit":
                state.until(at)
            case "launch":
                # Of an attempt whose end nobody recorded we know nothing after its last sign of life.
                state.until(at, "queue" if state.process is not None or state.launched else None)
                state.attempt += 1
                state.finish("start")
                state.launched, cut_off = True, None
            case "end":
                code = int(line["exit_code"])
                well = code in (0, StoppedOnRequest.exit_code)
                if code in _STUCK and cut_off is not None:
                    # Rank 0 could not know why its step did not come to an end.
                    state.spans[cut_off] = replace(state.spans[cut_off], kind="hang")
                cut_off = None
                state.until(at, None if well else _cut_off(state.kind, code))
                ended_well[state.attempt] = well
                state.finish("queue")
                state.launched = False
            case "gone":
                before = len(state.spans)
                state.until(at, _cut_off(state.kind, None) if line.get("failed") else None)
                if line.get("failed") and len(state.spans) > before:
                    cut_off = before
                ended_well[state.attempt] = not line.get("failed")
                state.finish("shutdown" if state.launched else "queue")
            case "step":
                seconds = max(0.0, at - state.at)
                data = min(max(0.0, float(line["data_wait"])), seconds)
                wait = min(max(0.0, float(line["communication_wait"])), seconds - data)
                number = int(line["step"])
                state.spend("data_wait", data, number)
                state.spend("communication_wait", wait, number)
                # Written even when it is empty: it stands for the step.
                state.spans.append(Span("compute", seconds - data - wait, number, state.attempt))
                steps.append((state.attempt, seconds, len(state.spans) - 1))
                state.at, state.step = at, number
            case kind if kind in PHASES:
                if kind == "start":
                    cut_off = None
                    if state.process is not None:
                        state.until(at, "queue")
                    else:
                        state.until(at)
                    if not state.launched or state.process is not None:
                        state.attempt += 1
                    state.process = line.get("process", at)
                    ranks[state.attempt] = int(line["ranks"])
                else:
                    state.until(at)
                    if kind == "train" and "resumed" in line:
                        state.step = int(line["resumed"])
                        resumes.append((len(state.spans), state.step))
                state.kind = kind
    failures = sum(not ended_well.get(attempt, False) for attempt in range(1, state.attempt))
    failures += state.attempt > 0 and not ended_well.get(state.attempt, True)
    spans = _with_lost_work(_with_compile(state.spans, steps), resumes)
    kinds = {place: span.kind for span, place in spans}
    return _table(
        [span for span, _ in spans],
        ranks,
        wall=float(ordered[-1]["at"]) - float(ordered[0]["at"]),
        attempts=state.attempt,
        failures=failures,
        lost_steps=sum(kinds[place] == "lost_work" for _, _, place in steps),
        step_seconds=[seconds for _, seconds, _ in steps],
    )


def timeline(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The lines that `account` reads, of a run directory: launcher's events and time ledger, in order of time."""
    events = (
        # The launcher itself had to be started before it could say so.
        {**entry, "at": entry.get("began") or datetime.fromisoformat(entry["time"]).timestamp(), "mark": entry["event"]}
        for entry in read_lines(run.events)
        if entry.get("event") in ("submit", "launch", "end")
    )
    return heapq.merge(events, read_lines(run.times), key=lambda line: float(line["at"]))


@dataclass(frozen=True)
class Advice:
    """How often to save."""

    seconds: float
    """Best time between saves."""
    steps: int | None
    """The same in steps; None before the first step."""
    waste: float
    """Share of the time that saves and failures will then cost."""
    hours_between_failures: float
    """What the advice believes."""


def advise(table: Table) -> Advice | None:
    """The interval that loses least, from what was measured; None before the first save."""
    if table.save_seconds is None:
        return None
    return advice(
        save_seconds=table.save_seconds,
        step_seconds=table.step_seconds,
        restart_seconds=table.restart_seconds or 0.0,
        hours=(table.wall_seconds - table.seconds["queue"]) / _HOURS,
        failures=table.failures,
    )


def advice(
    *, save_seconds: float, step_seconds: float | None, restart_seconds: float, hours: float, failures: int
) -> Advice:
    """The interval that loses least for a run of so many `hours` and `failures`."""
    between = mean_hours_between_failures(hours, failures)
    seconds = best_interval(save_seconds, between * _HOURS)
    lost = (seconds / 2 + save_seconds + restart_seconds) / (between * _HOURS)
    return Advice(
        seconds=seconds,
        steps=None if not step_seconds else max(1, round(seconds / step_seconds)),
        waste=min(1.0, save_seconds / (seconds + save_seconds) + lost),
        hours_between_failures=between,
    )


def mean_hours_between_failures(hours: float, failures: int) -> float:
    """What `hours` of running with so many failures let one expect, beginning from a belief of one a day."""
    return (ASSUMED_HOURS_BETWEEN_FAILURES + hours) / (1 + failures)


def best_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of work between saves that lose least: Daly's higher-order estimate (2006)."""
    save, mean = max(save_seconds, 1e-3), seconds_between_failures
    if save >= 2 * mean:
        return mean
    ratio = save / (2 * mean)
    return math.sqrt(2 * save * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def _cut_off(kind: str, exit_code: int | None) -> str | None:
    """The class of the time after the last sign of progress in an attempt that failed; None: that of its phase."""
    if exit_code in _STUCK:
        return "hang"
    return "lost_work" if kind == "train" else None


def _with_compile(spans: Sequence[Span], steps: Sequence[tuple[int, float, int]]) -> list[tuple[Span, int]]:
    """The spans with their place, the excess of each attempt's first step taken out of its compute."""
    result = [(span, place) for place, span in enumerate(spans)]
    for _, group in groupby(steps, key=lambda step: step[0]):
        (_, first, place), *others = group
        if not others:
            continue
        compute = spans[place]
        excess = min(compute.seconds, max(0.0, first - median(seconds for _, seconds, _ in others)))
        result[place] = (replace(compute, seconds=compute.seconds - excess), place)
        if excess:
            result.append((replace(compute, kind="compile", seconds=excess), place))
    return sorted(result, key=lambda pair: pair[1])


def _with_lost_work(spans: Sequence[tuple[Span, int]], resumes: Sequence[tuple[int, int]]) -> list[tuple[Span, int]]:
    """Class as lost what was done for steps that a later attempt began again."""
    result: list[tuple[Span, int]] = []
    pending = list(resumes)
    kept: float = math.inf
    for span, place in reversed(spans):
        while pending and pending[-1][0] > place:
            kept = min(kept, pending.pop()[1])
        lost = span.kind in _REDONE and span.step is not None and span.step > kept
        result.append((replace(span, kind="lost_work") if lost else span, place))
    return result[::-1]


def _table(
    spans: Sequence[Span],
    ranks: Mapping[int, int],
    *,
    wall: float,
    attempts: int,
    failures: int,
    lost_steps: int,
    step_seconds: Sequence[float],
) -> Table:
    seconds = dict.fromkeys(CLASSES, 0.0)
    rank_seconds = dict.fromkeys(CLASSES, 0.0)
    restarts: dict[int, float] = defaultdict(float)
    for span in spans:
        seconds[span.kind] += span.seconds
        if span.kind != "queue":
            rank_seconds[span.kind] += span.seconds * ranks.get(span.attempt, 1)
        if span.kind in ("start", "load", "compile"):
            restarts[span.attempt] += span.seconds
    saves = [span.seconds for span in spans if span.kind == "checkpoint"]
    return Table(
        wall_seconds=wall,
        seconds=seconds,
        rank_seconds=rank_seconds,
        attempts=attempts,
        failures=failures,
        lost_steps=lost_steps,
        step_seconds=median(step_seconds) if step_seconds else None,
        save_seconds=fmean(saves) if saves else None,
        restart_seconds=fmean(restarts.values()) if restarts else None,
    )
