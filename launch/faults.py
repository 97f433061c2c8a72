"""Names for what torch, gloo and NCCL throw: a lost peer is not a bug of ours, and a full disk has a remedy."""

from __future__ import annotations

import errno
import re

from trainer.errors import CannotWriteError, PeerLostError, SteadfastError

_RESTART = "restart: training resumes from the last committed checkpoint"
_OUT_OF_MEMORY = "lower train.micro_batch_size or data.sequence_length, or offload more (engine.deepspeed)"

# Each pattern was seen in a message of gloo, NCCL, TCPStore or torch.distributed. More special ones come first.
_FAULTS: tuple[tuple[str, str, str], ...] = (
    ("EADDRINUSE|address already in use", "the rendezvous port is taken by another process", "start again"),
    (
        "Name or service not known|nodename nor servname|Temporary failure in name resolution|getaddrinfo|gai error",
        "cannot resolve the rendezvous host MASTER_ADDR",
        "use a name or address that every node resolves",
    ),
    (
        "client socket has timed out|waiting for clients",
        "not all ranks came to the rendezvous in time",
        "see why the missing ranks did not start, or whether a firewall stands between; then start again",
    ),
    (
        "Application timeout|Timed out waiting|wait timeout|Timeout waiting for key|socket has timed out|"
        "Watchdog caught collective operation timeout|timed out after \\d+ ?(ms|milli)|DistStoreError",
        "a peer did not answer within engine.timeout_seconds",
        _RESTART,
    ),
    (
        "Connection reset by peer|Connection closed by peer|Broken pipe|Connection refused|Socket is not connected|"
        "failed to recv, got 0 bytes|recvVector failed|connectFullMesh|Connection was likely closed|"
        "ncclRemoteError|remote process exited|ncclSystemError|NCCL communicator was aborted|DistNetworkError|"
        "Socket operation failed|Software caused connection abort|No route to host|Network is unreachable",
        "lost the connection to a peer",
        _RESTART,
    ),
)


def name_of_fault(exception: BaseException) -> SteadfastError | None:
    """The user-facing error behind `exception` or behind what caused it; None when nothing is recognized."""
    seen: set[int] = set()
    link: BaseException | None = exception
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, SteadfastError):
            return link
        if (fault := _fault(link)) is not None:
            return fault
        link = link.__cause__ or link.__context__
    return None


def _fault(exception: BaseException) -> SteadfastError | None:
    text = str(exception)
    kind = type(exception).__name__
    if isinstance(exception, OSError):
        return _write_fault(exception)
    if isinstance(exception, MemoryError) or kind == "OutOfMemoryError" or "out of memory" in text:
        return SteadfastError(f"memory ran out: {_first_line(text) or kind}", _OUT_OF_MEMORY)
    if not isinstance(exception, RuntimeError):
        return None
    if "inline_container" in text and "unexpected pos" in text:
        return CannotWriteError("a file was cut short while writing", "the disk is probably full: free some space")
    for pattern, fact, remedy in _FAULTS:
        if re.search(pattern, f"{kind}: {text}", re.IGNORECASE):
            return PeerLostError(f"{fact} ({_first_line(text)})", remedy)
    return None


def _write_fault(error: OSError) -> CannotWriteError | None:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotWriteError(f"no space left on the device{place}", "free some space, then start again")
    if error.errno == errno.EROFS:
        return CannotWriteError(f"the file system is read-only{place}", "write run.dir somewhere else")
    return None


def _first_line(text: str, longest: int = 160) -> str:
    line = (text.strip().splitlines() or [""])[0]
    # gloo begins with "[/path/in/its/sources.cc:525]", which tells the reader nothing.
    line = re.sub(r"^\[[^]]*\.(?:cc|cpp|h):\d+\]\s*", "", line)
    line = re.sub(r"\. This is typically caused .*", "", line)
    return line if len(line) <= longest else line[: longest - 3] + "..."
