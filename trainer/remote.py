"""Writing to object storage through fsspec, where anything may fail and what was said to be done may be half done.

An object store has no rename; callers write what makes a copy valid (a manifest) last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import CannotWriteError, UsageError

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0


class Destination:
    """A place in an fsspec file system. Every operation is tried `attempts` times with growing pauses.

    Raises CannotWriteError with `remedy` when one keeps failing.
    """

    def __init__(
        self,
        filesystem: Any,
        root: str,
        remedy: str,
        pause: Callable[[float], None] = time.sleep,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._filesystem = filesystem
        self.root = root
        self._remedy = remedy
        self._pause = pause
        self._attempts = attempts

    def content(self, name: str) -> bytes | None:
        """The bytes at `name`, None when nothing is there."""
        found: bytes | None = self._insist(name, partial(self._content, name))
        return found

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to `name` and compare the size of what is there then."""
        self._insist(name, partial(self._put, source, name))

    def put_text(self, name: str, content: bytes) -> None:
        """Write `content` to `name` and compare the size of what is there then."""
        self._insist(name, partial(self._put_text, name, content))

    def remove(self, name: str) -> None:
        """Remove the object `name`."""
        self._insist(name, partial(self._filesystem.rm_file, f"{self.root}/{name}"))

    def _insist(self, name: str, work: Callable[[], Any]) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return work()
            except Exception as error:
                # Anything at all: every storage service has failures of its own.
                if attempt >= self._attempts:
                    raise CannotWriteError(
                        f"cannot write {self.root}/{name} after {attempt} attempts: {type(error).__name__}: {error}",
                        self._remedy,
                    ) from error
                self._pause(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))

    def _content(self, name: str) -> bytes | None:
        try:
            found: bytes = self._filesystem.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None
        return found

    def _put(self, source: Path, name: str) -> None:
        place = f"{self.root}/{name}"
        self._filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._filesystem.put_file(str(source), place)
        self._check_size(place, source.stat().st_size)

    def _put_text(self, name: str, content: bytes) -> None:
        place = f"{self.root}/{name}"
        self._filesystem.pipe_file(place, content)
        self._check_size(place, len(content))

    def _check_size(self, place: str, expected: int) -> None:
        # What a listing said earlier may be out of date.
        self._filesystem.invalidate_cache()
        if (size := self._filesystem.info(place)["size"]) != expected:
            raise OSError(f"{place} has {size} bytes, sent were {expected}")


def open_destination(url: str, what: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it; UsageError, naming `what` asked, when fsspec has none."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{what}: {url} cannot be used: {error}", "give file://, s3://, gs:// ...") from error
    return filesystem, str(root).rstrip("/")
