"""Starts the child with the first collectives (`trainer.probe`) and ends it when time is up, whatever it hangs in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, Queue
from typing import IO, Any

from launch.contract import rank_environment
from launch.preflight.reports import Probe
from trainer.checkout import ROOT
from trainer.world import World


def run_probe(world: World, port: int, seconds: float, *, libraries: bool = False) -> Probe:
    """What the child said until it ended, or was killed after `seconds`; its ranks meet at `port` of MASTER_ADDR.

    `libraries`: it also imports deepspeed and transformers, which takes longer than all the rest.
    """
    environ = {name: text for name, text in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    end = time.monotonic() + seconds
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "trainer.probe", str(os.getpid()), str(max(1, int(seconds)))),
            *(["libraries"] if libraries else []),
        ],
        cwd=ROOT,
        env=environ | rank_environment(replace(world, master_port=port)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines: Queue[bytes] = Queue()
    noise: list[bytes] = []
    readers = [
        threading.Thread(target=_copy, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_copy, args=(child.stderr, noise.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    said: dict[str, Any] = {}
    while said.get("stage") != "done" and "error" not in said:
        with suppress(Empty, ValueError):
            said |= json.loads(lines.get(timeout=0.1))
            continue
        if time.monotonic() > end:
            said["error"] = f"no further within {seconds:.0f} s"
        elif child.poll() is not None and not readers[0].is_alive() and lines.empty():
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
            last = noise[-1].decode(errors="replace").strip() if noise else "it said nothing"
            said["error"] = f"its process ended with {how}: {last}"
    child.kill()
    child.wait()
    return Probe.model_validate(said)


def _copy(lines: IO[bytes] | None, put: Callable[[bytes], None]) -> None:
    for line in lines or ():
        put(line)
