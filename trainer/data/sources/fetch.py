"""URLs to files on this machine, through fsspec: http(s), s3, gs, memory, ... each fetched once into a spool directory.

A file appears under its name when all of it is there; a second call finds it and only asks the server for its size.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import xxhash

from trainer.data.sources.detect import CONTAINERS, extension_of
from trainer.durable import write_errors
from trainer.errors import MissingInputError, SteadfastError

RETRY_SECONDS = (0.5, 2.0, 8.0)
Result = TypeVar("Result")
_GONE_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_GONE_STATUS = (404, 410)
_TRY_AGAIN_STATUS = (408, 429)


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched: what the user knows it by, and where it is."""

    url: str
    path: Path


def is_url(pattern: str) -> bool:
    """The pattern names a protocol."""
    return "://" in pattern


def fetch(url: str, spool: Path) -> list[Fetched]:
    """The files that a URL names, on this machine, sorted by URL.

    A URL that ends in no file is listed: a glob, or a directory, of whose files those of known extensions are taken
    (not for http, which cannot list).

    Raises:
        MissingInputError: the protocol needs a package, the server is not reached in four tries or refuses, nothing is
            there, or fewer bytes came than the server said.
        CannotWriteError: the spool directory cannot be written.
    """
    filesystem, path = _filesystem(url)
    with write_errors(spool):
        spool.mkdir(parents=True, exist_ok=True)
    protocol = url.partition("://")[0]
    listable = protocol not in ("http", "https")
    paths = [path]
    if listable:
        paths = _with_retries(url, lambda: _listed(filesystem, path))
    if not paths:
        raise MissingInputError(f"no file matches {url}", "check the URL given with --input")
    names = [url] if paths == [path] else [str(filesystem.unstrip_protocol(item)) for item in paths]
    return [Fetched(name, _fetch_file(filesystem, item, name, spool)) for item, name in zip(paths, names, strict=True)]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # The default ends a download after five minutes in all; a large file takes longer and is none the worse.
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise MissingInputError(f"cannot fetch {url}: {_line(error)}", "install the package it names") from error
    except Exception as error:
        known = "known are http, https, s3, gs, hf, memory and others of fsspec"
        raise MissingInputError(f"cannot fetch {url}: {_line(error)}", known) from error
    return filesystem, str(path)


def _listed(filesystem: Any, path: str) -> list[str]:
    if any(mark in path for mark in "*?["):
        return sorted(item for item in filesystem.glob(path) if not filesystem.isdir(item))
    if filesystem.isdir(path):
        return sorted(item for item in filesystem.find(path) if extension_of(item) in CONTAINERS)
    return [path]


def _fetch_file(filesystem: Any, path: str, url: str, spool: Path) -> Path:
    """One file. The name in the spool keeps the URL's extension and tells URLs apart."""
    base = PurePosixPath(urlsplit(url).path).name or "data"
    target = spool / f"{xxhash.xxh3_64_hexdigest(url.encode())}-{base[-80:]}"

    def fetch_once() -> None:
        size = filesystem.info(path).get("size")
        if target.exists() and size in (None, target.stat().st_size):
            return
        _copy(filesystem, path, target, size)

    _with_retries(url, fetch_once)
    return target


def _copy(filesystem: Any, path: str, target: Path, size: int | None) -> None:
    """Raises OSError: fewer bytes came than the server said."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            filesystem.get_file(path, str(temporary))
        except OSError as error:
            if error.errno in _CANNOT_WRITE:
                with write_errors(temporary):
                    raise
            raise
        count = temporary.stat().st_size
        if size is not None and count != size:
            raise OSError(f"{count:,} of {size:,} bytes came")
        with write_errors(target):
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _with_retries(url: str, action: Callable[[], Result]) -> Result:
    """What `action` gives, tried again after a while when the network fails."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return action()
        except SteadfastError:
            raise
        except Exception as caught:  # each protocol's package has its own kinds
            error = _true_reason(caught)
            if pause is None or isinstance(error, _GONE_FOR_GOOD) or _is_final_answer(error):
                raise _not_fetched(url, error) from error
            time.sleep(pause)
    raise MissingInputError(f"cannot fetch {url}")


def _true_reason(error: BaseException) -> BaseException:
    """Over http, fsspec calls every failure to learn about a file a missing file, and chains the reason."""
    while isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def _is_final_answer(error: BaseException) -> bool:
    """An HTTP status that says the request itself is wrong."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _TRY_AGAIN_STATUS


def _not_fetched(url: str, error: BaseException) -> MissingInputError:
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in _GONE_STATUS:
        return MissingInputError(f"there is no {url}", "check the URL given with --input")
    return MissingInputError(f"cannot fetch {url}: {_line(error)}", "check the URL and the network, then try again")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
