"""Plain processes as ranks, with a hub between them in place of collectives: torch-free, so they can be killed often.

A rank writes JSON lines: {"exchange": object} asks for the list of all ranks' objects, anything else is collected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def run_ranks(
    script: Path, arguments: list[Any], world_size: int = 2, environment: dict[str, str] | None = None, on_start=None
) -> tuple[list[dict], list[int]]:
    """Run `script RANK WORLD_SIZE ARGUMENTS...` on every rank; (all messages, exit codes). One dead rank ends all.

    `on_start(processes)` runs in a thread of its own.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world_size), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        for rank in range(world_size)
    ]
    if on_start is not None:
        threading.Thread(target=on_start, args=(ranks,), daemon=True).start()
    messages: list[dict] = []
    waiting: dict[int, dict] = {}
    try:
        while True:
            for rank, process in enumerate(ranks):
                while rank not in waiting:
                    line = process.stdout.readline()
                    if not line:
                        raise EOFError
                    message = json.loads(line)
                    if "exchange" in message:
                        waiting[rank] = message["exchange"]
                    else:
                        messages.append(message)
            reply = json.dumps([waiting.pop(rank) for rank in range(world_size)]) + "\n"
            for process in ranks:
                process.stdin.write(reply)
                process.stdin.flush()
    except (EOFError, BrokenPipeError):
        # One rank is gone or all are done: a launcher would end the others now, but what they said before counts.
        time.sleep(0.02)
        done = all(process.poll() == 0 for process in ranks) or _all_end(ranks)
        for process in ranks:
            if not done:
                process.kill()
            whole = (json.loads(line) for line in process.stdout if line.endswith("}\n"))
            messages.extend(message for message in whole if "exchange" not in message)
    codes = [process.wait() for process in ranks]
    for process in ranks:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
    return messages, codes


def _all_end(ranks: list[subprocess.Popen]) -> bool:
    """Whether all ranks end by themselves, soon, without an error."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if any(code for code in codes):
            return False
        if all(code == 0 for code in codes):
            return True
        time.sleep(0.01)
    return False
