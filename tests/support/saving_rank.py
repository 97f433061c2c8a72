"""One rank that "trains" without torch and saves every second step in the background: killed by tests or by itself.

argv: rank, world size, directory, steps, fault. A fault is `rank:R:PHASE:N` or `writer:R:PHASE:N`: SIGKILL when rank R
(or its writer process) enters PHASE for the Nth time. As a writer: argv begins with the word "writer".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.checkpoint.contents import RankContents, TensorSource  # noqa: E402
from trainer.checkpoint.retention import sweep  # noqa: E402
from trainer.checkpoint.saving import Saves  # noqa: E402
from trainer.checkpoint.slices import KINDS, rank_file, slice_key  # noqa: E402
from trainer.checkpoint.verify import Manifest, committed_steps  # noqa: E402
from trainer.checkpoint.writer_process import WriterProcess, be_a_writer  # noqa: E402

ELEMENTS = 6_000


def dies_at(fault: str, who: str):
    """A phase callback that kills this process as `fault` says."""
    counts: dict[str, int] = {}

    def on_phase(phase: str) -> None:
        counts[phase] = counts.get(phase, 0) + 1
        if fault == f"{who}:{phase}:{counts[phase]}":
            print(json.dumps({"fired": fault}), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return on_phase


def main() -> None:
    rank, world_size, directory, steps = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    fault = sys.argv[5] if len(sys.argv) > 5 else ""
    share = ELEMENTS // world_size

    def exchange(message: dict) -> list:
        print(json.dumps({"exchange": message}), flush=True)
        return json.loads(sys.stdin.readline())

    def contents(step: int) -> RankContents:
        def fill(target: np.ndarray) -> None:
            target[...] = step

        keys = [slice_key(kind, rank * share, "weight") for kind in KINDS]
        return RankContents({rank_file(rank, world_size): dict.fromkeys(keys, TensorSource("F32", (share,), fill))})

    def describe(step: int, files: dict) -> Manifest:
        return Manifest(step, world_size, files, {"weight": {"shape": [ELEMENTS], "dtype": "float32"}}, {}, {}, {}, {})

    def tell(reports: list) -> None:
        for report in reports:
            print(json.dumps({report.outcome: report.step, "problem": report.problem}), flush=True)

    if rank == 0:
        sweep(directory)
    newest = exchange({"newest": next(iter(committed_steps(directory)), 0)})[0]["newest"]
    command = [sys.executable, __file__, "writer", str(rank), fault]
    saves = Saves(
        directory, rank, exchange, 2, WriterProcess(command), newest or None, None, dies_at(fault, f"rank:{rank}")
    )
    for step in range(newest + 1, steps + 1):
        time.sleep(0.01)
        votes = exchange({"vote": saves.vote})
        tell(saves.settle(sum(entry["vote"] for entry in votes), world_size))
        if step % 2 == 0:
            tell(saves.begin(step, lambda step=step: contents(step), lambda files, step=step: describe(step, files)))
    tell(saves.wait())
    saves.close()


if sys.argv[1] == "writer":
    be_a_writer(dies_at(sys.argv[3], f"writer:{sys.argv[2]}"))
else:
    main()
