"""Measurements in processes of their own: CPU seconds of the part that matters, interleaved rounds, best of N.

Every measurement of every contender is a fresh Python process, so that no import, cache or memory of one helps or
hurts another; imports and opening files are outside the measured part unless they are what is measured. Contenders
take turns, round by round, so a busy moment of the machine hits all of them alike. The best round counts.

    python -m tools.benchmarks.measure MODULE:FUNCTION '{"json": "arguments"}' RESULT.json
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.checkout import ROOT

INSTALL = "pip install --no-deps -r tools/bench-requirements.txt"
# One core each: the figures are per core, and the machine may be shared.
ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
}
TIMEOUT_SECONDS = 7200.0
CHILDREN_SAMPLE_SECONDS = 0.5

Facts = dict[str, Any]
Say = Callable[[str], None]


class Stopwatch:
    """CPU seconds (user and system, finished child processes included) and wall seconds of a `with` block."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self._began = time.perf_counter()

    def so_far(self) -> float:
        """Wall seconds since the block began."""
        return time.perf_counter() - self._began


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure a block."""
    cpu = _cpu_seconds()
    watch = Stopwatch()
    yield watch
    watch.wall = watch.so_far()
    watch.cpu = _cpu_seconds() - cpu


@contextmanager
def memory_of_children() -> Iterator[Facts]:
    """Most memory that all child processes held together during a block, in bytes; what they share counts once.

    `anonymous` is what they allocated; `mapped` are pages of files, which the system takes back when it needs memory.
    """
    import psutil

    found: Facts = {"anonymous": 0, "mapped": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(CHILDREN_SAMPLE_SECONDS):
            held = [_proportional(child.pid) for child in psutil.Process().children(recursive=True)]
            for place, name in enumerate(found):
                found[name] = max(found[name], sum(each[place] for each in held))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        ended.set()
        sampler.join()


def _proportional(process: int) -> tuple[int, int]:
    """Anonymous and mapped bytes of a process, shared pages divided among their owners; none when it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)}
        return sizes["Pss_Anon"], sizes["Pss_File"]
    return 0, 0


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@dataclass(frozen=True)
class Contender:
    """One way of doing the work of a comparison.

    `function` is `module:function`, called with `arguments` in a process of its own; it returns facts, among them
    `cpu` (seconds) and what the comparison needs. `package` is the distribution it is about, if any. `goal` says how
    many times as good as this contender Steadfast wants to be, at least.
    """

    name: str
    function: str
    arguments: Facts
    package: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a contender: the facts of its best round, or why there are none."""

    name: str
    facts: Facts | None
    why_not: str = ""
    all_cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One line of the report.

    `value` is in `unit`; `ratio` says how many times as good Steadfast was in the same run (None for Steadfast itself,
    and where there is nothing to compare); `goal` is the least ratio wanted; `facts` are the raw measurements.
    """

    section: str
    contender: str
    value: float | None
    unit: str
    ratio: float | None = None
    goal: float | None = None
    note: str = ""
    facts: Facts = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None when there is none or nothing was measured."""
        return None if self.goal is None or self.ratio is None else self.ratio >= self.goal


def run_rounds(contenders: Sequence[Contender], rounds: int, say: Say) -> list[Outcome]:
    """Run every contender `rounds` times, taking turns; the round with the least CPU time counts."""
    facts: dict[str, list[Facts]] = {contender.name: [] for contender in contenders}
    failed = {
        contender.name: f"not installed ({INSTALL})"
        for contender in contenders
        if contender.package and installed_version(contender.package) is None
    }
    for number in range(rounds):
        for contender in contenders:
            if contender.name in failed:
                continue
            say(f"{contender.name}, round {number + 1} of {rounds}")
            try:
                facts[contender.name].append(run_apart(contender.function, contender.arguments))
            except RuntimeError as error:
                failed[contender.name] = f"failed: {error}"
    outcomes = []
    for name, found in facts.items():
        if name in failed:
            outcomes.append(Outcome(name, None, failed[name]))
        else:
            best = min(found, key=lambda each: float(each["cpu"]))
            outcomes.append(Outcome(name, best, all_cpu=[float(each["cpu"]) for each in found]))
    return outcomes


def compare(
    section: str,
    unit: str,
    contenders: Sequence[Contender],
    outcomes: Sequence[Outcome],
    note: Callable[[Facts], str],
) -> list[Line]:
    """Lines of a comparison by rate (`work` per `cpu`); the first contender is Steadfast."""
    rates = [None if item.facts is None else float(item.facts["work"]) / float(item.facts["cpu"]) for item in outcomes]
    ours = rates[0]
    return [
        Line(
            section,
            named(contender),
            rate,
            unit,
            ratio=ours / rate if ours and rate and contender is not contenders[0] else None,
            goal=contender.goal,
            note=note(outcome.facts) if outcome.facts is not None else outcome.why_not,
            facts={**(outcome.facts or {}), "all_cpu": outcome.all_cpu},
        )
        for contender, outcome, rate in zip(contenders, outcomes, rates, strict=True)
    ]


def named(contender: Contender) -> str:
    """The contender's name, with the version of its package."""
    version = installed_version(contender.package) if contender.package else None
    return f"{contender.name} ({contender.package} {version})" if version else contender.name


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run_apart(function: str, arguments: Facts) -> Facts:
    """Call `module:function` with `arguments` in a fresh process and return its facts.

    Raises:
        RuntimeError: it failed; the message is the last line it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="steadfast-bench-") as directory:
        result = Path(directory, "result.json")
        command = [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.measure", function, json.dumps(arguments)]
        try:
            done = subprocess.run(
                [*command, str(result)],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no end after {TIMEOUT_SECONDS:.0f} s") from error
        if done.returncode != 0 or not result.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError((lines or [f"exit code {done.returncode}"])[-1][:300])
        facts: Facts = json.loads(result.read_text(encoding="utf-8"))
        return facts


def _main(function: str, arguments: str, result: str) -> None:
    module, _, name = function.partition(":")
    facts = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
    # The facts are written. Threads that libraries left running may crash the interpreter's end.
    os._exit(0)
