"""The server with the clients people use: openai (sync, async, streams), LangChain, curl, and a browser."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.test_serve import greedy_text
from tests.support.browser import find_browser, open_page
from tests.support.models import save_tiny_model
from tests.support.served import KEY, Server, served

COUNT = 30


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, positions=4096)


@pytest.fixture(scope="module")
def server(plain: Path) -> Iterator[Server]:
    with served(plain, STEADFAST_API_KEY=f"another key,{KEY}") as running:
        yield running


@pytest.fixture(scope="module")
def expected(plain: Path) -> str:
    return greedy_text(plain, "Hi", COUNT)


def test_openai_async_many_at_once(server: Server, expected: str) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": COUNT}

        async def whole() -> str:
            return (await client.chat.completions.create(**ask)).choices[0].message.content or ""

        async def streamed() -> str:
            stream = await client.chat.completions.create(**ask, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(whole() for _ in range(6)), *(streamed() for _ in range(6)))
        assert set(answers) == {expected}
        with pytest.raises(openai.BadRequestError, match="logprobs is not supported by this engine"):
            await client.chat.completions.create(**ask, logprobs=True)
        await client.close()

    asyncio.run(main())


def test_langchain(server: Server, expected: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(model="tiny", base_url=server.url, api_key=KEY, max_completion_tokens=COUNT)
    assert chat.invoke("Hi").content == expected
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == expected


def test_litellm(server: Server, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network for prices
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    ask: dict[str, Any] = {"model": "openai/tiny", "api_base": server.url, "api_key": KEY, "max_tokens": COUNT}
    ask["messages"] = [{"role": "user", "content": "Hi"}]
    answer = litellm.completion(**ask)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (expected, COUNT)
    stream = litellm.completion(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_curl(server: Server, expected: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": COUNT}
    words = [curl, "-sS", "--fail-with-body", f"{server.url}/chat/completions", "-H", "Content-Type: application/json"]
    words += ["-H", f"Authorization: Bearer {KEY}", "-d", json.dumps(body)]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == expected


def test_the_chat_page_in_a_browser(server: Server, expected: str) -> None:
    browser = os.environ.get("STEADFAST_TEST_BROWSER") or find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed")
    asyncio.run(_use_the_page(browser, server, expected))


async def _use_the_page(browser: str, server: Server, expected: str) -> None:
    root = server.url.removesuffix("v1")
    async with open_page(browser, root) as page:
        # It says that a key is needed, takes one, and finds the model.
        await page.until("document.querySelector('#model')?.textContent === 'needs an API key'")
        assert not await page.run("document.querySelector('#key-field').hidden")
        await page.run(f"key.value = {json.dumps(KEY)}; key.dispatchEvent(new Event('change')); 1")
        await page.until("document.querySelector('#model').textContent === 'tiny'")
        await page.run(f"tokens.value = '{COUNT}'; text.value = 'Hi'; at('send').click(); 1")
        await page.until("at('stop').disabled && /tokens\\/s/.test(document.querySelector('#status').textContent)")
        assert await page.run("document.querySelector('.assistant').textContent") == expected
        status = await page.run("document.querySelector('#status').textContent")
        assert status.startswith(f"{COUNT} tokens, ")
        # A long answer is stopped by its button, and the server is free again.
        await page.run("tokens.value = '1000'; text.value = 'Hi'; at('send').click(); 1")
        await page.until("document.querySelectorAll('.assistant')[1]?.textContent.length > 5")
        await page.run("at('stop').click(); 1")
        await page.until("document.querySelector('#status').textContent.endsWith('stopped')")
        assert 0 < await page.run("document.querySelectorAll('.assistant')[1].textContent.length") < 5000
        # A system prompt changes the answer; markup in a message stays text.
        await page.run("at('clear').click(); system.value = 'Be brief'; tokens.value = '10'; 1")
        await page.run("text.value = '<img src=x onerror=document.title=1>'; at('send').click(); 1")
        await page.until("at('stop').disabled && /^10 tokens/.test(document.querySelector('#status').textContent)")
        assert await page.run("document.images.length") == 0
        # An error of the server is shown in its words.
        await page.run("tokens.value = '5000'; text.value = 'Hi'; at('send').click(); 1")
        shown = await page.until("document.querySelector('.error')?.textContent")
        assert "5000 new tokens are more than" in shown
        # Nothing from elsewhere is loaded, and foreign scripts do not run.
        assert {url for url in page.requested if not url.startswith(root)} == set()
        await page.run(
            "const foreign = document.createElement('script'); foreign.textContent = 'window.ran = 1';"
            "document.body.append(foreign); 1"
        )
        assert await page.run("window.ran === undefined")
