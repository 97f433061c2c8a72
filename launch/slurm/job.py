"""The batch step of a job: start the ranks with srun, watch them, decide what follows, requeue.

SIGUSR2                     the scheduler's warning: agreed checkpoint, then requeue
SIGTERM                     a person's wish (`launch stop --graceful`): agreed checkpoint, then end with 75
half a minute before the    what has not saved by then is killed, and the job is requeued: Slurm would end it
time limit                  for good
a node is lost              Slurm requeues the job by itself; the next attempt resumes
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from launch.attempts import (
    earlier_attempts,
    ended,
    is_finished,
    record_end,
    record_launch,
    write_reference,
)
from launch.decide import Done, GiveUp, decide
from launch.slurm.srun import SrunRanks
from launch.supervise import TIME_LIMIT, Ending, supervise
from launch.train_command import checked_config
from trainer.checkout import ROOT
from trainer.errors import PeerLostError, UsageError
from trainer.observe.clock import process_began
from trainer.run_directory import RunDirectory

LAST_SECONDS = 30.0
FIRST_PORT, PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job."""

    job: str
    restart: int
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    array_task: str = ""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    @property
    def port(self) -> int:
        """Port of the rendezvous, below those that systems hand out by themselves.

        A requeued job takes another one: ranks of its last life, or their connections, may still hold the old one.
        """
        return FIRST_PORT + (int(self.job) * 7 + self.restart * 131) % PORTS


