"""Keeps one engine process running: start, prove, watch, restart.

An engine gets traffic after its health route answers and one real request succeeded. When it ends or stops answering
its health route it is started again, each time after twice the wait; the bound on failures in a row ends the server,
because an engine that cannot stay up needs a person. An engine that never came up is not tried again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tools.serving.engines import EngineSpec, environment_of
from trainer.checkout import ROOT
from trainer.errors import CheckpointError, DataError, MissingInputError, SteadfastError, UsageError

KEPT_LINES = 40
LINE_BYTES = 1 << 16
CHECK_SECONDS = 120.0
USER_ERRORS: tuple[type[SteadfastError], ...] = (UsageError, DataError, MissingInputError, CheckpointError)


@dataclass(frozen=True)
class Patience:
    """How long to wait for an engine, and how often to start it again. Seconds."""

    poll: float = 0.2
    watch: float = 2.0
    missed_health: int = 5
    health: float = 10.0
    """Generous: an engine in the middle of a long prompt may be slow to answer, and that is no crash."""
    first_wait: float = 1.0
    longest_wait: float = 30.0
    most_failures: int = 5
    stable_after: float = 300.0
    """A run of this length makes the failures before it forgotten."""
    stop: float = 15.0


class _EngineFailed(Exception):
    """The engine did not come up, or went away."""


@dataclass
class Supervisor:
    """Runs the engine of `spec`. Used in the event loop's thread only.

    `url` and `key` are those of the engine that runs now, `ready` says whether it takes traffic. `run` goes on until it
    is cancelled or the engine is given up (SteadfastError); `stop` ends the process.
    """

    spec: EngineSpec
    patience: Patience = field(default_factory=Patience)
    on_restart: Callable[[], None] = lambda: None
    url: str = ""
    key: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    facts: dict[str, Any] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None
    _last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    _reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine's process id."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Keep the engine running; raises when it never came up or fails too often in a row."""
        failures = 0
        came_up = False
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                process = await self._start()
                came_up = True
                began = loop.time()
                await self._watch(process)
            except _EngineFailed as error:
                await self.stop()
                if not came_up:
                    raise self._cannot_start(error) from error
                failures = 1 if loop.time() - began > self.patience.stable_after else failures + 1
                if failures > self.patience.most_failures:
                    raise SteadfastError(
                        f"the engine failed {failures} times in a row: {error}", "see its lines above"
                    ) from error
                wait = min(self.patience.first_wait * 2 ** (failures - 1), self.patience.longest_wait)
                sys.stderr.write(f"the engine failed: {error}; starting it again in {wait:g} s\n")
                self.on_restart()
                await asyncio.sleep(wait)

    async def stop(self) -> None:
        """End the engine's process: asked first, then killed."""
        self.ready.clear()
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self.patience.stop)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._reader is not None:
            self._reader.cancel()

    async def _start(self) -> asyncio.subprocess.Process:
        self.key = secrets.token_urlsafe(24)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        leash = [sys.executable, "-m", "tools.serving.leash", str(os.getpid())]
        self._last_lines.clear()
        process = self._process = await asyncio.create_subprocess_exec(
            *leash,
            *self.spec.command(port, self.key),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment_of(self.spec, self.key),
            cwd=ROOT,
            limit=LINE_BYTES,
            # Ctrl-C in the terminal is the gateway's to act on: running requests are finished first.
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(process.stdout))
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"}) as session:
            await self._until_healthy(session)
            await self._prove(session)
            self.facts = await self._facts(session)
        self.ready.set()
        return process

    async def _until_healthy(self, session: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.spec.start_seconds
        while not await self._is_healthy(session):
            await self._fail_if_ended()
            if loop.time() > deadline:
                raise _EngineFailed(f"not healthy after {self.spec.start_seconds:g} s")
            await asyncio.sleep(self.patience.poll)

    async def _prove(self, session: aiohttp.ClientSession) -> None:
        """One real answer: an engine can load weights, say that it is healthy, and fail at the first token."""
        problem = ""
        for path, body in self.spec.checks:
            try:
                async with session.post(
                    self.url + path, json=body, timeout=aiohttp.ClientTimeout(CHECK_SECONDS)
                ) as answer:
                    if answer.status == 200:
                        return
                    problem = f"{path}: {answer.status} {(await answer.text())[:300]}"
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{path}: {type(error).__name__} {error}"
        await self._fail_if_ended()
        raise _EngineFailed(f"its first answer failed: {problem}")

    async def _facts(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What the engine says about its model; engines that say nothing are served all the same."""
        with suppress(aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
            async with session.get(f"{self.url}/v1/models", timeout=aiohttp.ClientTimeout(10)) as answer:
                return dict((await answer.json())["data"][0])
        return {}

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Return never; raises when the engine ends, or does not answer its health route for a while."""
        missed = 0
        ended = asyncio.ensure_future(process.wait())
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"}) as session:
            try:
                while missed < self.patience.missed_health:
                    await asyncio.wait({ended}, timeout=self.patience.watch)
                    if ended.done():
                        await self._fail_if_ended()
                    missed = 0 if await self._is_healthy(session) else missed + 1
            finally:
                ended.cancel()
                self.ready.clear()
        # It answers nothing, SIGTERM included.
        with suppress(ProcessLookupError):
            process.kill()
        raise _EngineFailed(f"no answer from its health route {missed} times in a row")

    async def _is_healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(
                self.url + self.spec.health, timeout=aiohttp.ClientTimeout(self.patience.health)
            ) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _fail_if_ended(self) -> None:
        if self._process is None or self._process.returncode is None:
            return
        if self._reader is not None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reader), 1.0)
        code = self._process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        said = next((line for line in reversed(self._last_lines) if line.strip()), "")
        raise _EngineFailed(f"{how}{': ' if said else ''}{said}")

    async def _read(self, stream: asyncio.StreamReader | None) -> None:
        """Keep the engine's last lines; show them once it serves: loading is chatty, trouble is not."""
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:  # longer than anybody would read
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self._last_lines.append(text)
            if self.ready.is_set():
                sys.stderr.write(f"engine: {text}\n")

    def _cannot_start(self, error: _EngineFailed) -> SteadfastError:
        """What the embedded engine said about the user's files is the error; anything else is the engine's."""
        said = next((line for line in reversed(self._last_lines) if line.strip()), "")
        for kind in USER_ERRORS:
            if self.spec.name == "embedded" and said and str(error).startswith(f"ended with code {kind.exit_code}:"):
                return kind(said)
        context = [line for line in list(self._last_lines)[-15:-1] if line.strip()]
        if self.spec.name != "embedded":
            sys.stderr.writelines(f"engine: {line}\n" for line in context)
        return SteadfastError(f"the engine {self.spec.name} did not start: {error}", "give another --engine")


def _free_port() -> int:
    """A port nobody listens on. Another process may take it first: then the engine ends, and is started on another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
