"""A real Ray cluster on one machine: a head node and workers, each with its own address, that ask for a token."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.nodes import Cluster, Node, make_nodes
from tests.support.waiting import until

PORT, DASHBOARD_PORT = 6379, 8265
START_SECONDS = 240
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# A lost node is noticed after about ten seconds instead of half a minute.
QUICKER = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


class RayCluster(Cluster):
    """`nodes[0]` is the head; it computes, too. Use it as a context manager."""

    def __init__(self, nodes: int = 3, *, cpus: int = 1) -> None:
        # Paths of Ray's sockets must be short.
        super().__init__(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
        self._names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self.token_file = self.state / "token"

    @property
    def api(self) -> str:
        """Address of the job API."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def environ(self, *, token: bool = True) -> dict[str, str]:
        """What a user of this cluster has in the environment."""
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)} if token else {}
        return {"HOME": str(self.state), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", **mine}

    def run(
        self,
        *command: str,
        on: Node | None = None,
        token: bool = True,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, the head's unless told, as a user who has the token, or has not."""
        return (on or self.head).run(command, self.environ(token=token) | dict(environ or {}), **options)

    def start_daemon(self, node: Node) -> None:
        """Start Ray on a node that is on, with a directory of sockets and logs that no other node sees."""
        local = self._local_directory(node)
        own = [f"--node-ip-address={node.address}", f"--num-cpus={self._cpus}", "--num-gpus=0", "--block"]
        own += ["--disable-usage-stats", "--object-store-memory=80000000"]
        if node is self.head:
            own += ["--head", f"--port={PORT}", f"--dashboard-host={node.address}", f"--temp-dir={local}"]
            own += [f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            own += [f"--address={self.head.address}:{PORT}"]
        environ = self.environ() | QUICKER | {"RAY_raylet_start_wait_time_s": "180"}
        with (self.state / f"{node.name}.out").open("wb") as out:
            node.popen(
                [*RAY, "start", *own], environ, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def start_open_cluster(self, node: Node) -> tuple[str, str]:
        """Start another cluster, which asks for no token, on a node; returns its address and that of its job API."""
        home = self._local_directory(node)
        start = [f"--node-ip-address={node.address}", "--head", "--port=6400", f"--dashboard-host={node.address}"]
        start += ["--dashboard-port=8300", f"--temp-dir={home}", "--num-cpus=1", "--num-gpus=0"]
        done = node.run(
            [*RAY, "start", *start, "--object-store-memory=80000000"],
            self.environ(token=False) | {"RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "180"},
            timeout=START_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        api = f"http://{node.address}:8300"
        until(lambda: self._status(api) == "200", "the open cluster answers", START_SECONDS, 0.5)
        return f"{node.address}:6400", api

    def recover(self) -> None:
        """Switch on what was switched off."""
        for node in self.nodes:
            if not node.is_on:
                node.switch_on()
                self.start_daemon(node)
        self.wait_for_nodes(len(self.nodes))

    def wait_for_nodes(self, count: int, seconds: float = START_SECONDS) -> None:
        """Wait until this many nodes are alive, as the controller sees it."""
        until(lambda: self.alive() == count, f"{count} nodes of Ray are alive\n{self.said()}", seconds, 1.0)

    def alive(self) -> int:
        """Nodes that are alive, as the controller sees it; 0 when it does not answer."""
        address = f"{self.head.address}:{PORT}"
        code = (
            f"import ray; ray.init('{address}', log_to_driver=False, logging_level='error');"
            "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        )
        found = re.search(r"^alive (\d+)$", self.run(sys.executable, "-c", code).stdout, re.MULTILINE)
        return int(found[1]) if found else 0

    def said(self) -> str:
        """What the daemons wrote to their terminals."""
        return "\n".join(path.read_text(errors="replace") for path in self.state.glob("*.out"))

    def _start(self) -> None:
        self.token_file.touch(0o600)
        self.token_file.write_text(os.urandom(32).hex())
        self.nodes = make_nodes(self._names, self.state)
        self.start_daemon(self.head)
        until(lambda: self._status(self.api) == "401", f"the job API answers\n{self.said()}", START_SECONDS, 0.5)
        for node in self.nodes[1:]:
            self.start_daemon(node)
        self.wait_for_nodes(len(self.nodes))

    def _local_directory(self, node: Node) -> Path:
        local = self.state / "local"
        local.mkdir(exist_ok=True)
        mounted = node.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(local)])
        assert mounted.returncode == 0, mounted.stderr
        return local

    def _status(self, api: str) -> str:
        """The HTTP status of a list of jobs, asked for without a token."""
        return self.head.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{api}/api/jobs/"]).stdout
