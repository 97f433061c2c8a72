"""Every file-system state that a crash can leave behind, from a recording of the calls a program made.

`Recorder` watches files below one directory while the commit protocol really runs: writes, syncs, new names, renames
and removals, in order, with marks in between ("step 3 was announced"). `States` then builds what a power cut after
any of these calls may leave, on a file system that keeps no promise it did not give:

  - content is durable from its fsync on; of what was written since, any 4 KiB pages may be there or not, in any
    order, and the length may be that of any of the writes
  - a name (made, renamed, removed) is durable from the fsync of its directory on; of the changes since, any may be
    there or not, in any order; one rename is whole or not at all

A crash of the process alone (nothing is lost, nothing more is done) is one of these states.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import xxhash

PAGE = 4096


@dataclass(frozen=True)
class Call:
    """One recorded call. `node` is a file or directory by number, whatever it is called."""

    kind: str  # "write", "truncate", "sync", "names", "mark"
    node: int = 0
    offset: int = 0
    data: bytes = b""
    changes: tuple[tuple[int, str, int | None], ...] = ()
    """Of "names": (directory, name, node now under this name or None)."""
    mark: Any = None


@dataclass
class Recorder:
    """Records the calls of this process below `root`, which is empty at the start: `with recorder.watching()`."""

    root: Path
    calls: list[Call] = field(default_factory=list)
    directories: set[int] = field(default_factory=lambda: {0})

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self._nodes: dict[str, int] = {str(self.root): 0}  # present path to node
        self._descriptors: dict[int, int] = {}
        self._count = 0
        self._mutex = threading.RLock()

    def mark(self, value: Any) -> None:
        """Note something between the calls."""
        self._record(Call("mark", mark=value))

    def _record(self, call: Call) -> None:
        with self._mutex:
            self.calls.append(call)

    def _inside(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        text = os.path.abspath(os.fspath(path))  # noqa: PTH100 - called from inside pathlib
        return text if text.startswith(f"{self.root}{os.sep}") or text == str(self.root) else None

    def _new(self, path: str, *, directory: bool) -> int:
        self._count += 1
        self._nodes[path] = self._count
        if directory:
            self.directories.add(self._count)
        self._record(Call("names", changes=((self._parent(path), os.path.basename(path), self._count),)))  # noqa: PTH119
        return self._count

    def _parent(self, path: str) -> int:
        return self._nodes[os.path.dirname(path)]  # noqa: PTH120

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what happens inside the block, in all threads."""
        recorder, real_open, real = self, io.open, {name: getattr(os, name) for name in ("open", "fsync", "mkdir")}
        real |= {name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "rmdir", "close")}

        class File(io.FileIO):
            node = 0

            def write(self, data: Any) -> int:
                with recorder._mutex:
                    offset = self.tell() if "a" not in self.mode else os.fstat(self.fileno()).st_size
                    count = super().write(data)
                    piece = bytes(memoryview(data).cast("B")[:count])
                    recorder._record(Call("write", self.node, offset, piece))
                    return count

            def close(self) -> None:
                if not self.closed:
                    recorder._descriptors.pop(self.fileno(), None)
                super().close()

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
            path = recorder._inside(file)
            if path is None or not set(mode) & set("wax+"):
                return real_open(file, mode, buffering, *more, **options)
            with recorder._mutex:
                existed = os.path.lexists(path)
                raw = File(path, mode.replace("b", "").replace("t", ""))
                raw.node = recorder._nodes[path] if existed else recorder._new(path, directory=False)
                recorder._descriptors[raw.fileno()] = raw.node
                if existed and "w" in mode:
                    recorder._record(Call("truncate", raw.node))
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

        def watched_os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
            descriptor: int = real["open"](path, flags, *more, **options)
            with recorder._mutex:
                inside = recorder._inside(path)
                if inside is not None and inside in recorder._nodes and not options.get("dir_fd"):
                    recorder._descriptors[descriptor] = recorder._nodes[inside]
            return descriptor

        def watched_close(descriptor: int) -> None:
            recorder._descriptors.pop(descriptor, None)
            real["close"](descriptor)

        def watched_fsync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            if (node := recorder._descriptors.get(descriptor)) is not None:
                recorder._record(Call("sync", node))

        def watched_mkdir(path: Any, *more: Any, **options: Any) -> None:
            with recorder._mutex:
                real["mkdir"](path, *more, **options)
                if (inside := recorder._inside(path)) is not None:
                    recorder._new(inside, directory=True)

        def watched_rename(source: Any, target: Any, **options: Any) -> None:
            with recorder._mutex:
                real["replace"](source, target, **options)
                old, new = recorder._inside(source), recorder._inside(target)
                if old is None or new is None:
                    return
                changes = ((recorder._parent(old), os.path.basename(old), None),)  # noqa: PTH119
                for path in [path for path in recorder._nodes if path == old or path.startswith(old + os.sep)]:
                    recorder._nodes[new + path[len(old) :]] = recorder._nodes.pop(path)
                after = ((recorder._parent(new), os.path.basename(new), recorder._nodes[new]),)  # noqa: PTH119
                recorder._record(Call("names", changes=changes + after))

        def watched_remove(name: str) -> Any:
            def remove(path: Any, **options: Any) -> None:
                with recorder._mutex:
                    real[name](path, **options)
                    if (inside := recorder._inside(path)) is not None:
                        recorder._nodes.pop(inside)
                        gone = (recorder._parent(inside), os.path.basename(inside), None)  # noqa: PTH119
                        recorder._record(Call("names", changes=(gone,)))

            return remove

        def rmtree(path: Any, *, ignore_errors: bool = False, **_: Any) -> None:
            for folder, folders, files in os.walk(path, topdown=False):
                for name in files:
                    os.unlink(os.path.join(folder, name))  # noqa: PTH108, PTH118
                for name in folders:
                    os.rmdir(os.path.join(folder, name))  # noqa: PTH106, PTH118
            if os.path.isdir(path):  # noqa: PTH112
                os.rmdir(path)  # noqa: PTH106

        with ExitStack() as stack:
            for owner, name, replacement in (
                (io, "open", watched_open), (builtins, "open", watched_open), (os, "open", watched_os_open),
                (os, "close", watched_close), (os, "fsync", watched_fsync), (os, "mkdir", watched_mkdir),
                (os, "rename", watched_rename), (os, "replace", watched_rename),
                (os, "unlink", watched_remove("unlink")), (os, "remove", watched_remove("remove")),
                (os, "rmdir", watched_remove("rmdir")), (shutil, "rmtree", rmtree),
            ):  # fmt: skip
                stack.enter_context(patch.object(owner, name, replacement))
            yield


