"""Where ranks meet: rank 0 takes the port before anything slow is imported, the others see that it is there.

torch tries a name that nobody knows, a port that is taken or a host that is gone for as long as a collective may last.
Here each of them is one line within a minute, and it comes before torch is imported.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launch.bounded import Overdue, bounded
from trainer.errors import PeerLostError
from trainer.world import World, opens_store

# With the start of Python it is over within a minute.
MEETING_SECONDS = 55.0
_RESOLVE_SECONDS = 15.0
_RESOLVE_PAUSE_SECONDS = 1.0
_CONNECT_SECONDS = 5.0
_PAUSE_SECONDS = 0.25
_BACKLOG = 4096


def meet(world: World, environ: Mapping[str, str], within: float = MEETING_SECONDS) -> socket.socket | None:
    """On rank 0 the listening socket for torch's store; elsewhere None, once somebody listens at its address.

    Every rank calls this first. Raises PeerLostError within `within` seconds: the port is taken, the host of rank 0
    has no address or does not answer.
    """
    if opens_store(world, environ):
        return open_port(world)
    reach(world.master_address, world.master_port, within).close()
    return None


def open_port(world: World) -> socket.socket:
    """Listen on MASTER_PORT, as torch's store would: of all interfaces, or of one when all ranks are on this host.

    Raises PeerLostError when the port is taken, or the address has no meaning here.
    """
    address, port = world.master_address, world.master_port
    candidates = resolve_address(address)
    one_host = world.local_world_size == world.world_size
    try:
        if one_host:
            return _listen(candidates[0], port)
        if not any(is_local(candidate) for candidate in candidates):
            raise PeerLostError(
                f"MASTER_ADDR={address} is {', '.join(candidates)}, no address of {socket.gethostname()}, "
                "where rank 0 runs",
                "set it to the host of rank 0",
            )
        # Other hosts may know this one under another address.
        return _listen("", port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = listener_of(port)
            by = f" by {holder}" if holder else ""
            raise PeerLostError(
                f"port {port} of {socket.gethostname()} (MASTER_PORT) is in use{by}", "end it, or start again"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise PeerLostError(
                f"MASTER_ADDR={address} is no address of {socket.gethostname()}, where all ranks run",
                "set it to 127.0.0.1",
            ) from error
        raise PeerLostError(
            f"cannot listen at {address}:{port}: {error.strerror or error}", "choose another MASTER_PORT"
        ) from error


def reach(address: str, port: int, within: float) -> socket.socket:
    """A connection to whoever listens there; tries again until `within` seconds have passed, then PeerLostError."""
    end = time.monotonic() + within
    candidates = resolve_address(address, min(_RESOLVE_SECONDS, within))
    reason = "no answer"
    while (left := end - time.monotonic()) > 0:
        for candidate in candidates:
            try:
                return socket.create_connection((candidate, port), timeout=max(0.1, min(_CONNECT_SECONDS, left)))
            except TimeoutError:
                reason = "no answer"
            except OSError as error:
                reason = error.strerror or str(error)
        time.sleep(max(0.0, min(_PAUSE_SECONDS, end - time.monotonic())))
    hint = "it did not start, it ended, or a firewall stands between"
    if is_loopback(candidates[0]):
        hint = "a loopback address means this host, so set it to the host of rank 0 if that is another one"
    raise PeerLostError(
        f"{socket.gethostname()} cannot reach rank 0 at MASTER_ADDR:MASTER_PORT={address}:{port} ({reason}, "
        f"{within:.0f} s)",
        hint,
    )


def resolve_address(address: str, within: float = _RESOLVE_SECONDS) -> list[str]:
    """The addresses of a host name, at least one; PeerLostError after three tries or `within` seconds."""
    end = time.monotonic() + within
    tries = 3
    while True:
        tries -= 1
        try:
            left = max(0.1, end - time.monotonic())
            found = bounded(lambda: socket.getaddrinfo(address, None, type=socket.SOCK_STREAM), left)
            return list(dict.fromkeys(str(entry[4][0]) for entry in found))
        except (OSError, UnicodeError, Overdue) as error:
            if not tries or time.monotonic() + _RESOLVE_PAUSE_SECONDS > end:
                reason = f"no answer in {within:.0f} s" if isinstance(error, Overdue) else str(error)
                raise PeerLostError(
                    f"{socket.gethostname()} cannot resolve the host of rank 0, MASTER_ADDR={address}: {reason}",
                    "use a name or an address that every node knows",
                ) from error
        time.sleep(_RESOLVE_PAUSE_SECONDS)


def is_loopback(address: str) -> bool:
    """Whether an address (not a name) means every host itself."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_local(address: str) -> bool:
    """Whether this host has the address: only then can it be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def listener_of(port: int) -> str:
    """`pid 12 (python)` of the process that listens on a TCP port of this host; empty when we may not know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                # State 0A is LISTEN; a local address is HEX:PORT.
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        with suppress(OSError):
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                return f"pid {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def _listen(address: str, port: int) -> socket.socket:
    if address == "" and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)
