"""The login node's side of Slurm: plan a job, have Slurm check it, submit it. No torch."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.job import Allocation, srun_command
from trainer.checkout import ROOT
from trainer.errors import MissingInputError, PeerLostError, UsageError

SCRIPT = ROOT / "slurm" / "sft.sh"
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class SlurmPlan:
    """One submission: everything that is not in the script stands in the command."""

    command: list[str]
    """sbatch, its options, the script, CONFIG and overrides."""
    environment: dict[str, str]
    """What the command is given beside the environment it is typed in."""
    srun: list[str]
    """How the job will start its ranks, unless slurm/site.env says more."""

    def lines(self) -> list[str]:
        """The plan as one would type it, and the script it submits."""
        variables = [f"{name}={shlex.quote(text)}" for name, text in self.environment.items()]
        script = [f"# {SCRIPT}", *SCRIPT.read_text().splitlines()]
        ranks = ["# which starts the ranks with", shlex.join(self.srun)]
        return [" ".join([*variables, shlex.join(self.command)]), "", *script, "", *ranks]


def plan_slurm(
    config: Path,
    overrides: Sequence[str],
    permissions: Sequence[str] = (),
    *,
    run_dir: Path,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    sbatch_options: Sequence[str] = (),
) -> SlurmPlan:
    """The submission of a run. Pure. `sbatch_options` come after ours and win, `permissions` go on to the ranks."""
    command = [
        "sbatch",
        f"--job-name={run_dir.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={ranks_per_node}",
        f"--gpus-per-node={gpus_per_node}",
        *sbatch_options,
        str(SCRIPT),
        str(config),
        *overrides,
        *permissions,
    ]
    words = [str(config), *overrides, *permissions]
    rank = ["PYTHON", str(ROOT / "steadfast.py"), "launch", "slurm-task", *words]
    srun = srun_command(Allocation("JOB", 0, nodes, ranks_per_node, gpus_per_node), {}, rank)
    return SlurmPlan(command, {"SFT_ROOT": str(ROOT)}, srun)


def submit(plan: SlurmPlan) -> str:
    """Have Slurm check the request, then submit it; returns the job's id.

    Raises UsageError with Slurm's reason for a request that could never run: nothing is queued then.
    """
    program, *options = plan.command
    environ = plan.environment
    tested = call([program, "--test-only", *options], environ)
    if tested.returncode:
        raise UsageError(f"Slurm refuses the request: {_reason(tested)}", "see sinfo; change --nodes, or --sbatch")
    done = call([program, "--parsable", *options], environ)
    if done.returncode:
        raise PeerLostError(f"sbatch failed: {_reason(done)}", "see sinfo; then try again")
    return done.stdout.strip().partition(";")[0]


def output_of(job: str) -> str:
    """The file that a job writes to, as far as the controller knows; else empty."""
    words = call(["scontrol", "--oneliner", "show", "job", job]).stdout.split()
    return next((word.removeprefix("StdOut=") for word in words if word.startswith("StdOut=")), "")


def call(command: Sequence[str], environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises MissingInputError when there is no Slurm here."""
    try:
        return subprocess.run(
            command, env=os.environ | (environ or {}), capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=_ANSWER_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise MissingInputError(
            f"there is no {command[0]} on this machine", "type this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise PeerLostError(f"{command[0]} did not answer within {_ANSWER_SECONDS:.0f} s") from error


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
