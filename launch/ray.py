"""Ranks on the nodes of a Ray cluster. Ray gives us nodes and carries messages; it does not run the training.

One host actor a node starts ordinary rank processes, the same ones as on a single machine, and the driver watches
them with the same supervisor. So a crash of a rank takes no Ray worker along, signals and exit codes are ours, and
nothing of the training is pickled.

The address and the port of the rendezvous come from the host of rank 0: Ray may put rank 0 on another node than the
one we are typing on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.contract import LAUNCHER_PID
from launch.processes import Ended, Event, HostRanks, free_port, plan_ranks
from launch.supervise import supervise
from trainer.errors import PeerLostError, UsageError

ROOT = Path(__file__).resolve().parents[1]
CONNECT_SECONDS = 10.0
PLACEMENT_SECONDS = 120.0
START_SECONDS = 120.0
# How long a host may leave a message unanswered before it counts as lost.
ANSWER_SECONDS = 60.0
# Settings of the libraries and of ours that the ranks on other nodes shall have too. CUDA_VISIBLE_DEVICES is each
# node's own: Ray sets it.
FORWARDED_PREFIXES = (
    "CUDA_", "DS_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTORCH_", "STEADFAST_", "TORCH_",
)  # fmt: skip
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the driver's environment that ranks on every node get, sorted by name; never a secret."""
    return {
        name: text
        for name, text in sorted(environ.items())
        if name.startswith(FORWARDED_PREFIXES)
        and name not in ("CUDA_VISIBLE_DEVICES", LAUNCHER_PID)
        and not any(word in name.upper() for word in SECRETS)
    }


class Host:
    """Lives in a Ray worker, one on each node; starts and watches that node's ranks.

    Its methods run one at a time, always in the worker's main thread, so the ranks die with the worker.
    """

    def __init__(self) -> None:
        self._ranks: HostRanks | None = None

    def endpoint(self) -> tuple[str, int]:
        """This node's address as other nodes see it, and a free port there."""
        import ray

        address = str(ray.util.get_node_ip_address())
        return address, free_port(address)

    def start(
        self,
        command: Sequence[str],
        first_rank: int,
        ranks: int,
        world_size: int,
        endpoint: tuple[str, int],
        environ: Mapping[str, str],
        directory: str,
    ) -> None:
        """Start this node's ranks; `environ` wins over the worker's own environment."""
        mine = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
        plan = plan_ranks(
            command,
            ranks=ranks,
            first_rank=first_rank,
            world_size=world_size,
            master_address=endpoint[0],
            master_port=endpoint[1],
            environ=mine | {**environ},
            launcher_pid=os.getpid(),
            cores=os.cpu_count() or 1,
            directory=directory,
        )
        self._ranks = HostRanks(plan)
        self._ranks.start()

    def next_events(self, timeout: float) -> list[Event]:
        """See `HostRanks.next_events`."""
        return [] if self._ranks is None else self._ranks.next_events(timeout)

    def signal(self, number: int) -> None:
        """See `HostRanks.signal`."""
        if self._ranks is not None:
            self._ranks.signal(number)


