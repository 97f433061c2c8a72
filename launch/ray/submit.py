"""The user's end of Ray: plan a job, submit it through the job API. No torch."""

from __future__ import annotations

import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.ray.api import call, connect
from launch.ray.hosts import forwarded
from trainer.checkout import ROOT


@dataclass(frozen=True)
class RayPlan:
    """One submission: what the job API is sent."""

    address: str
    entrypoint: str
    """The command line of the driver, which the head node's shell runs."""
    environment: dict[str, str]
    """Variables of the driver; it hands them on to the ranks."""
    metadata: dict[str, str]

    def request(self) -> dict[str, Any]:
        """The submission without the id of the job."""
        environment = {"env_vars": self.environment} if self.environment else {}
        return {"entrypoint": self.entrypoint, "runtime_env": environment, "metadata": self.metadata}

    def lines(self) -> list[str]:
        """The plan for a person: where to, the command, the names of the variables that go along."""
        return [
            f"submit to: {self.address}",
            f"entrypoint: {self.entrypoint}",
            f"variables: {' '.join(self.environment) or 'none'}",
            f"metadata: {' '.join(f'{name}={value}' for name, value in self.metadata.items())}",
        ]


def plan_ray(
    config: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path,
    address: str,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    environ: Mapping[str, str],
    directory: str,
    show_traceback: bool,
) -> RayPlan:
    """The submission of a run. Pure.

    The driver is this very command in `directory`, which, like the checkout and its Python (SFT_PYTHON, else ours),
    lies at the same path on every node of the cluster.
    """
    command = [
        *(shlex.split(environ.get("SFT_PYTHON", "")) or [sys.executable]),
        *(str(ROOT / "steadfast.py"), "launch", "ray", str(config), *overrides),
        *("--nodes", str(nodes), "--ranks-per-node", str(ranks_per_node), "--gpus-per-node", str(gpus_per_node)),
        *(["--traceback"] if show_traceback else []),
    ]
    return RayPlan(
        address=address,
        entrypoint=f"cd {shlex.quote(directory)} && exec {shlex.join(command)}",
        environment=forwarded(environ),
        metadata={"steadfast_run": str(run_dir)},
    )


def job_name(run_dir: Path) -> str:
    """A new id for a job: the name of the run, made safe for addresses, and something nobody else has."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_dir.name).strip('-') or 'run'}-{secrets.token_hex(4)}"


def submit(plan: RayPlan, job: str, *, allow_unauthenticated: bool) -> None:
    """Submit the job under the id `job`. Raises UsageError and PeerLostError as `launch.ray.api.connect` does."""
    client = connect(plan.address, allow_unauthenticated=allow_unauthenticated)
    call(lambda: client.submit_job(submission_id=job, **plan.request()), plan.address)
