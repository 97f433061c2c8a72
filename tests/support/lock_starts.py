"""Many starts on one run directory at the same moment: forks them, lets them all go, prints how each ended.

argv: directory, starts, "kernel" or "holder only" (no kernel lock, every start on a host of its own). Torch-free.
Prints a JSON list of exit codes: 0 held the directory until the end, 77 was refused.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer import locks, run_lock  # noqa: E402
from trainer.errors import RunLockedError  # noqa: E402


def start(directory: Path, number: int, kind: str, gate: int, end: int) -> int:
    if kind == "holder only":

        def refuse(*arguments: object) -> None:
            raise OSError(38, "Function not implemented")

        locks.fcntl.flock = refuse
        run_lock.socket.gethostname = lambda: f"node{number:03d}"
        run_lock._boot_id = lambda: f"boot {number}"
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - it warns of the missing lock
    os.read(gate, 1)
    try:
        with run_lock.take(directory, period=30):
            os.read(end, 1)
            return 0
    except RunLockedError as error:
        return error.exit_code


def main() -> None:
    directory, starts, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    gate, open_gate = os.pipe()
    end, open_end = os.pipe()
    children = []
    for number in range(starts):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(open_gate)
                os.close(open_end)
                code = start(directory, number, kind, gate, end)
            os._exit(code)
        children.append(child)
    os.close(open_gate)
    codes = {}
    # The losers end by themselves; the winner holds on until all of them are gone.
    deadline = time.monotonic() + 60
    while len(codes) < starts - 1 and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    os.close(open_end)
    for child in set(children) - set(codes):
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([codes[child] for child in children]))


main()