class RayRanks:
    """The ranks of all nodes behind the interface of `supervise`."""

    def __init__(
        self, command: Sequence[str], *, nodes: int, ranks_per_node: int, gpus_per_node: int, address: str | None
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # Ray's own default for a new cluster; it reads this while being imported, and said aloud needs no warning.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        if address is not None:
            _require_listener(address)
        self._ray = ray
        self._command = [*command]
        self._nodes, self._ranks_per_node = nodes, ranks_per_node
        self._running = set(range(nodes * ranks_per_node))
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        # Workers import this file: they must find this checkout before any other package called `launch`.
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        if address is None:
            cores = max(nodes * ranks_per_node, os.cpu_count() or 1)
            options |= {"include_dashboard": False, "num_cpus": cores}
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise PeerLostError(
                f"no Ray cluster at {address or 'this machine'}: {reason}", "check --address"
            ) from error
        bundle = {"CPU": ranks_per_node} | ({"GPU": gpus_per_node} if gpus_per_node else {})
        self._group = ray.util.placement_group([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
        if not self._group.wait(PLACEMENT_SECONDS):
            ray.shutdown()
            raise UsageError(
                f"the Ray cluster did not offer {nodes} node(s) with {bundle} within {PLACEMENT_SECONDS:.0f} s",
                "see `ray status`; ask for less, or wait for nodes",
            )
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self._hosts = [
            ray.remote(Host)
            .options(
                num_cpus=ranks_per_node,
                num_gpus=gpus_per_node,
                scheduling_strategy=strategy(self._group, placement_group_bundle_index=node),
            )
            .remote()
            for node in range(nodes)
        ]

    def start(self) -> None:
        """Start every rank on its node."""
        try:
            endpoint = self._ray.get(self._hosts[0].endpoint.remote(), timeout=START_SECONDS)
            environ, directory = forwarded(os.environ), str(Path.cwd())
            each, world_size = self._ranks_per_node, len(self._running)
            self._ray.get(
                [
                    host.start.remote(self._command, node * each, each, world_size, endpoint, environ, directory)
                    for node, host in enumerate(self._hosts)
                ],
                timeout=START_SECONDS,
            )
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            raise PeerLostError(f"a host of the Ray cluster was lost at the start ({type(error).__name__})") from error

    def next_events(self, timeout: float) -> list[Event]:
        """Collect the events of all hosts; a host that is lost counts as the end of its living ranks."""
        events: list[Event] = []
        asked = [(node, host.next_events.remote(timeout)) for node, host in enumerate(self._hosts)]
        for node, answer in asked:
            mine = self._running & set(range(node * self._ranks_per_node, (node + 1) * self._ranks_per_node))
            if not mine:
                continue
            try:
                events.extend(self._ray.get(answer, timeout=ANSWER_SECONDS))
            except self._ray.exceptions.RayError as error:
                # "Temporarily unavailable" is what a dead node looks like at first: asking again would hang.
                note = f"lost its host, node {node} of {self._nodes} ({type(error).__name__})"
                events.extend(Ended(rank, 0, PeerLostError.exit_code, time.time(), note) for rank in sorted(mine))
        self._running -= {event.rank for event in events if isinstance(event, Ended)}
        return events

    def signal(self, number: int) -> None:
        """Pass a signal on to every host."""
        for host in self._hosts:
            host.signal.remote(number)

    def close(self) -> None:
        """Kill the ranks, then leave the cluster (a local one ends)."""
        if self._running:
            answers = [host.signal.remote(signal.SIGKILL) for host in self._hosts]
            self._ray.wait(answers, num_returns=len(answers), timeout=5)
        self._ray.util.remove_placement_group(self._group)
        self._ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise PeerLostError when nobody listens at `address`: Ray would try for minutes before it says so."""
    import ray

    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    # Ray, too, takes a loopback address for this node's own.
    hosts = [host, str(ray.util.get_node_ip_address())] if host in ("localhost", "127.0.0.1") else [host]
    for candidate in hosts:
        with contextlib.suppress(OSError), socket.create_connection((candidate, int(port)), timeout=CONNECT_SECONDS):
            return
    raise PeerLostError(f"nobody listens at {address}", "start the cluster (ray start --head), or check --address")


def launch_ray(
    command: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    address: str | None,
    run_dir: Path,
) -> int:
    """Run `command` as nodes x ranks_per_node ranks in a Ray cluster; returns the exit code (see `supervise`).

    `address` None starts a cluster on this machine. Raises PeerLostError when there is no cluster at `address`,
    UsageError when it has too few free nodes.
    """
    ranks = RayRanks(command, nodes=nodes, ranks_per_node=ranks_per_node, gpus_per_node=gpus_per_node, address=address)
    return supervise(ranks, world_size=nodes * ranks_per_node, run_dir=run_dir).code
