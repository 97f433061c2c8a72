"""One task of srun: starts its rank, passes on signals and output, and tells the job how the rank ended.

srun itself returns the highest exit code of many tasks and knows nothing of who came first; a rank that is killed can
say nothing at all. So each rank has this process (no torch, some megabytes) as its parent.

SIGUSR2 and SIGTERM ask the rank for an agreed checkpoint: Slurm sends SIGTERM to a step, and there to every process,
when it preempts a job without a warning. SIGUSR1 ends the rank at once; the job sends it when another rank has failed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.contract import LAUNCHER_PID, NUMBERS, rank_environment, world_of_step
from launch.processes import Ended, HostRanks, RankProcess, usable_cores
from launch.slurm.srun import ENDED, STARTED
from trainer.errors import UsageError

# What a rank shall have unless the site says otherwise.
DEFAULTS = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "NCCL_DEBUG": "WARN"}


def plan_task(command: Sequence[str], environ: Mapping[str, str], *, cores: int, directory: str) -> RankProcess:
    """What to start for this task. Pure but for the process id of the launcher: ours.

    Raises UsageError outside of a task of a Steadfast job.
    """
    world = world_of_step(environ)
    if world is None:
        raise UsageError("this is no task of a Steadfast job in Slurm", "submit one: sbatch slurm/sft.sh CONFIG")
    # srun gives every task cores of its own, where Slurm binds; where it does not, the ranks of a node share them.
    mine = int(environ.get("SLURM_CPUS_PER_TASK") or max(1, cores // world.local_world_size))
    shared = {
        # Where DeepSpeed and torch compile: never in a home that all nodes share, behind one lock.
        "TORCH_EXTENSIONS_DIR": str(
            Path(tempfile.gettempdir()) / f"torch-extensions-{os.getuid()}-{zlib.crc32(sys.prefix.encode()):08x}"
        ),
        "OMP_NUM_THREADS": str(min(mine, cores)),
    }
    kept = {name: text for name, text in environ.items() if name not in NUMBERS}
    environment = DEFAULTS | shared | kept | {LAUNCHER_PID: str(os.getpid())} | rank_environment(world)
    return RankProcess(world.rank, [*command], environment, directory)


def run_task(command: Sequence[str]) -> int:
    """Run the rank of this task to its end; returns its exit code, or 128 + the signal that killed it."""
    arrived: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: arrived.append(number))
    plan = plan_task(command, os.environ, cores=usable_cores(), directory=str(Path.cwd()))
    ranks = HostRanks([plan])
    # The rank inherits this mask and so never sees the SIGTERM that Slurm sends to every process of a step.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ranks.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _tell(STARTED, {"host": socket.gethostname(), "step": _step(os.environ)})
    while True:
        while arrived:
            ranks.signal(_SIGNALS[signal.Signals(arrived.pop(0))])
        for event in ranks.next_events(0.1):
            if isinstance(event, Ended):
                details = {"pid": event.pid, "status": event.status, "when": event.when, "host": socket.gethostname()}
                _tell(ENDED, details)
                ranks.close()
                return event.status if event.status >= 0 else 128 - event.status
            stream = sys.stdout if event.stream == "stdout" else sys.stderr
            stream.write(f"{event.line}\n")
            stream.flush()


# What arrives here, and what the rank gets of it.
_SIGNALS = {
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGTERM: signal.SIGUSR2,
    signal.SIGUSR1: signal.SIGKILL,
}


def _step(environ: Mapping[str, str]) -> str:
    return f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"


def _tell(what: str, details: Mapping[str, object]) -> None:
    sys.stderr.write(f"{what}{json.dumps(details)}\n")
    sys.stderr.flush()
