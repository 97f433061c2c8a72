"""The job API of a Ray cluster (http://HEAD:8265), and whether it is safe to talk to.

Whoever reaches the API of a cluster that asks for no token can run any command there. Whether this one asks is found
out by asking without a token first.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trainer.errors import PeerLostError, UsageError

ANSWER_SECONDS = 20.0
_TOKEN_REMEDY = "put the token of the cluster into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH"
T = TypeVar("T")


def is_api(address: str | None) -> bool:
    """Whether an address is that of a job API, and not of the cluster itself."""
    return address is not None and address.startswith(("http://", "https://"))


def is_loopback(address: str) -> bool:
    """Whether an address, with or without scheme and port, stays on this machine."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_token(environ: Mapping[str, str], home: Path) -> bool:
    """Whether Ray would find a token: in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in ~/.ray."""
    if environ.get("RAY_AUTH_TOKEN"):
        return True
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(path) if path else home / ".ray" / "auth_token").is_file()


def asks_for_token(address: str) -> bool:
    """Whether the job API at `address` asks for a token. Raises PeerLostError when no such API answers."""
    status = status_without_token(address)
    if status not in (200, 401, 403):
        raise PeerLostError(f"{address} answers {status}, which no job API of Ray does", "check --address")
    return status != 200


def refuse_open(address: str, *, allowed: bool) -> None:
    """Raise UsageError for a remote cluster that was found to ask for no token, unless that is `allowed`."""
    if not allowed and not is_loopback(address):
        raise UsageError(
            f"the Ray cluster at {address} asks for no token: whoever reaches it can run anything on it",
            "start it with RAY_AUTH_MODE=token, or give --allow-unauthenticated",
        )


def refuse_open_cluster(address: str, api: str, environ: Mapping[str, str], *, allowed: bool) -> None:
    """As `refuse_open` for a cluster that this process is already connected to; `api` is empty when it has none.

    Ray connects with a token to clusters that ask for none. But one that we are connected to without a token is open.
    """
    if environ.get("RAY_AUTH_MODE") != "token" or (api and not asks_for_token(api)):
        refuse_open(address, allowed=allowed)


def status_without_token(address: str) -> int:
    """The HTTP status of a list of jobs, asked for without a token. Raises PeerLostError when nobody answers."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        raise PeerLostError(
            f"no job API of Ray answers at {address}: {getattr(error, 'reason', error)}",
            "check --address; is the dashboard on (ray start --head --dashboard-host=...)?",
        ) from error


def connect(address: str, *, allow_unauthenticated: bool) -> Any:
    """A JobSubmissionClient of the API at `address`.

    Raises UsageError when the cluster asks for a token and we have none or a wrong one, or when it asks for none
    though it is remote; PeerLostError when nobody answers.
    """
    if not asks_for_token(address):
        refuse_open(address, allowed=allow_unauthenticated)
    else:
        if not has_token(os.environ, Path.home()):
            raise UsageError(f"the Ray cluster at {address} asks for a token, and there is none", _TOKEN_REMEDY)
        # Ray reads it while being imported.
        os.environ["RAY_AUTH_MODE"] = "token"
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    return call(lambda: JobSubmissionClient(address), address)


def call(ask: Callable[[], T], address: str) -> T:
    """What `ask` returns; what goes wrong becomes one line."""
    from ray.exceptions import AuthenticationError

    try:
        return ask()
    except AuthenticationError as error:
        raise UsageError(f"the Ray cluster at {address} refuses our token", _TOKEN_REMEDY) from error
    except (ConnectionError, OSError) as error:
        raise PeerLostError(f"the job API at {address} does not answer: {_first_line(error)}") from error
    except RuntimeError as error:
        # What Ray's client raises for any other status.
        raise PeerLostError(f"the job API at {address} refuses: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
