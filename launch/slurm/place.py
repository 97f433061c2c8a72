"""A run that was launched on Slurm, afterwards: its state, its output, its end. See `launch.places`."""

from __future__ import annotations

from typing import Any

from launch.places import show_file
from launch.slurm.submit import call, output_of
from trainer.errors import MissingInputError, PeerLostError


def state(reference: dict[str, Any]) -> str:
    """State and place of the job, or why it waits; says so when the controller has forgotten the job."""
    job = reference["job"]
    done = call(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%R|%M|%l"])
    if done.returncode or "|" not in done.stdout:
        return f"Slurm job {job}: no longer known to Slurm"
    condition, where, elapsed, limit = done.stdout.splitlines()[0].split("|")
    return f"Slurm job {job}: {condition.lower()} {where}, {elapsed} of {limit}"


def logs(reference: dict[str, Any], *, lines: int, follow: bool) -> int:
    """Show the job's output."""
    path = reference.get("output") or output_of(reference["job"])
    if not path:
        raise MissingInputError(f"Slurm does not say where job {reference['job']} writes to", "look for *-JOBID.out")
    return show_file(path, lines=lines, follow=follow)


def stop(reference: dict[str, Any], *, graceful: bool) -> str:
    """End the job: at once, or after an agreed checkpoint, and then without requeueing it."""
    job = reference["job"]
    done = call(["scancel", *(["--batch", "--signal=TERM"] if graceful else []), job])
    if done.returncode or done.stderr.strip():
        raise PeerLostError(f"scancel failed: {done.stderr.strip()}", "see squeue")
    return f"asked job {job} for a checkpoint and a stop" if graceful else f"cancelled job {job}"