@dataclass(frozen=True)
class Tree:
    """Content of a file system: files as bytes and directories, by path relative to the root."""

    files: dict[str, bytes]
    folders: frozenset[str]

    digest: bytes
    """Equal for equal trees."""

    def write(self, root: Path) -> None:
        """Put it into the empty directory `root`."""
        for folder in sorted(self.folders):
            (root / folder).mkdir()
        for name, content in self.files.items():
            (root / name).write_bytes(content)


@dataclass(frozen=True)
class _Moment:
    """What a crash behind some call cannot change, and the calls that it may keep or lose."""

    names: dict[int, dict[str, int]]
    contents: dict[int, bytes]
    hashes: dict[int, bytes]
    open: list[Call]
    pages: int


class States:
    """States after a crash of a recording; see the module's docstring."""

    def __init__(self, calls: list[Call], directories: set[int]) -> None:
        self._calls = calls
        self._directories = directories
        self._moments: dict[int, _Moment] = {}

    def marks_before(self, end: int) -> list[Any]:
        """The marks among the first `end` calls."""
        return [call.mark for call in self._calls[:end] if call.kind == "mark"]

    def in_the_balance(self, end: int) -> int:
        """How many pages and names a crash behind the first `end` calls may keep or lose."""
        return self._moment(end).pages

    def after(self, end: int, generator: random.Random, survival: float) -> Tree:
        """One state after a crash behind the first `end` calls.

        What was not synced is there with probability `survival`: at 1 only the process died, at 0 everything that may
        be lost is.
        """
        moment = self._moment(end)
        names = {directory: dict(entries) for directory, entries in moment.names.items()}
        changed: dict[int, bytearray] = {}
        for call in moment.open:
            if call.kind == "names":
                if generator.random() < survival:
                    _rename(names, call)
            else:
                content = changed.get(call.node)
                if content is None:
                    content = changed[call.node] = bytearray(moment.contents.get(call.node, b""))
                if call.kind == "truncate":
                    if generator.random() < survival:
                        content.clear()
                else:
                    _write_some(content, call, generator, survival)
        return self._tree(names, moment, {node: bytes(content) for node, content in changed.items()})

    def _moment(self, end: int) -> _Moment:
        if end not in self._moments:
            synced: set[int] = set()
            open_calls: list[Call] = []
            durable: list[Call] = []
            for call in reversed(self._calls[:end]):
                if call.kind == "sync":
                    synced.add(call.node)
                elif call.kind != "mark":
                    # A rename touches two entries at once: it is on disk as soon as either directory is.
                    nodes = [directory for directory, _, _ in call.changes] or [call.node]
                    (durable if synced & {*nodes} else open_calls).append(call)
            names: dict[int, dict[str, int]] = {node: {} for node in self._directories}
            contents: dict[int, bytearray] = {}
            for call in reversed(durable):
                if call.kind == "names":
                    _rename(names, call)
                elif call.kind == "truncate":
                    contents[call.node] = bytearray()
                else:
                    _write_some(contents.setdefault(call.node, bytearray()), call, random.Random(0), 1)
            fixed = {node: bytes(content) for node, content in contents.items()}
            self._moments[end] = _Moment(
                names,
                fixed,
                {node: xxhash.xxh3_128_digest(content) for node, content in fixed.items()},
                open_calls[::-1],
                sum(len(call.data) // PAGE + 1 for call in open_calls),
            )
        return self._moments[end]

    def _tree(self, names: dict[int, dict[str, int]], moment: _Moment, changed: dict[int, bytes]) -> Tree:
        files: dict[str, bytes] = {}
        folders: set[str] = set()
        total = xxhash.xxh3_128()

        def walk(directory: int, prefix: str) -> None:
            for name, node in sorted(names[directory].items()):
                total.update(f"{prefix}{name} ".encode())
                if node in self._directories:
                    folders.add(prefix + name)
                    walk(node, f"{prefix}{name}/")
                else:
                    content = changed.get(node)
                    total.update(
                        moment.hashes.get(node, b"empty") if content is None else xxhash.xxh3_128_digest(content)
                    )
                    files[prefix + name] = moment.contents.get(node, b"") if content is None else content

        walk(0, "")
        return Tree(files, frozenset(folders), total.digest())


def _rename(names: dict[int, dict[str, int]], call: Call) -> None:
    for directory, name, node in call.changes:
        if node is None:
            names[directory].pop(name, None)
        else:
            names[directory][name] = node


def _write_some(content: bytearray, call: Call, generator: random.Random, survival: float) -> None:
    end = call.offset + len(call.data)
    # The length may be on disk before the data is: what is missing then reads as zeros.
    if generator.random() < survival:
        content.extend(bytes(max(0, end - len(content))))
    begin = call.offset
    while begin < end:
        stop = min(end, (begin // PAGE + 1) * PAGE)
        if generator.random() < survival and stop <= len(content):
            content[begin:stop] = call.data[begin - call.offset : stop - call.offset]
        begin = stop
