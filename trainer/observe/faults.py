"""Faults as data: where a run shall fail, on which rank, at which phase of which step. For drills and tests only.

    faults = [fail_at(1, "step", 7), fail_at(0, "save:commit", 4, "stop"), fail_at(0, "data", 9, "sleep", 5)]
    environment[FAULTS] = as_text(faults)          # STEADFAST_FAULTS, read by every rank when its run is put together
    ...                                            # start the run as usual
    missed = not_fired(run_dir, faults)            # a fault that never fired is a failed test

A fault fires once in the life of a run directory, as its phase begins or `after` seconds later: it is written to
run.dir/faults.jsonl (forced to disk) before it acts, and one that is written there is not armed again, so a restarted
run gets past it. Two equal faults count as one: give them different steps, or wait for the first.

Phases, in the order of a run; `step` is the step that is being made (1 is the first) and 0 before the first:

    start       the ranks have met
    load        the model is built
    restore     the newest checkpoint is looked for and read
    data forward backward step agree observe
                the parts of a step; forward and backward come once a micro-batch
    evaluate    once a micro-batch, `step` is the newest step
    save        a checkpoint is due, `step` is the step that is saved
    save:NAME   the phases of the commit protocol, e.g. save:open, save:write, save:commit, save:rename;
                `step` is the newest step by then, which a save in the background may be behind
    end         training is over, everything is committed

Kinds:

    kill term stop   the rank gets SIGKILL, SIGTERM, SIGSTOP
    sleep            the rank sleeps `seconds` (an hour, when 0) in its main thread
    spin             the main thread computes for ever in C code that keeps the interpreter's lock
    nan              forward: loss and gradient of this micro-batch are NaN; backward: the gradient only
    raise            RuntimeError
    enospc           OSError, no space left on device

Torch-free.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from trainer.errors import UsageError
from trainer.observe.ledger import JsonLines, read_lines

FAULTS = "STEADFAST_FAULTS"
"""Environment variable with a JSON list of faults."""
LEDGER = "faults.jsonl"
Kind = Literal["kill", "term", "stop", "sleep", "spin", "nan", "raise", "enospc"]
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Fault:
    """One fault; see the module for phases and kinds."""

    rank: int
    phase: str
    step: int
    kind: Kind
    seconds: float = 0.0
    """How long a sleep lasts."""
    after: float = 0.0
    """Signals only: seconds between the begin of the phase and the signal."""


def fail_at(
    rank: int, phase: str, step: int, kind: Kind = "kill", seconds: float = 0.0, *, after: float = 0.0
) -> Fault:
    """The fault `kind` on `rank` as `phase` of `step` begins."""
    return Fault(rank, phase, step, kind, seconds, after)


def as_text(faults: Iterable[Fault]) -> str:
    """The value of STEADFAST_FAULTS."""
    return json.dumps([asdict(fault) for fault in faults])


def planned(environ: Mapping[str, str]) -> list[Fault]:
    """The faults that the environment asks for; UsageError when they cannot be understood."""
    try:
        faults = [Fault(**entry) for entry in json.loads(environ.get(FAULTS) or "[]")]
        unknown = [fault.kind for fault in faults if fault.kind not in get_args(Kind)]
        if unknown:
            raise ValueError(f"no kind {unknown[0]}")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{FAULTS} holds no list of faults: {error}", "see trainer/observe/faults.py") from error
    return faults


def fired(run_dir: Path) -> list[Fault]:
    """The faults that fired in a run directory, in order."""
    names = Fault.__dataclass_fields__
    return [
        Fault(**{name: entry[name] for name in names})
        for entry in read_lines(run_dir / LEDGER)
        if entry.get("event") == "fault injected"
    ]


def not_fired(run_dir: Path, faults: Iterable[Fault]) -> list[Fault]:
    """Those of `faults` that never fired in a run directory."""
    seen = set(fired(run_dir))
    return [fault for fault in faults if fault not in seen]


class Faults:
    """Fires the faults of one rank. Call it with (phase, step) as each phase begins."""

    def __init__(self, faults: Sequence[Fault], rank: int, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._armed = [fault for fault in not_fired(run_dir, faults) if fault.rank == rank] if faults else []
        self._poisoned: set[str] = set()

    @property
    def poisons(self) -> bool:
        """Whether a NaN may come."""
        return any(fault.kind == "nan" for fault in self._armed)

    def __call__(self, phase: str, step: int) -> None:
        """Fire what is due. Returns at once, after a sleep, or not at all."""
        for fault in [fault for fault in self._armed if (fault.phase, fault.step) == (phase, step)]:
            self._armed.remove(fault)
            if fault.after and fault.kind in _SIGNALS:
                timer = threading.Timer(fault.after, self._act, [fault])
                timer.daemon = True
                timer.start()
            else:
                self._act(fault)

    def take_poison(self, phase: str) -> bool:
        """Whether a NaN was ordered for this phase; asking takes it away."""
        found = phase in self._poisoned
        self._poisoned.discard(phase)
        return found

    def _act(self, fault: Fault) -> None:
        self._note(fault)
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
        elif fault.kind == "sleep":
            time.sleep(fault.seconds or 3600.0)
        elif fault.kind == "spin":
            # Exponential in the length of the text, and all of it inside one call that no other thread can interrupt.
            re.match("(a+)+b", "a" * 64)
        elif fault.kind == "nan":
            self._poisoned.add(fault.phase)
        elif fault.kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected at {fault.phase} of step {fault.step}")
        else:
            raise RuntimeError(f"injected on rank {fault.rank} at {fault.phase} of step {fault.step}")

    def _note(self, fault: Fault) -> None:
        lines = JsonLines(self._run_dir / LEDGER, durable=True)
        time_now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines.append({"event": "fault injected", "time": time_now, **asdict(fault)})
        lines.close()


class PoisonedEngine:
    """An engine whose losses or gradients become NaN when a fault says so; everything else is the engine's own."""

    def __init__(self, engine: Any, take_poison: Callable[[str], bool]) -> None:
        self._engine = engine
        self._take_poison = take_poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def summed_loss(self, batch: Any) -> Any:
        """See Engine.summed_loss."""
        loss = self._engine.summed_loss(batch)
        return loss * float("nan") if self._take_poison("forward") else loss

    def backward(self, summed_loss: Any, global_supervised_tokens: int) -> None:
        """See Engine.backward."""
        poisoned = summed_loss * float("nan") if self._take_poison("backward") else summed_loss
        self._engine.backward(poisoned, global_supervised_tokens)
