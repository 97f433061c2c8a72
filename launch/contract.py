"""What makes a process a rank: six environment variables, the same ones torchrun sets.

The local launcher, the Ray launcher and torchrun do nothing but start `steadfast train CONFIG ...` with them. All six
are there (a rank), or none (nobody launched us); anything between is a broken launcher and is refused, because a rank
that guesses its place waits for peers that never come.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.errors import UsageError
from trainer.world import World

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PID = "STEADFAST_LAUNCHER_PID"
_STEP_VARIABLES = (
    "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip


def resolve(environ: Mapping[str, str]) -> World | None:
    """Our place among the ranks, or None when no launcher started us.

    Raises UsageError for variables that are half set, are not numbers or contradict each other, and for one of several
    tasks of srun that has none of them: each would train a run of its own in the same place.
    """
    given = [name for name in VARIABLES if environ.get(name, "") != ""]
    if not given:
        if tasks := _tasks_of_a_slurm_step(environ):
            raise UsageError(
                f"srun started {tasks} tasks, but none of {', '.join(VARIABLES)} is set",
                "start the job with sbatch slurm/sft.sh CONFIG, which sets them for every task (or use srun -n 1)",
            )
        return None
    if missing := [name for name in VARIABLES if name not in given]:
        remedy = "a launcher sets all six; to start without one: unset " + " ".join(given)
        if _tasks_of_a_slurm_step(environ):
            remedy = "srun sets none of them: start the job with sbatch slurm/sft.sh CONFIG, which sets all six"
        raise UsageError(f"{', '.join(given)} set in the environment but not {', '.join(missing)}", remedy)
    number = {name: _whole_number(name, environ[name]) for name in NUMBERS}
    world = World(
        rank=number["RANK"],
        world_size=number["WORLD_SIZE"],
        local_rank=number["LOCAL_RANK"],
        local_world_size=number["LOCAL_WORLD_SIZE"],
        master_address=environ["MASTER_ADDR"],
        master_port=number["MASTER_PORT"],
    )
    for fits, problem in (
        (world.rank < world.world_size, f"RANK={world.rank} is not below WORLD_SIZE={world.world_size}"),
        (
            world.local_rank < world.local_world_size,
            f"LOCAL_RANK={world.local_rank} is not below LOCAL_WORLD_SIZE={world.local_world_size}",
        ),
        (
            world.local_world_size <= world.world_size,
            f"LOCAL_WORLD_SIZE={world.local_world_size} is above WORLD_SIZE={world.world_size}",
        ),
        (0 < world.master_port < 1 << 16, f"MASTER_PORT={world.master_port} is not a port"),
    ):
        if not fits:
            raise UsageError(f"{problem} in the environment", "the launcher that set it is wrong")
    return world


def rank_environment(world: World) -> dict[str, str]:
    """The six variables that make a process this rank."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.world_size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_world_size),
        "MASTER_ADDR": world.master_address,
        "MASTER_PORT": str(world.master_port),
    }


def _whole_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(
            f"{name}={text!r} in the environment is not a whole number", "the launcher that set it is wrong"
        )
    return int(text)


def world_of_step(environ: Mapping[str, str]) -> World | None:
    """The place of a task of srun, when the job gives MASTER_ADDR and MASTER_PORT to all of its tasks; else None."""
    if not all(environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", *_STEP_VARIABLES)):
        return None
    counts: list[int] = []
    # Slurm's short form: 2(x3),1 is 2, 2, 2, 1.
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(times or 1)
    step = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environ["SLURM_NODEID"])]),
    }
    return resolve({name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")} | step)


def _tasks_of_a_slurm_step(environ: Mapping[str, str]) -> int:
    """Tasks that srun started beside us and us, when there are several; else 0.

    A shell of salloc, a batch script and a notebook in a job have variables of Slurm too, but are no task of a step,
    or the only one.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ or not tasks.isdigit():
        return 0
    return int(tasks) if int(tasks) > 1 else 0
