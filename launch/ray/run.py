"""The driver: attempts at a run on the nodes of a Ray cluster, until it is done, given up or asked to stop.

After a node is lost the next attempt takes what is left, resumes from the last commit and keeps the global batch. When
the node is back, or another one in its place, the attempt after that has it again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from launch.attempts import ended, is_finished, newest_step, record_end, record_launch, write_reference
from launch.decide import Attempt, Done, GiveUp, decide
from launch.places import reference_of
from launch.preflight.watch import watch
from launch.ray.api import refuse_open_cluster
from launch.ray.cluster import Cluster
from launch.ray.hosts import RayRanks
from launch.supervise import Ending, supervise
from trainer.config.schema import Config
from trainer.errors import MissingInputError, PeerLostError, StoppedOnRequest, UsageError
from trainer.run_directory import RunDirectory

# In the path of what `ray job submit --working-dir` uploads.
_PACKAGE = "/_ray_pkg_"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_ray(
    command: Sequence[str],
    config: Config,
    *,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    address: str | None,
    allow_unauthenticated: bool = False,
    preflight: Sequence[str] = (),
) -> int:
    """Run `command` as ranks_per_node ranks on each of `nodes` nodes; returns the exit code of the run.

    `preflight`, too, is the command of a rank: it looks at hosts that no attempt has been on, before the ranks start
    (never on a cluster of this machine alone).
    `address` None starts a cluster on this machine. Raises PeerLostError when there is no cluster at `address`,
    UsageError when it has too few free nodes, or is a remote one that asks for no token. Call it from the main thread.
    """
    run = RunDirectory(Path(config.run.dir))
    if is_finished(run, config):
        _say(f"nothing to do: {run.path} is complete")
        return 0
    _require_shared(run.path, Path.cwd())
    bundle = {"CPU": ranks_per_node} | ({"GPU": gpus_per_node} if gpus_per_node else {})
    with Cluster(address, local_cpus=nodes * ranks_per_node) as cluster, _Between() as between:
        submission = submission_id()
        if not submission and address not in (None, "auto"):
            refuse_open_cluster(cluster.address, cluster.api, os.environ, allowed=allow_unauthenticated)
        job = submission or f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
        if _recorded_job(run) != job:
            api = cluster.api if submission else ""
            write_reference(run, {"place": "ray", "job": job, "api": api, "cluster": cluster.address})
        cluster.take_signals_for(job)
        history: list[Attempt] = []
        wanted = nodes
        fit: list[str] = []
        while True:
            group = _place(cluster, bundle, wanted, between, history)
            if group is None:
                return _stopped_between(run)
            placed = cluster.hosts(group)
            names = [name for _, name in placed]
            record_launch(run, job, hosts=names)
            _say(f"attempt {len(history) + 1}: {wanted * ranks_per_node} ranks on {', '.join(names)}")
            on_hosts = partial(
                RayRanks, group=group, names=names, ranks_per_node=ranks_per_node, gpus_per_node=gpus_per_node
            )
            world_size = wanted * ranks_per_node
            ending: Ending | None = None
            if preflight and names != fit and not cluster.is_local:
                ending, lost = _preflight(on_hosts(preflight), world_size, between)
                fit = [] if ending else names
            if ending is None:
                ending, lost = _attempt(on_hosts(command), world_size, run.path)
            cluster.release(group)
            gone = cluster.gone([placed[node][0] for node in lost], between.is_stopped)
            history.append(ended(run, config, ending.code, _asked_by(ending, lost_node=bool(gone))))
            decision = decide(history)
            record_end(run, job, history[-1], ending.blamed, decision)
            if isinstance(decision, Done):
                return 0
            if isinstance(decision, GiveUp):
                if ending.code and not ending.asked:
                    _say(f"giving up: {decision.why}")
                return decision.exit_code
            _say(f"starting again: {decision.why}")
            wanted = max(1, min(nodes, cluster.fitting(bundle)))


def submission_id() -> str:
    """The id of the job that we are the driver of, or an empty text when this is none of the job API's."""
    try:
        return str(json.loads(os.environ.get(_JOB_CONFIG, "{}"))["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _place(cluster: Cluster, bundle: dict[str, int], nodes: int, between: _Between, history: list[Attempt]) -> Any:
    try:
        return cluster.place(bundle, nodes, between.is_stopped)
    except UsageError as error:
        if not history:
            raise
        # What was there at first is gone: no mistake of the command.
        raise PeerLostError(error.fact, "submit the same command again: it resumes") from error


def _recorded_job(run: RunDirectory) -> str:
    try:
        return str(reference_of(run).get("job", ""))
    except MissingInputError:
        return ""


def _require_shared(run_dir: Path, directory: Path) -> None:
    """Raise UsageError when the run directory lies in the copy of somebody's files that Ray unpacks on every node."""
    if _PACKAGE in str(directory / run_dir):
        raise UsageError(
            f"run.dir={run_dir} lies in the job's working directory, of which every node has a copy of its own",
            "give an absolute path on a file system that all nodes share",
        )


def _attempt(ranks: RayRanks, world_size: int, run_dir: Path) -> tuple[Ending, set[int]]:
    """How the ranks ended, and the bundles whose host was lost."""
    try:
        return supervise(ranks, world_size=world_size, run_dir=run_dir), ranks.lost
    except PeerLostError as error:
        return _lost_while_starting(error), ranks.lost


def _preflight(ranks: RayRanks, world_size: int, between: _Between) -> tuple[Ending | None, set[int]]:
    """Look at the hosts; how the attempt ended when they are not fit or a stop was asked for, and the bundles lost."""
    try:
        code = watch(ranks, world_size, between.is_stopped)
    except PeerLostError as error:
        return _lost_while_starting(error), ranks.lost
    if between.is_stopped():
        return Ending(PeerLostError.exit_code, "a request to stop"), ranks.lost
    return (Ending(code, "", "preflight: see above") if code else None), ranks.lost


def _lost_while_starting(error: PeerLostError) -> Ending:
    _say(f"error: {error}")
    return Ending(PeerLostError.exit_code, "", str(error))


def _asked_by(ending: Ending, *, lost_node: bool) -> Literal["nobody", "scheduler", "person"]:
    if ending.asked:
        return "person"
    return "scheduler" if lost_node and ending.code == PeerLostError.exit_code else "nobody"


def _stopped_between(run: RunDirectory) -> int:
    _say("stopped on request between two attempts")
    return StoppedOnRequest.exit_code if newest_step(run) else PeerLostError.exit_code


class _Between:
    """Remembers a request to stop that comes while no attempt runs; `supervise` has handlers of its own."""

    def __init__(self) -> None:
        self._stopped = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Between:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_stopped(self) -> bool:
        """Whether somebody asked for a stop."""
        return self._stopped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
