"""Try what a training run needs, on every host and within a minute, before the run is started.

steadfast preflight configs/tiny.yaml --nproc 2
srun ... steadfast preflight CONFIG        (a process a rank or a host, with the variables of a rank or MASTER_ADDR
                                            and MASTER_PORT; jobs of Slurm and Ray do it by themselves)

One line a host: the same code, configuration and versions; run.dir shared and large enough; the rendezvous, clocks,
limits, GPUs, the first all-reduces. Exit codes: 0 fit, warnings or not; 2 the hosts differ; 66 an input is missing;
69 a host does not answer or is not well (an --exclude= line leaves it out); 73 run.dir cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys

from launch.contract import VARIABLES, resolve, world_of_step
from launch.local import ADDRESS, plan_local
from launch.preflight.rank import Rank, Wish
from launch.preflight.watch import watch
from launch.processes import HostRanks, free_port
from launch.signals import die_with_launcher
from launch.train_command import checked_config, require_gpus
from trainer.checkout import ROOT
from trainer.config.arguments import add_config_arguments
from trainer.config.device import guess_device
from trainer.config.load import load_config
from trainer.errors import UsageError
from trainer.world import World

_SHORTEST, _LONGEST = 10, 600


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `preflight CONFIG [section.key=value ...]`."""
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (1 when not given)")
    parser.add_argument("--ranks-per-host", type=int, metavar="K", help="ranks of the run on a host, if not as here")
    parser.add_argument("--within", type=int, default=60, metavar="SECONDS", help="bound on all of it")
    parser.add_argument("--no-collectives", action="store_true", help="leave out the first all-reduces, and torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead (rank 0)")


def run(arguments: argparse.Namespace) -> int:
    """Be one rank of the preflight when a launcher started us, else start its ranks here; returns the exit code."""
    if not _SHORTEST <= arguments.within <= _LONGEST:
        raise UsageError(f"--within {arguments.within}", f"give {_SHORTEST} to {_LONGEST} seconds")
    world, ranks = _place(), 1 if arguments.nproc is None else arguments.nproc
    if world is not None and ranks > 1:
        raise UsageError(f"--nproc {ranks} inside a launched rank (RANK={world.rank})", "drop --nproc")
    if world is None:
        require_gpus("--nproc", ranks, os.environ)
        config = checked_config(arguments.config, arguments.overrides, ranks, guess_device(os.environ))
        if ranks > 1:
            return _start_here([sys.executable, str(ROOT / "steadfast.py"), *_words(arguments)], ranks)
        world = World(0, 1, 0, 1, ADDRESS, free_port(ADDRESS))
    else:
        if (reason := die_with_launcher(os.environ)) is not None and world.is_first:
            sys.stderr.write(f"warning: {reason}\n")
        config = load_config(arguments.config, arguments.overrides)
    wish = Wish(
        within=arguments.within,
        collectives=not arguments.no_collectives,
        ranks_per_host=arguments.ranks_per_host,
        json=arguments.json,
    )
    return Rank(world, config, wish).check()


def _place() -> World | None:
    """Our place among the ranks: from the contract, or from srun, which has no process between itself and us."""
    if any(os.environ.get(name) for name in VARIABLES if not name.startswith("MASTER_")):
        return resolve(os.environ)
    return world_of_step(os.environ) or resolve(os.environ)


def _start_here(command: list[str], ranks: int) -> int:
    """Start the ranks of a preflight on this machine; returns the code of rank 0, which speaks for all of them."""
    plan = plan_local(command, processes=ranks, environ=os.environ, port=free_port(ADDRESS))
    return watch(HostRanks(plan, inherit_stdout_of=0), ranks)


def _words(arguments: argparse.Namespace) -> list[str]:
    words = ["preflight", str(arguments.config), *arguments.overrides, "--within", str(arguments.within)]
    words += ["--json"] * arguments.json + ["--no-collectives"] * arguments.no_collectives
    words += ["--traceback"] * arguments.traceback
    return words + (["--ranks-per-host", str(arguments.ranks_per_host)] if arguments.ranks_per_host else [])
