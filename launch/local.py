"""N ranks on this machine, as ordinary processes, without torchrun.

torchrun leaves its workers alive when it is killed, forwards no SIGUSR2 and reports every victim of a failure alike.
Here a killed launcher takes its ranks with it, a request to stop reaches them, and the first failure is named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.processes import HostRanks, RankProcess, free_port, plan_ranks, usable_cores
from launch.supervise import GRACE_SECONDS, SETTLE_SECONDS, Ending, supervise

ADDRESS = "127.0.0.1"


def plan_local(command: Sequence[str], *, processes: int, environ: Mapping[str, str], port: int) -> list[RankProcess]:
    """What `launch_local` would start."""
    return plan_ranks(
        command,
        ranks=processes,
        world_size=processes,
        master_address=ADDRESS,
        master_port=port,
        environ=environ,
        launcher_pid=os.getpid(),
        cores=usable_cores(),
        directory=str(Path.cwd()),
    )


def launch_local(
    command: Sequence[str],
    *,
    processes: int,
    environ: Mapping[str, str],
    run_dir: Path,
    grace_seconds: float = GRACE_SECONDS,
    settle_seconds: float = SETTLE_SECONDS,
) -> Ending:
    """Run `command` as `processes` ranks to their end (see `supervise`)."""
    plan = plan_local(command, processes=processes, environ=environ, port=free_port(ADDRESS))
    # On a terminal rank 0 writes straight to it, so that its progress bar works.
    ranks = HostRanks(plan, inherit_stdout_of=0 if sys.stdout.isatty() else None)
    return supervise(
        ranks, world_size=processes, run_dir=run_dir, grace_seconds=grace_seconds, settle_seconds=settle_seconds
    )