def allocation(environ: Mapping[str, str]) -> Allocation:
    """Read what sbatch tells its script. Raises UsageError outside of a batch step."""
    if missing := [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES") if not environ.get(name)]:
        raise UsageError(
            f"this is no batch job of Slurm: {', '.join(missing)} not set", "submit one: sbatch slurm/sft.sh CONFIG"
        )
    gpus = gpus_of(environ.get("SLURM_GPUS_PER_NODE") or environ.get("SLURM_GPUS_ON_NODE") or "0")
    return Allocation(
        job=environ["SLURM_JOB_ID"],
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=int(environ["SLURM_JOB_NUM_NODES"]),
        ranks_per_node=int(environ.get("SLURM_NTASKS_PER_NODE") or gpus or 1),
        gpus_per_node=gpus,
        array_task=environ.get("SLURM_ARRAY_TASK_ID", ""),
    )


def gpus_of(text: str) -> int:
    """GPUs of a node, from how they were asked for: `8`, `a100:8`, `a100:4,h100:4`."""
    return sum(int(match) for match in re.findall(r"(?:^|,)(?:[^,:]+:)*(\d+)(?=,|$)", text))


def for_array_task(overrides: Sequence[str], array_task: str) -> list[str]:
    """Overrides with %a replaced by the index of the array task, as in Slurm's own file names."""
    return [override.replace("%a", array_task) if array_task else override for override in overrides]


def srun_command(
    allocated: Allocation, environ: Mapping[str, str], words: Sequence[str], *, label: bool = True
) -> list[str]:
    """The srun that starts `words` once a rank. SFT_SRUN_ARGS comes last, so that a site can change anything."""
    return [
        "srun",
        f"--nodes={allocated.nodes}",
        f"--ntasks={allocated.world_size}",
        f"--ntasks-per-node={allocated.ranks_per_node}",
        # Who ends whom, and when, is the job's decision: srun would end peers in the middle of a save.
        "--kill-on-bad-exit=0",
        "--wait=0",
        *(["--label"] if label else []),
        "--input=none",
        *shlex.split(environ.get("SFT_SRUN_ARGS", "")),
        *words,
    ]


def python_of_ranks(environ: Mapping[str, str]) -> list[str]:
    """The command of Python for the ranks: SFT_PYTHON, which may be several words, else the one that runs this."""
    return shlex.split(environ.get("SFT_PYTHON", "")) or [sys.executable]


def srun_environment(environ: Mapping[str, str], master: str, port: int) -> dict[str, str]:
    """What srun and its tasks get."""
    environment = {**environ, "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    if environ.get("SLURM_CPUS_PER_TASK"):
        # srun no longer takes it over from sbatch by itself.
        environment["SRUN_CPUS_PER_TASK"] = environ["SLURM_CPUS_PER_TASK"]
    return environment


def run_job(
    config_path: Path, overrides: Sequence[str], permissions: Sequence[str] = (), *, show_traceback: bool
) -> int:
    """Be the batch step; returns the exit code of the job."""
    allocated = allocation(os.environ)
    words = [str(config_path), *for_array_task(overrides, allocated.array_task)]
    if show_traceback:
        words.append("--traceback")
    device: Literal["cuda", "cpu"] = "cuda" if allocated.gpus_per_node else "cpu"
    config = checked_config(config_path, for_array_task(overrides, allocated.array_task), allocated.world_size, device)
    run = RunDirectory(Path(config.run.dir))
    known = _job(allocated.job)
    if is_finished(run, config):
        _say(f"nothing to do: {run.path} is complete")
        return 0
    run.refuse_second_start()
    master = _first_host(os.environ["SLURM_JOB_NODELIST"])
    _say(
        f"job {allocated.job}, restart {allocated.restart}: {allocated.world_size} ranks on {allocated.nodes} nodes "
        f"({os.environ['SLURM_JOB_NODELIST']}), rendezvous at {master}:{allocated.port}"
    )
    history = earlier_attempts(run, allocated.job)
    record_launch(
        run,
        allocated.job,
        restart=allocated.restart,
        hosts=os.environ["SLURM_JOB_NODELIST"],
        began=round(process_began(), 3),
    )
    write_reference(run, {"place": "slurm", "job": allocated.job, "output": known.get("StdOut", "")})
    environ = srun_environment(os.environ, master, allocated.port)
    steadfast = [*python_of_ranks(os.environ), str(ROOT / "steadfast.py")]
    ending = _preflight(srun_command(allocated, os.environ, [*steadfast, "preflight", *words], label=False), environ)
    task = [*steadfast, "launch", "slurm-task", *words, *permissions]
    ranks = SrunRanks(
        srun_command(allocated, os.environ, task),
        environ,
        world_size=allocated.world_size,
    )
    if ending is None:
        ending = supervise(ranks, world_size=allocated.world_size, run_dir=run.path, deadline=_deadline(known))
    saved = run.stopped.exists()
    attempt = ended(run, config, ending.code, asked_by(ending, saved, ranks.lost_hosts))
    decision = decide([*history, attempt])
    record_end(run, allocated.job, attempt, ending.blamed, decision)
    if isinstance(decision, Done):
        return 0
    if isinstance(decision, GiveUp):
        if not saved:
            _say(f"giving up: {decision.why}")
        return decision.exit_code
    if ranks.lost_hosts:
        _say(f"Slurm requeues the job: {decision.why}")
        return ending.code
    return _requeue(allocated.job, decision.why, ending.code)


def asked_by(ending: Ending, saved: bool, lost_hosts: Sequence[str] = ()) -> Literal["nobody", "scheduler", "person"]:
    """Who asked an attempt to stop.

    `scancel`, with or without our own `launch stop`, reaches the batch step as SIGTERM, and so does the end of a job
    that has lost a host. When only the tasks were signalled, Slurm is preempting the job in a partition that sends no
    warning to the batch step.
    """
    if lost_hosts or ending.asked in ("SIGUSR2", TIME_LIMIT) or (saved and not ending.asked):
        return "scheduler"
    return "person" if ending.asked else "nobody"


def _preflight(command: Sequence[str], environ: Mapping[str, str]) -> Ending | None:
    """Look at the hosts before the ranks start; how the attempt ended when they are not fit, else None."""
    if os.environ.get("SFT_PREFLIGHT") == "0":
        return None
    code = subprocess.run(command, env=dict(environ), stdin=subprocess.DEVNULL, check=False).returncode
    return Ending(code, "", "preflight: see above") if code else None


def _requeue(job: str, why: str, code: int) -> int:
    _say(f"requeue: {why}")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    problem = done.stderr.strip()
    # Slurm may have been quicker: a lost node or a preemption requeues the job without us.
    if done.returncode and "pending" not in problem.lower():
        _say(f"error: cannot requeue job {job}: {problem}; submit the same command again: it resumes")
        return code or PeerLostError.exit_code
    # Slurm now ends this script, and its exit code means nothing any more.
    time.sleep(60)
    return 0


def _job(job: str) -> dict[str, str]:
    """What the controller knows of a job; empty when it does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))


def _deadline(known: Mapping[str, str]) -> float:
    try:
        return datetime.fromisoformat(known["EndTime"]).timestamp() - LAST_SECONDS
    except (KeyError, ValueError):
        # No limit, or no answer.
        return float("inf")


def _first_host(nodes: str) -> str:
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.split():
        raise PeerLostError(f"scontrol does not know the hosts {nodes}: {done.stderr.strip()}")
    return done.stdout.split()[0]


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
