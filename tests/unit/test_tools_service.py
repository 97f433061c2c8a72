"""Prompts and answers of the embedded engine, admission and drain, with an engine that answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.models import tiny_tokenizer
from tools.serving.admission import Admission, Limits
from tools.serving.protocol import ChatRequest, Defaults, RequestError, Sampling
from tools.serving.service import Service


class FakeEngine:
    """Gives the tokens it was made with."""

    context = 64
    alive = True

    def __init__(self, tokens: list[int], stop_tokens: list[int]) -> None:
        self.tokens, self.stop_tokens = tokens, stop_tokens
        self.left_early = 0

    async def generate(self, prompt: list[int], count: int, sampling: Sampling) -> AsyncIterator[list[int]]:
        finished = False
        try:
            for token in self.tokens[:count]:
                await asyncio.sleep(0)
                yield [token]
            finished = True
        finally:
            self.left_early += not finished


def request(**changes: Any) -> ChatRequest:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": None,
        "stream": False,
        "include_usage": False,
        "max_new_tokens": None,
        "sampling": Sampling(),
        "stops": (),
    }
    return ChatRequest(**{**fields, **changes})


async def ready_service(text: str = "hello", *, stop: bool = True) -> tuple[Service, FakeEngine]:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * stop
    engine = FakeEngine(tokens, [tokenizer.eos_token_id])
    return Service(engine, tokenizer, Defaults(), 20), engine  # type: ignore[arg-type]


async def answer(service: Service, asked: ChatRequest) -> tuple[str, int, str | None]:
    ids, count = await service.prompt(asked)
    pieces = [piece async for piece in service.answer(asked, ids, count)]
    return "".join(piece.text for piece in pieces), pieces[-1].completion_tokens, pieces[-1].finish_reason


def test_an_answer_ends_for_one_of_three_reasons() -> None:
    async def main() -> None:
        service, engine = await ready_service()
        assert await answer(service, request()) == ("hello", 6, "stop")
        assert await answer(service, request(max_new_tokens=3)) == ("hel", 3, "length")
        assert engine.left_early == 0
        assert await answer(service, request(stops=("l",))) == ("he", 3, "stop")
        assert engine.left_early == 1
        endless, _ = await ready_service("x" * 100, stop=False)
        assert await answer(endless, request()) == ("x" * 20, 20, "length")

    asyncio.run(main())


def test_prompt_and_answer_must_fit_the_context() -> None:
    async def main() -> None:
        service, engine = await ready_service()
        ids, count = await service.prompt(request())
        engine.context = len(ids) + 5
        assert await service.prompt(request()) == (ids, 5)
        assert await service.prompt(request(max_new_tokens=5)) == (ids, 5)
        for wanted, word in ((6, "do not fit"), (21, "allows")):
            with pytest.raises(RequestError, match=word):
                await service.prompt(request(max_new_tokens=wanted))
        engine.context = len(ids)
        with pytest.raises(RequestError, match="do not fit"):
            await service.prompt(request())
        assert count == 20

    asyncio.run(main())


def test_admission_is_bounded_and_drain_waits_for_what_was_admitted() -> None:
    async def main() -> None:
        admission = Admission(Limits(20, 1, 1))
        with pytest.raises(RequestError, match="not ready"):
            admission.check(ready=False)
        with ExitStack() as places:
            first = places.enter_context(ExitStack())
            first.enter_context(admission.admitted(ready=True))
            places.enter_context(admission.admitted(ready=True))
            with pytest.raises(RequestError) as full:
                admission.check(ready=True)
            assert full.value.status == 429
            first.close()
            admission.check(ready=True)
            assert not await admission.drain(0.05)
            with pytest.raises(RequestError) as stopping:
                admission.check(ready=True)
            assert stopping.value.status == 503
            asyncio.get_running_loop().call_later(0.05, places.close)
            assert await admission.drain(5)

    asyncio.run(main())
