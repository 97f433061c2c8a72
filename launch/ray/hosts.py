"""The ranks on the nodes of a Ray cluster behind the interface of `supervise`: one host actor a node starts them.

The address and the port of the rendezvous come from the host of rank 0: Ray may put rank 0 on another node than the
one that the driver runs on. A host that is lost is not asked again: a call to it could hang for as long as Ray hopes
for its return.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.contract import LAUNCHER_PID
from launch.processes import Ended, Event, HostRanks, free_port, plan_ranks
from launch.ray.cluster import worker_environment
from trainer.errors import PeerLostError

START_SECONDS = 120.0
# How long a host may leave a message unanswered before it counts as lost.
ANSWER_SECONDS = 60.0
# How long a host collects what its ranks say before it answers.
_POLL_SECONDS = 0.5
# Settings of the libraries and of ours that the ranks on other nodes shall have too. CUDA_VISIBLE_DEVICES is each
# node's own: Ray sets it.
FORWARDED_PREFIXES = (
    "CUDA_", "DS_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTORCH_", "SFT_", "STEADFAST_", "TORCH_",
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


def host_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks keep of the environment of their node's Ray worker: not Ray's own settings, nor its token."""
    return {name: text for name, text in environ.items() if name != "OMP_NUM_THREADS" and not name.startswith("RAY_")}


def reason(error: Exception) -> str:
    """Kind and last word of one of Ray's errors, whose texts are long."""
    last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    return f"{type(error).__name__}: {last.split('. ')[0].rstrip('.')}"


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
        plan = plan_ranks(
            command,
            ranks=ranks,
            first_rank=first_rank,
            world_size=world_size,
            master_address=endpoint[0],
            master_port=endpoint[1],
            environ=host_environment(os.environ) | {**environ},
            launcher_pid=os.getpid(),
            cores=os.cpu_count() or 1,
            directory=directory,
        )
        self._ranks = HostRanks(plan)
        self._ranks.start()

    def next_events(self, timeout: float) -> list[Event]:
        """See `HostRanks.next_events`; ends say on which host."""
        if self._ranks is None:
            return []
        name = socket.gethostname()
        return [
            Ended(event.rank, event.pid, event.status, event.when, event.note, name)
            if isinstance(event, Ended)
            else event
            for event in self._ranks.next_events(timeout)
        ]

    def signal(self, number: int) -> None:
        """See `HostRanks.signal`."""
        if self._ranks is not None:
            self._ranks.signal(number)


class RayRanks:
    """Ranks in the bundles of a placement group: bundle n holds node n's; `names` are the host names of the bundles."""

    def __init__(
        self, command: Sequence[str], group: Any, names: Sequence[str], *, ranks_per_node: int, gpus_per_node: int
    ) -> None:
        import ray

        self._ray = ray
        self._command, self._group, self._names = [*command], group, [*names]
        self._ranks_per_node, self._gpus_per_node = ranks_per_node, gpus_per_node
        self._running = set(range(len(names) * ranks_per_node))
        self._hosts: list[Any] = []
        self._lost: set[int] = set()
        self._asked: dict[int, tuple[Any, float]] = {}

    @property
    def lost(self) -> set[int]:
        """Bundles whose host is lost."""
        return self._lost

    def start(self) -> None:
        """Start every rank on its node. Raises PeerLostError when a host is lost meanwhile."""
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self._hosts = [
            self._ray.remote(Host)
            .options(
                num_cpus=self._ranks_per_node,
                num_gpus=self._gpus_per_node,
                scheduling_strategy=strategy(self._group, placement_group_bundle_index=node),
                runtime_env=worker_environment(),
            )
            .remote()
            for node in range(len(self._names))
        ]
        endpoint = self._answers([self._hosts[0].endpoint.remote()])[0]
        environ, directory = forwarded(os.environ), str(Path.cwd())
        each, world_size = self._ranks_per_node, len(self._running)
        self._answers(
            [
                host.start.remote(self._command, node * each, each, world_size, endpoint, environ, directory)
                for node, host in enumerate(self._hosts)
            ]
        )

    def next_events(self, timeout: float) -> list[Event]:
        """Collect the events of all hosts; a host that is lost counts as the end of its living ranks."""
        for node, host in enumerate(self._hosts):
            if node not in self._asked and self._living(node):
                self._asked[node] = host.next_events.remote(_POLL_SECONDS), time.monotonic()
        if not self._asked:
            return []
        questions = [question for question, _ in self._asked.values()]
        self._ray.wait(questions, num_returns=1, timeout=timeout)
        answered, _ = self._ray.wait(questions, num_returns=len(questions), timeout=0)
        events: list[Event] = []
        for node, (question, since) in [*self._asked.items()]:
            if question in answered:
                del self._asked[node]
                try:
                    events += self._ray.get(question)
                except self._ray.exceptions.RayError as error:
                    # "Unavailable" is what a dead node looks like at first; it is as lost as one that is called dead.
                    events += self._lose(node, reason(error))
            elif time.monotonic() - since > ANSWER_SECONDS:
                del self._asked[node]
                events += self._lose(node, f"no answer for {ANSWER_SECONDS:.0f} s")
        self._running -= {event.rank for event in events if isinstance(event, Ended)}
        return events

    def signal(self, number: int) -> None:
        """Pass a signal on to every host that is not lost."""
        for node, host in enumerate(self._hosts):
            if node not in self._lost:
                host.signal.remote(number)

    def close(self) -> None:
        """Kill the ranks, and end their hosts."""
        hosts = [host for node, host in enumerate(self._hosts) if node not in self._lost]
        if self._running and hosts:
            answers = [host.signal.remote(signal.SIGKILL) for host in hosts]
            self._ray.wait(answers, num_returns=len(answers), timeout=5)
        for host in self._hosts:
            self._ray.kill(host)

    def _answers(self, questions: list[Any]) -> list[Any]:
        end = time.monotonic() + START_SECONDS
        found = []
        for node, question in enumerate(questions):
            try:
                found.append(self._ray.get(question, timeout=max(0.0, end - time.monotonic())))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except self._ray.exceptions.RayError as error:
                self._lost.add(node)
                raise PeerLostError(f"lost the host {self._names[node]} while starting ({reason(error)})") from error
        return found

    def _living(self, node: int) -> set[int]:
        return self._running & set(range(node * self._ranks_per_node, (node + 1) * self._ranks_per_node))

    def _lose(self, node: int, how: str) -> list[Event]:
        self._lost.add(node)
        name = self._names[node]
        return [
            Ended(rank, 0, PeerLostError.exit_code, time.time(), f"lost its host {name} ({how})", name)
            for rank in sorted(self._living(node))
        ]
