"""Machines that are namespaces: each node has its own network card, address, host name, processes and /dev/shm.

All nodes share this machine's files, like nodes of a cluster share a file system. The switch that joins them lives in
the namespace of the first node, so nothing is left on this machine once the processes are gone. Nodes end with the
process that made them, however that ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.waiting import until

SUBNET = "10.83.0"
# Reaps orphans for as long as the node is on, as the first process of a machine does.
INIT = """
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""
SETUP = 'hostname "$1"; mount --bind "$2" /etc/hosts; mount -t tmpfs -o size=2g tmpfs /dev/shm; exec "$3" -c "$4"'


def why_not() -> str | None:
    """Why this machine cannot have such nodes, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run([*probe, "ip", "link", "add", "probe", "type", "bridge"], capture_output=True, text=True)
    if done.returncode != 0:
        return f"no right to make namespaces and bridges (CAP_SYS_ADMIN, CAP_NET_ADMIN): {done.stderr.strip()}"
    return None


class Node:
    """One machine. `hosts` is the file that becomes its /etc/hosts; `switch` is the node that holds the switch."""

    def __init__(self, name: str, number: int, hosts: Path, switch: Node | None) -> None:
        self.name, self.address = name, f"{SUBNET}.{number}"
        self._hosts, self._switch = hosts, switch
        self._port = f"port{number}"
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0

    @property
    def is_on(self) -> bool:
        """Whether the node has power."""
        return self._holder is not None

    def switch_on(self) -> None:
        """Boot: an init process in namespaces of its own, on the network."""
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--",
             "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
             "sh", "-ec", SETUP, "sh", self.name, str(self._hosts), sys.executable, INIT],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        until(lambda: children.read_text().strip() != "", f"{self.name} boots", 10)
        self._init = int(children.read_text())
        # The host name is the first thing the node sets: from then on its namespaces are its own.
        until(lambda: self._ask("hostname") == self.name, f"{self.name} has its name", 10)
        if self._switch is None:
            self._net("ip link add switch type bridge")
            self._net(f"ip addr add {self.address}/24 dev switch")
            self._net("ip link set switch up")
        else:
            self._switch._net(f"ip link add {self._port} type veth peer name eth0 netns {self._init}")
            self._switch._net(f"ip link set {self._port} master switch up")
            self._net(f"ip addr add {self.address}/24 dev eth0")
            self._net("ip link set eth0 up")
        self._net("ip link set lo up")

    def switch_off(self) -> None:
        """Pull the plug: everything on it is gone at once, and its peers hear nothing but silence."""
        if self._holder is None:
            return
        if self._switch is not None and self._switch.is_on:
            # The cable first, else the kernel would say goodbye on every connection.
            self._switch._net(f"ip link set {self._port} down")
            self._switch._net(f"ip link del {self._port}")
        self._holder.kill()
        self._holder.wait()
        until(lambda: not _is_alive(self._init), f"{self.name} is off", 10)
        self._holder = None

    def popen(self, command: Sequence[str], environ: Mapping[str, str] | None = None, **options: Any) -> Any:
        """Start a process on this node."""
        inside = ["nsenter", "--target", str(self._init), "--net", "--uts", "--mount", "--pid", "--wd=."]
        return subprocess.Popen(
            [*inside, "--", *command], env=os.environ | {**(environ or {})}, stdin=subprocess.DEVNULL, **options
        )

    def run(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None, *, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this node to its end."""
        process = self.popen(command, environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)

    def _ask(self, command: str) -> str:
        return self.run(command.split()).stdout.strip()

    def _net(self, command: str) -> None:
        subprocess.run(
            ["nsenter", "--target", str(self._init), "--net", "--", *command.split()], check=True, capture_output=True
        )


class Cluster:
    """Nodes and a directory for what runs on them; use it as a context manager. `nodes[0]` is the head."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.nodes: list[Node] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.switch_off()
        self._stop()
        shutil.rmtree(self.state, ignore_errors=True)

    @property
    def head(self) -> Node:
        """The node with the controller."""
        return self.nodes[0]

    def _start(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        """End what runs outside of the nodes."""


def make_nodes(names: Sequence[str], directory: Path) -> list[Node]:
    """Boot one node a name; the first holds the switch. `directory` keeps the file of host names."""
    hosts = directory / "hosts"
    nodes: list[Node] = []
    for number, name in enumerate(names, start=1):
        nodes.append(Node(name, number, hosts, nodes[0] if nodes else None))
    lines = ["127.0.0.1 localhost", *(f"{node.address} {node.name}" for node in nodes)]
    hosts.write_text("\n".join(lines) + "\n")
    for node in nodes:
        node.switch_on()
    return nodes


def _is_alive(pid: int) -> bool:
    try:
        # After the last bracket: a process name may hold anything. Z is dead, only nobody has looked yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
