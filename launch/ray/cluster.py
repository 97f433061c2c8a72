"""A connection to a Ray cluster: its nodes, bundles on them, and what has become of a node that was lost."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.checkout import ROOT
from trainer.errors import PeerLostError, UsageError

NAMESPACE = "steadfast"
CONNECT_SECONDS = 10.0
# Nodes of a cloud take their time to boot; a cluster that never grows is known after this.
PLACEMENT_SECONDS = 600.0
# How long Ray may take to notice that a node is gone.
NOTICE_SECONDS = 120.0
_SAY_AFTER_SECONDS = 10.0


class Cluster:
    """The cluster at `address`, or, when that is None, one on this machine that ends with us and asks for a token.

    Raises PeerLostError when there is none at `address`. Use it as a context manager.
    """

    def __init__(self, address: str | None, *, local_cpus: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # Ray's own default for a new cluster; it reads this while being imported, and said aloud needs no warning.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        self._ray = ray
        if address is not None:
            _require_listener(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning", "namespace": NAMESPACE}
        if address is None:
            options |= {"include_dashboard": False, "num_cpus": max(local_cpus, os.cpu_count() or 1)}
        self.is_local = address is None
        try:
            context = ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise PeerLostError(
                f"no Ray cluster at {address or 'this machine'}: {reason}",
                "a driver must be on a node of its cluster and have its token; elsewhere give the job API, http://HEAD:8265",
            ) from error
        self.api = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        self.address = str(context.address_info["gcs_address"])

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def fitting(self, bundle: Mapping[str, float]) -> int:
        """How many living nodes are large enough for `bundle`, whether it is free there or not."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes)

    def place(self, bundle: Mapping[str, float], nodes: int, is_stopped: Callable[[], bool]) -> Any:
        """Reserve `bundle` on `nodes` nodes; returns the placement group, or None when `is_stopped` became true.

        Raises UsageError when the cluster does not offer that in time.
        """
        group = self._ray.util.placement_group(
            [dict(bundle)] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK"
        )
        limit = NOTICE_SECONDS if self.is_local else PLACEMENT_SECONDS
        began, said = time.monotonic(), False
        while not group.wait(1) or is_stopped():
            waited = time.monotonic() - began
            if is_stopped() or waited > limit:
                self.release(group)
            if is_stopped():
                return None
            if waited > limit:
                raise UsageError(
                    f"the Ray cluster did not offer {nodes} node(s) with {dict(bundle)} within {limit:.0f} s",
                    "see `ray status`; ask for less, or wait for nodes",
                )
            if waited > _SAY_AFTER_SECONDS and not said:
                said = True
                sys.stderr.write(
                    f"waiting for {nodes} free node(s) with {dict(bundle)}; Ray has {self.fitting(bundle)} that large\n"
                )
        return group

    def hosts(self, group: Any) -> list[tuple[str, str]]:
        """Id and host name of the node of every bundle."""
        names = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in self._ray.nodes()}
        placed = self._ray.util.placement_group_table(group)["bundles_to_node_id"]
        return [(placed[bundle], names.get(placed[bundle], placed[bundle])) for bundle in sorted(placed)]

    def release(self, group: Any) -> None:
        """Give the bundles back."""
        self._ray.util.remove_placement_group(group)

    def gone(self, lost: Iterable[str], is_stopped: Callable[[], bool]) -> set[str]:
        """Which of the nodes with these ids are gone: the others answer, and only our worker there was lost.

        Ray takes its time to know, and would place the next attempt on a node that is no more. One that neither
        answers nor is given up by Ray within two minutes counts as gone.
        """
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        probe = self._ray.remote(num_cpus=0, max_retries=0)(_nothing)
        asked = {node: probe.options(scheduling_strategy=strategy(node, soft=False)).remote() for node in lost}
        found: set[str] = set()
        end = time.monotonic() + NOTICE_SECONDS
        while asked and time.monotonic() < end and not is_stopped():
            answered, _ = self._ray.wait([*asked.values()], num_returns=len(asked), timeout=1)
            # After the answers: those of a node that is gone are errors.
            found |= {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]} & asked.keys()
            asked = {node: answer for node, answer in asked.items() if node not in found and answer not in answered}
        return found | asked.keys()

    def take_signals_for(self, job: str) -> None:
        """Let others in the cluster signal this process by the name of its job, for as long as we are connected."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        here = self._ray.get_runtime_context().get_node_id()
        options = {"name": bell_name(job), "num_cpus": 0, "scheduling_strategy": strategy(here, soft=False)}
        options["runtime_env"] = worker_environment()
        self._bell = self._ray.remote(Bell).options(**options).remote(os.getpid())

    def ring(self, job: str, number: int) -> None:
        """Signal the driver of `job`. Raises PeerLostError when it is not there."""
        try:
            self._ray.get(self._ray.get_actor(bell_name(job)).ring.remote(number), timeout=60)
        except (ValueError, self._ray.exceptions.RayError) as error:
            raise PeerLostError(
                f"the driver of {job} does not answer ({type(error).__name__})", "see ray list"
            ) from error


class Bell:
    """An actor beside the driver of a run: signals reach only processes of one's own node."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def ring(self, number: int) -> None:
        """Send the driver a signal."""
        os.kill(self._pid, number)


def worker_environment() -> dict[str, Any]:
    """The runtime environment of our actors: they must find this checkout before any other package called `launch`."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}


def bell_name(job: str) -> str:
    """The name of the actor that takes signals for the driver of `job`."""
    return f"launcher of {job}"


def _nothing() -> None:
    """What a living node can do."""


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
