"""Stands in for srun on one node: starts the tasks, numbers their lines, passes signals on, returns the highest code.

Like srun it knows --ntasks, and takes the first word that is no option for the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO


def family(pid: int) -> list[int]:
    """The process and its descendants: Slurm signals all of them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def main() -> int:
    options = []
    words = sys.argv[1:]
    while words[0].startswith("--"):
        options.append(words.pop(0))
    tasks = int(next(option for option in options if option.startswith("--ntasks=")).partition("=")[2])
    processes = []
    for rank in range(tasks):
        place = {
            "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_LOCALID": rank, "SLURM_NODEID": 0,
            "SLURM_STEP_TASKS_PER_NODE": tasks,
        }  # fmt: skip
        environ = os.environ | {name: str(number) for name, number in place.items()}
        processes.append(
            subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        )
    Path(os.environ["FAKE_SRUN_TASKS"]).write_text(" ".join(str(process.pid) for process in processes))

    def forward(number: int, _: object) -> None:
        for process in processes:
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, forward)
    lock = threading.Lock()

    def copy(rank: int, pipe: IO[bytes], target: IO[bytes]) -> None:
        for line in pipe:
            with lock:
                target.write(f"{rank}: ".encode() + line)
                target.flush()

    threads = [
        threading.Thread(target=copy, args=(rank, pipe, target))
        for rank, process in enumerate(processes)
        for pipe, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    ]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in processes]
    for thread in threads:
        thread.join()
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
