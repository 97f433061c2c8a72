"""Files of a token store that lies at a URL, fetched into a cache on a local disk.

One process of a node fetches, with a few threads; the others ask it by a small file in the cache and wait for theirs
to appear. A file is written beside its place and renamed, so what is there is whole; it is compared with its checksum
by every process that opens it. Token shards are removed again, least recently used first, when the cache would grow
beyond its limit; never those that the steps being prepared need.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import TypeVar

from trainer.durable import write_errors, xxh3_of_file
from trainer.errors import CannotWriteError, DataError, HangError, MissingInputError, SteadfastError, UsageError

THREADS = 4
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.2
POLL_SECONDS = 0.02
CLOSE_SECONDS = 10.0
PROTECTED_STEPS = 4
"""Steps whose shards are kept: the two that are prepared ahead, the one in use, the one before (a slower rank's)."""
RESTORE = "put an undamaged copy of the store at this URL"

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store at a URL: where it is, where it goes, and what it must be."""

    url: str
    path: Path
    bytes: int
    xxh3: str
    key: str
    """Names it in the cache: store and file in one word."""
    evictable: bool

    def is_whole(self, path: Path) -> bool:
        """Whether the file at `path` has the right content. Raises FileNotFoundError when there is none."""
        return path.stat().st_size == self.bytes and xxh3_of_file(path) == self.xxh3


def is_url(location: str | Path) -> bool:
    """Whether a store's location is a URL, not a path."""
    return "://" in str(location)


def fetch_bytes(url: str) -> bytes:
    """The content of a small file.

    Raises:
        MissingInputError: it is not there, or cannot be fetched.
    """

    def fetch() -> bytes:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
        content: bytes = filesystem.cat_file(path)
        return content

    try:
        return _with_retries(url, fetch)
    except FileNotFoundError as error:
        raise MissingInputError(f"there is no {url}", "check the URL of the store") from error


class ShardCache:
    """The files of stores at URLs on a local disk, at most `limit_bytes` of token shards.

    Args:
        directory: on a disk of this node; stores share it.
        limit_bytes: most bytes of token shards.
        downloads: whether this process fetches for its node; exactly one process of a node does.
        shared: whether other processes of this node ask this one for files.
        patience_seconds: how long a process waits for a file that another one shall fetch.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        *,
        downloads: bool = True,
        shared: bool = False,
        patience_seconds: float = 600,
    ) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.downloads = downloads
        self.patience_seconds = patience_seconds
        self._wanted = directory / "wanted"
        self._partial = directory / "partial"
        with write_errors(directory):
            self._wanted.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
        self._known: dict[str, RemoteFile] = {}
        self._changed = threading.Condition()
        self._urgent: dict[str, RemoteFile] = {}
        self._soon: dict[str, RemoteFile] = {}
        self._running: dict[str, RemoteFile] = {}
        self._optional: set[str] = set()  # of the running: those that nobody needs yet
        self._failed: dict[str, SteadfastError] = {}
        self._protected: deque[set[Path]] = deque(maxlen=PROTECTED_STEPS)
        self._closed = False
        self._threads: list[threading.Thread] = []
        if downloads:
            self._remove_abandoned()
            work = [self._work] * THREADS + ([self._listen] if shared else [])
            self._threads = [threading.Thread(target=target, name="fetch", daemon=True) for target in work]
            for thread in self._threads:
                thread.start()

    def register(self, files: Sequence[RemoteFile]) -> None:
        """Make files known, so that other processes can ask for them."""
        with self._changed:
            self._known |= {file.key: file for file in files}
        for directory in {file.path.parent for file in files}:
            with write_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)

    def path(self, file: RemoteFile) -> Path:
        """The local path of a registered file, whole and just checked; fetched if it is not there.

        Raises:
            DataError: it is missing or damaged at its URL.
            MissingInputError: it cannot be fetched.
            UsageError: the cache is too small.
            HangError: the process that fetches did not within the patience.
        """
        deadline, damaged = time.monotonic() + self.patience_seconds, 0
        while damaged < 2:
            self._wait_for(file, deadline)
            try:
                if file.is_whole(file.path):
                    _mark_used(file.path)
                    return file.path
            except FileNotFoundError:
                # Removed in between: the cache is small, or another run uses it too.
                continue
            # A disk error, or a file of an earlier life of the cache: away with it.
            damaged += 1
            file.path.unlink(missing_ok=True)
        raise DataError(f"{file.path} is damaged each time it is fetched from {file.url}", "check the disk")

    def expect(self, needed: Sequence[RemoteFile], soon: Sequence[RemoteFile] = ()) -> None:
        """Say what the next step needs, and what may be needed after it, nearest first; returns at once.

        What is needed is fetched and kept while the next steps are prepared; what comes soon is fetched when there is
        room.
        """
        if not self.downloads:
            return
        for file in needed:
            with suppress(FileNotFoundError):
                _mark_used(file.path)
        with self._changed:
            self._protected.append({file.path for file in needed})
            self._urgent |= {
                file.key: file for file in needed if file.key not in self._running and not file.path.exists()
            }
            self._soon = {file.key: file for file in soon}
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; a fetch in progress is awaited for a moment."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def _wait_for(self, file: RemoteFile, deadline: float) -> None:
        """Until the file is there."""
        began = time.time()
        while not file.path.exists():
            if time.monotonic() > deadline:
                raise HangError(
                    f"{file.url} was not fetched into {self.directory} within {self.patience_seconds:g} seconds",
                    "check the network and local rank 0, or give more time with engine.timeout_seconds",
                )
            if self.downloads:
                self._fetch_soon(file)
            else:
                if (failure := self._failure_of(file, began)) is not None:
                    raise DataError(*failure)
                with write_errors(self._wanted):
                    (self._wanted / file.key).touch()
                time.sleep(POLL_SECONDS)

    def _fetch_soon(self, file: RemoteFile) -> None:
        """Have a thread fetch the file, and wait until something has changed."""
        with self._changed:
            if file.path.exists():
                return
            if self._closed:
                raise MissingInputError(f"{file.url} was not fetched", "the cache is closed")
            if (error := self._failed.pop(file.key, None)) is not None:
                raise error
            if file.key not in self._running and file.key not in self._urgent:
                self._urgent[file.key] = file
                self._changed.notify_all()
            self._changed.wait(1.0)

    def _failure_of(self, file: RemoteFile, since: float) -> list[str] | None:
        """Fact and remedy that the fetching process wrote down for a file after `since`."""
        marker = self._wanted / f"{file.key}.failed"
        try:
            # (A file's time may lag by a clock tick.)
            return marker.read_text().splitlines()[:2] if marker.stat().st_mtime > since - 1 else None
        except FileNotFoundError:
            return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (chosen := self._next()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                file, urgent = chosen
                self._running[file.key] = file
                if not urgent:
                    self._optional.add(file.key)
            error: SteadfastError | None = None
            try:
                if self._make_room(file, optional=not urgent):
                    self._fetch(file)
            except SteadfastError as found:
                error = found
            except OSError as found:
                error = MissingInputError(f"cannot fetch {file.url}: {found}", "check the cache and its disk")
            with self._changed:
                del self._running[file.key]
                self._optional.discard(file.key)
                if error is not None:
                    self._soon.pop(file.key, None)
                    if urgent:
                        self._failed[file.key] = error
                if error is None or urgent:
                    self._answer(file, error)
                self._changed.notify_all()

    def _next(self) -> tuple[RemoteFile, bool] | None:
        """What to fetch now, and whether it is needed or only expected. (The caller holds the lock.)"""
        if self._closed:
            return None
        while self._urgent:
            file = self._urgent.pop(next(iter(self._urgent)))
            if file.key not in self._running and not file.path.exists():
                self._failed.pop(file.key, None)
                return file, True
        for file in self._soon.values():
            if file.key not in self._running and not file.path.exists():
                return (file, False) if self._make_room(file, optional=True) else None
        return None

    def _make_room(self, file: RemoteFile, optional: bool) -> bool:
        """Remove token shards until `file` fits; whether it does.

        `optional`: keep everything that is expected soon, too. A file that is needed waits for those on the way that
        are not, and takes their place; UsageError when it does not fit even so.
        """
        if not file.evictable:
            return True
        with self._changed:
            while True:
                used, in_the_way = self._remove_for(file, optional)
                if used <= self.limit_bytes or optional:
                    return used <= self.limit_bytes
                if used - in_the_way > self.limit_bytes or self._closed:
                    break
                self._changed.wait(1.0)
        raise UsageError(
            f"the cache {self.directory} of {self.limit_bytes / 2**30:.3g} GiB cannot hold the {used / 2**30:.3g} "
            "GiB of token shards that the steps being prepared need",
            "set a larger data.cache_gib or a smaller data.shuffle_blocks",
        )

    def _remove_for(self, file: RemoteFile, optional: bool) -> tuple[int, int]:
        """Remove what may go until `file` fits; bytes in use with it, and of those the ones on the way unasked for.

        The caller holds the lock.
        """
        cached = list(self._cached())
        here = {path for path, _, _ in cached}
        running = [other for other in self._running.values() if other.key != file.key and other.evictable]
        # A file that has just arrived is still called running.
        arriving = [other for other in running if other.path not in here]
        kept = set().union(*self._protected, (other.path for other in running))
        expected = {other.path: index for index, other in enumerate(self._soon.values())}
        used = sum(size for _, size, _ in cached) + sum(other.bytes for other in arriving) + file.bytes
        # First what nobody expects, longest unused first; then what is expected last.
        removable = sorted(
            (entry for entry in cached if entry[0] not in kept),
            key=lambda entry: (-expected.get(entry[0], len(expected)), entry[2]),
        )
        for path, size, _ in removable:
            if used <= self.limit_bytes or (optional and path in expected):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used, sum(other.bytes for other in running if other.key in self._optional)

    def _cached(self) -> Iterator[tuple[Path, int, float]]:
        """Path, size and time of last use of every token shard in the cache, of all stores."""
        for path in self.directory.glob("*/tokens/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield path, found.st_size, found.st_mtime

    def _fetch(self, file: RemoteFile) -> None:
        """Bring one file here; what arrives damaged is fetched once more.

        Raises:
            DataError: it is missing, or damaged twice.
            MissingInputError: it cannot be fetched.
            CannotWriteError: no space left.
        """
        temporary = self._partial / f"{file.key}.{gethostname()}.{os.getpid()}"
        try:
            for _ in range(2):
                _with_retries(file.url, lambda: _download(file.url, temporary))
                if file.is_whole(temporary):
                    temporary.replace(file.path)
                    return
                size = temporary.stat().st_size
            wrong = f"{size} bytes instead of {file.bytes}" if size != file.bytes else "its checksum does not match"
            raise DataError(f"{file.url} is damaged: {wrong}", RESTORE)
        except FileNotFoundError as error:
            raise DataError(f"{file.url} is missing", RESTORE) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _listen(self) -> None:
        """Take up what other processes ask for."""
        while not self._closed:
            names = [entry.name for entry in os.scandir(self._wanted) if not entry.name.endswith(".failed")]
            with self._changed:
                for name in names:
                    file = self._known.get(name)
                    if file is None or name in self._urgent or name in self._running:
                        continue
                    if file.path.exists():
                        self._answer(file, None)
                        continue
                    self._urgent[name] = file
                    self._changed.notify_all()
            time.sleep(POLL_SECONDS)

    def _answer(self, file: RemoteFile, error: SteadfastError | None) -> None:
        marker = self._wanted / file.key
        with suppress(OSError):
            if error is not None:
                marker.with_name(f"{marker.name}.failed").write_text(f"{error.fact}\n{error.remedy}\n")
            marker.unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        """What a killed process of this host left half written, and failures of an earlier life."""
        for left in self._partial.glob(f"*.{gethostname()}.*"):
            process = left.name.rpartition(".")[2]
            if process.isdigit() and not Path("/proc", process).exists():
                left.unlink(missing_ok=True)
        for marker in self._wanted.glob("*.failed"):
            marker.unlink(missing_ok=True)


def _mark_used(path: Path) -> None:
    # Not the file system's own clock: it ticks too seldom to order two uses.
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _download(url: str, target: Path) -> None:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        filesystem.get_file(path, str(target))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWriteError(
                f"no space left while writing {target}", "free disk space, or set a smaller data.cache_gib"
            ) from error
        raise


def _with_retries(url: str, action: Callable[[], T]) -> T:
    """Try a few times, with waits that grow and differ between ranks. FileNotFoundError comes through at once."""
    attempt = 0
    while True:
        try:
            return action()
        except (FileNotFoundError, SteadfastError):
            raise
        except ImportError as error:
            raise MissingInputError(f"cannot fetch {url}: {error}", "install what this kind of URL needs") from error
        except Exception as error:
            # Every kind of file system has errors of its own; what is left may be gone in a moment.
            attempt += 1
            if attempt == ATTEMPTS:
                raise MissingInputError(
                    f"cannot fetch {url}: {error or type(error).__name__}", "check the network and the URL"
                ) from error
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
