"""A small load generator for OpenAI-compatible servers: each client asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Load:
    """What one load saw; seconds are wall time."""

    seconds: float = 0.0
    tokens: int = 0
    answers: int = 0
    first_token: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all clients together."""
        return self.tokens / self.seconds


async def run(url: str, key: str | None, model: str, prompts: Sequence[str], *, clients: int, new_tokens: int) -> Load:
    """Have `prompts` answered by `clients` at a time, streamed and greedy. Raises when an answer is not whole."""
    load = Load()
    waiting = list(reversed(prompts))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:

        async def client() -> None:
            while waiting:
                await _ask(session, url, model, waiting.pop(), new_tokens, load)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - began
    return load


async def _ask(session: aiohttp.ClientSession, url: str, model: str, prompt: str, new_tokens: int, load: Load) -> None:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    body |= {"max_tokens": new_tokens, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    usage, first = None, None
    async with session.post(f"{url}/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if first is None and b'"content": "' in line and b'"role"' not in line:
                first = time.perf_counter() - began
            if line.startswith(b"data: {") and b'"usage"' in line:
                usage = json.loads(line[6:])["usage"]
    if not usage:
        raise RuntimeError("an answer came without its usage")
    load.answers += 1
    load.tokens += int(usage["completion_tokens"])
    load.first_token += [first] if first is not None else []
