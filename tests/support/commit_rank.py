"""One rank of the commit protocol without torch: started by tests, killed by them or by itself.

Speaks JSON lines with a hub: writes one object, reads the list of all ranks' objects. argv: directory, rank,
world size, steps, and optionally `rank:phase:step` at which to die.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.checkpoint.commit import Writer, commit_checkpoint  # noqa: E402
from trainer.checkpoint.slices import KINDS, rank_file, slice_key  # noqa: E402
from trainer.checkpoint.verify import Manifest  # noqa: E402
from trainer.tensor_file import TensorFileWriter  # noqa: E402

ELEMENTS = 6_000


def main() -> None:
    directory, rank, world_size, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    fault = sys.argv[5] if len(sys.argv) > 5 else ""
    share = ELEMENTS // world_size

    def exchange(message: dict) -> list:
        print(json.dumps({"exchange": message}), flush=True)
        return json.loads(sys.stdin.readline())

    for step in range(1, steps + 1):

        def on_phase(phase: str, step: int = step) -> None:
            if f"{rank}:{phase}:{step}" == fault:
                os.kill(os.getpid(), signal.SIGKILL)

        def write(place: Path, step: int = step) -> dict:
            name = rank_file(rank, world_size)
            keys = [slice_key(kind, rank * share, "weight") for kind in KINDS]
            with TensorFileWriter(place / name, dict.fromkeys(keys, ("F32", (share,)))) as file:
                for key in keys:
                    file.write(key, np.full(share, step, np.float32))
                    on_phase("middle of the file", step)
            return {name: {"bytes": file.finished.bytes, "xxh3_128": file.finished.xxh3_128}}

        def describe(files: dict, step: int = step) -> Manifest:
            parameters = {"weight": {"shape": [ELEMENTS], "dtype": "float32"}}
            return Manifest(step, world_size, files, parameters, {}, {}, {}, {})

        commit_checkpoint(directory, step, Writer(rank, write, exchange, on_phase), describe, keep=2)
        print(json.dumps({"committed": step}), flush=True)


main()
