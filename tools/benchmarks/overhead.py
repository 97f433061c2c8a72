"""What watching and recording a run cost of its steps: ledgers, metrics, heartbeat, stragglers, votes on saves.

A real run of `steadfast train`, DeepSpeed and all, whose loop is given the same observers with a stopwatch around each.
Measured on rank 0, which has all of them; the watchdog is a process of its own, and its CPU time is told beside.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tools.benchmarks.checkpoint import MODELS, build_store
from tools.benchmarks.measure import Facts, Line, Say, run_apart

SECTION = "overhead"
GOAL = 100.0
"""A step takes a hundred times what watching and recording it do, at least."""
ROWS, SEQUENCE_LENGTH = 4, 256
"""A step: that of `steadfast demo`, on one rank."""
WARM_UP = 20
STEPS = {"demo": 300, "300m": 12, "quick": 10}


def run(work: Path, models: list[str], rounds: int, seed: int, say: Say) -> list[Line]:
    """A line for each model; the round with the least share counts."""
    lines = []
    for name in models:
        store = build_store(work, MODELS[name].vocabulary_size, SEQUENCE_LENGTH, seed, say)
        found = []
        for number in range(rounds):
            say(f"{SECTION}: {name}, round {number + 1}")
            run_dir = work / f"overhead-{name}-{number}"
            warm_up = min(WARM_UP, STEPS[name] // 3)
            values = {
                "run": {"dir": str(run_dir)},
                "model": {"config": MODELS[name].config, "dtype": "float32", "gradient_checkpointing": False},
                "data": {"train": str(store)},
                "train": {"max_steps": warm_up + STEPS[name], "global_batch_size": ROWS, "micro_batch_size": 2},
                "engine": {"deepspeed": MODELS[name].deepspeed},
                "checkpoint": {"every_steps": warm_up + STEPS[name], "keep": 1},
            }
            config = run_dir.with_suffix(".json")
            config.write_text(json.dumps(values))
            arguments = {"config": str(config), "warm_up": warm_up}
            found.append(run_apart("tools.benchmarks.overhead:train_timed", arguments))
        lines.append(_line(name, found))
    return lines


def _line(name: str, found: list[Facts]) -> Line:
    best = min(found, key=lambda facts: float(facts["watching"]) / float(facts["step"]))
    share = best["watching"] / best["step"]
    return Line(
        SECTION,
        f"{name}, one rank",
        best["watching"] * 1e6,
        "us a step",
        ratio=1 / share,
        goal=GOAL,
        note=f"{share:.2%} of a step of {best['step'] * 1e3:,.1f} ms (means of {best['steps']} steps of {ROWS} x "
        f"{SEQUENCE_LENGTH} tokens, one in ten logged); the watchdog's process: {best['watchdog']:.2%} of a core",
        facts=best,
    )


@dataclass
class _Stopwatch:
    """Seconds spent in what is watched, by step."""

    watching: dict[int, float] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    step: int = 0

    def of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with its time added to the step in work."""

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self.watching[self.step] = self.watching.get(self.step, 0.0) + time.perf_counter() - started
            return result

        return timed

    def of_phase(self, call: Callable[[str, int], None]) -> Callable[[str, int], None]:
        """The same of the callback that begins phases; a step begins with its data."""
        timed = self.of(call)

        def on_phase(phase: str, step: int) -> None:
            if phase == "data":
                self.step = step
                self.began[step] = time.perf_counter()
            timed(phase, step)

        return on_phase


class _Timed:
    """An observer or saver, one of whose methods is timed."""

    def __init__(self, inner: Any, method: str, watch: _Stopwatch) -> None:
        self._inner = inner
        setattr(self, method, watch.of(getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _NeverStopped:
    requested: str | None = None


def train_timed(config: str, warm_up: int) -> Facts:
    """Train as one rank in this process; seconds a step, and of it in what watches (means after `warm_up` steps)."""
    from trainer import assemble
    from trainer.config.load import load_config
    from trainer.loop import fit
    from trainer.world import World

    watch = _Stopwatch()

    def timed_fit(loop: Any, state: Any) -> Any:
        observers = [_Timed(observer, "on_step", watch) for observer in loop.observers]
        saver = _Timed(loop.saver, "settle", watch)
        return fit(replace(loop, observers=observers, saver=saver, on_phase=watch.of_phase(loop.on_phase)), state)

    address = "127.0.0.1"
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
    # DeepSpeed reads them.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port))
    began = time.perf_counter()
    with mock.patch.object(assemble, "fit", timed_fit):
        assemble.train(load_config(Path(config), []), World(0, 1, 0, 1, address, port), _NeverStopped())
    wall = time.perf_counter() - began
    # The last step ends with a save.
    steps = sorted(watch.began)[warm_up:-1]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu": time.process_time(),
        "steps": len(steps),
        "step": statistics.mean(watch.began[step + 1] - watch.began[step] for step in steps),
        "watching": statistics.mean(watch.watching[step] for step in steps),
        "watchdog": (children.ru_utime + children.ru_stime) / wall,
    }
