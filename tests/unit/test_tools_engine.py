"""The embedded engine: answers are those of `generate`, whoever shares the batch and however small the cache is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.serving.engine as engine_module
from tests.support.models import save_tiny_model
from tools.model_directory.chat import Prompts, stop_ids
from tools.model_directory.loading import load_model
from tools.quantize import quantize_model
from tools.serving.engine import Engine, EngineError
from tools.serving.protocol import Sampling
from trainer.errors import UsageError

TEXTS = ["Hi", "你好，世界", "count to ten " * 6, "x", "longer " * 20, "1 2 3", "zzz", "y" * 90]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    plain = save_tiny_model(tmp_path_factory.mktemp("model") / "plain", seed=0)
    quantize_model(plain, plain.parent / "int8")
    return {"plain": plain, "int8": plain.parent / "int8"}


def greedy(model: Any, ids: list[int], count: int, stops: list[int]) -> list[int]:
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=count, eos_token_id=stops, pad_token_id=0
        )
    return [int(token) for token in output[0, len(ids) :]]


async def collect(engine: Engine, ids: list[int], count: int, sampling: Sampling) -> list[int]:
    return [token async for new in engine.generate(ids, count, sampling) for token in new]


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("memory", [None, 330])
def test_answers_are_those_of_generate_token_for_token(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, memory: int | None
) -> None:
    """With room for all, and with a cache of 330 tokens for 8 requests of up to 256: then some are set back."""
    model, tokenizer = load_model(paths[kind])
    stops = stop_ids(model, tokenizer)
    prompts = [Prompts(tokenizer).ids([{"role": "user", "content": text}]) for text in TEXTS]
    expected = [greedy(model, ids, 40, stops) for ids in prompts]
    if memory is not None:
        per_token = 2 * 2 * 2 * 8 * 4 + engine_module.BATCH_TOKENS * 4
        monkeypatch.setattr(engine_module, "_free_memory", lambda device: memory * per_token * 4)

    async def main() -> list[list[int]]:
        engine = Engine(model, stops, max_running=8)
        try:
            noise = [Sampling(1.5, 0.9, seed) for seed in range(3)]
            tasks = [collect(engine, ids, 40, Sampling()) for ids in prompts]
            pairs = ((0, 0), (1, 1), (0, 2), (0, 0))
            tasks += [collect(engine, prompts[number], 40, noise[seed]) for number, seed in pairs]
            return list(await asyncio.gather(*tasks))
        finally:
            engine.close()

    found = asyncio.run(main())
    assert found[:8] == expected
    # Same seed, same prompt: the same sample, wherever it sat in the batch. Another seed: another one.
    assert found[8] == found[11]
    assert found[8] != found[10]
    assert found[8] != expected[0]


def test_leaving_early_frees_the_request_and_the_rest_goes_on(paths: dict[str, Path]) -> None:
    model, tokenizer = load_model(paths["plain"])
    ids = Prompts(tokenizer).ids([{"role": "user", "content": "Hi"}])
    stops: list[int] = []
    expected = greedy(model, ids, 60, [-1])

    async def main() -> None:
        engine = Engine(model, stops, max_running=4)
        scheduler = None
        try:
            other = asyncio.create_task(collect(engine, ids, 60, Sampling()))
            answer = engine.generate(ids, 200, Sampling())
            assert len(await anext(answer)) >= 1
            await answer.aclose()
            waiting = asyncio.create_task(collect(engine, ids, 200, Sampling()))
            await asyncio.sleep(0.02)
            waiting.cancel()
            assert await other == expected
            scheduler = engine._manager.batch_processor.scheduler
            async with asyncio.timeout(5):
                while scheduler.active_requests or scheduler.waiting_requests:
                    await asyncio.sleep(0.01)
            assert engine._router.waiting == {}
        finally:
            engine.close()

    asyncio.run(main())


def test_a_failing_forward_pass_fails_the_requests_and_the_engine_says_so(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(paths["plain"])

    def explode(*arguments: Any, **names: Any) -> None:
        raise RuntimeError("out of memory")

    async def main() -> None:
        engine = Engine(model, [3], max_running=4)
        try:
            assert engine.alive
            monkeypatch.setattr(model, "forward", explode)
            with pytest.raises(EngineError, match="out of memory"):
                await collect(engine, [5, 6], 5, Sampling())
            async with asyncio.timeout(5):
                while engine.alive:
                    await asyncio.sleep(0.01)
            with pytest.raises(EngineError, match="has stopped"):
                await collect(engine, [5, 6], 5, Sampling())
        finally:
            engine.close()

    asyncio.run(main())


def test_no_memory_for_a_cache_is_an_error_with_numbers(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(paths["plain"])
    monkeypatch.setattr(engine_module, "_free_memory", lambda device: 100_000)

    async def main() -> None:
        Engine(model, [3], max_running=4)

    with pytest.raises(UsageError, match="free memory holds a cache of 10 tokens"):
        asyncio.run(main())
