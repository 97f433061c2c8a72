"""One rank of the commit protocol without torch: started by tests, killed by them or by itself.

Speaks JSON lines with a hub: writes one object, reads the list of all ranks' objects. argv: directory, rank,
world size, steps, and optionally `rank:phase:step` at which to die.
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.commit_model import commit_step  # noqa: E402


def main() -> None:
    directory, rank, world_size, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    fault = sys.argv[5] if len(sys.argv) > 5 else ""

    def exchange(message: dict) -> list:
        print(json.dumps({"exchange": message}), flush=True)
        return json.loads(sys.stdin.readline())

    for step in range(1, steps + 1):

        def on_phase(phase: str, step: int = step) -> None:
            if f"{rank}:{phase}:{step}" == fault:
                os.kill(os.getpid(), signal.SIGKILL)

        commit_step(directory, step, rank=rank, world_size=world_size, exchange=exchange, on_phase=on_phase)
        print(json.dumps({"committed": step}), flush=True)


main()
