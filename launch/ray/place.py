"""A run that was launched on Ray, afterwards: its state, its output, its end. See `launch.places`.

A submitted job is asked about through the job API. A driver that somebody started by hand is found from a node of its
cluster.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from typing import Any

from launch.ray.api import call, connect
from launch.ray.cluster import Cluster
from trainer.checkout import ROOT
from trainer.errors import MissingInputError, PeerLostError

_STOP_SECONDS = 300.0


def state(reference: dict[str, Any]) -> str:
    """State of the job, and how its driver ended."""
    job, api = reference["job"], reference["api"]
    if not api:
        return f"Ray driver {job} in the cluster {reference['cluster']}: started by hand, see its terminal"
    try:
        info = _info(reference)
    except PeerLostError as error:
        # Clusters that were made for one job are gone after it.
        return f"Ray job {job} at {api}: not known any more ({error.fact})"
    code = f", exit code {info.driver_exit_code}" if info.driver_exit_code is not None else ""
    waits = f" ({info.message.splitlines()[0]})" if info.status == "PENDING" and info.message else ""
    return f"Ray job {job} at {api}: {str(info.status).lower()}{code}{waits}"


def logs(reference: dict[str, Any], *, lines: int, follow: bool) -> int:
    """Show the job's output. Raises MissingInputError for a driver that was started by hand."""
    job, api = reference["job"], reference["api"]
    if not api:
        raise MissingInputError(
            f"driver {job} writes to the terminal it was started in", "see metrics.jsonl and events.jsonl of the run"
        )
    client = _client(reference)
    so_far = call(lambda: client.get_job_logs(job), api)
    _show("".join(so_far.splitlines(keepends=True)[-lines:]))
    if follow:
        call(lambda: asyncio.run(_follow(client, job, len(so_far))), api)
    return 0


def stop(reference: dict[str, Any], *, graceful: bool) -> str:
    """End the job: at once, or after an agreed checkpoint.

    Ray itself kills a job a few seconds after it has asked it to stop, which no checkpoint survives. So the driver is
    signalled from within the cluster.
    """
    job, api = reference["job"], reference["api"]
    done = f"asked {job} for a checkpoint and a stop" if graceful else f"stopped {job} and its ranks"
    if not api:
        with Cluster(reference["cluster"], local_cpus=1) as cluster:
            cluster.ring(job, signal.SIGTERM if graceful else signal.SIGKILL)
        return done
    client = _client(reference)
    if call(lambda: client.get_job_info(job), api).status.is_terminal():
        raise MissingInputError(f"no run to stop: {state(reference)}")
    if not graceful:
        call(lambda: client.stop_job(job), api)
        return done
    words = [sys.executable, str(ROOT / "steadfast.py"), "launch", "ray-stop", job]
    messenger = call(lambda: client.submit_job(entrypoint=f"exec {shlex.join(words)}"), api)
    end = time.monotonic() + _STOP_SECONDS
    while not (info := call(lambda: client.get_job_info(messenger), api)).status.is_terminal():
        if time.monotonic() > end:
            raise PeerLostError(f"job {messenger}, which is to stop {job}, has not run yet", "see ray job list")
        time.sleep(0.5)
    if info.driver_exit_code != 0:
        said = call(lambda: client.get_job_logs(messenger), api).strip().splitlines() or [info.message or ""]
        raise PeerLostError(f"cannot stop {job}: {said[-1].removeprefix('error: ')}")
    return done


def stop_from_within(job: str) -> int:
    """Be the job that asks the driver of `job` for a checkpoint and a stop."""
    with Cluster(os.environ.get("RAY_ADDRESS", "auto"), local_cpus=1) as cluster:
        cluster.ring(job, signal.SIGTERM)
    return 0


def _client(reference: dict[str, Any]) -> Any:
    return connect(reference["api"], allow_unauthenticated=reference.get("allow_unauthenticated", False))


def _info(reference: dict[str, Any]) -> Any:
    client = _client(reference)
    return call(lambda: client.get_job_info(reference["job"]), reference["api"])


async def _follow(client: Any, job: str, shown: int) -> None:
    async for text in client.tail_job_logs(job):
        _show(text[shown:])
        shown = max(0, shown - len(text))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
