"""Classifiers and embeddings: the numbers of the model itself, whatever shares the batch."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from aiohttp.test_utils import TestServer

from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.served import served
from tools.serving.heads import make_head_app

TEXTS = ["Hi", "a much longer text than the others", "你好", "x"]


def test_classify(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    config = tiny_model(tokenizer).config
    config.id2label, config.label2id = {0: "bad", 1: "good", 2: "so so"}, {"bad": 0, "good": 1, "so so": 2}
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "head")
    tokenizer.save_pretrained(tmp_path / "head")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in TEXTS]

    with served(tmp_path / "head") as server:

        def ask(texts: Any) -> Any:
            return server.ask("POST", "/v1/classify", json.dumps({"input": texts}).encode())

        reply = ask(TEXTS).json()
        for entry, row in zip(reply["data"], rows, strict=True):
            assert entry["probs"] == pytest.approx(row, abs=1e-5)
            assert entry["label"] == config.id2label[max(range(3), key=row.__getitem__)]
        assert reply["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
        with ThreadPoolExecutor(4) as pool:
            alone = [answer.json()["data"][0]["probs"] for answer in pool.map(ask, TEXTS)]
        for got, row in zip(alone, rows, strict=True):
            assert got == pytest.approx(row, abs=1e-5)
        for bad in (None, [], [""], 7, ["x" * 300]):
            assert ask(bad).status == 400
        assert "it has /v1/classify" in server.chat("Hi").json()["error"]["message"]


def test_embeddings_with_the_openai_client(tmp_path: Path) -> None:
    from transformers import AutoModel, LlamaModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    LlamaModel(tiny_model(tokenizer).config).save_pretrained(tmp_path / "embed")
    tokenizer.save_pretrained(tmp_path / "embed")
    (tmp_path / "embed" / "1_Pooling").mkdir()
    (tmp_path / "embed" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model = AutoModel.from_pretrained(tmp_path / "embed").eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]

    async def main() -> None:
        # The routes without the process around them: a start costs more than the whole test.
        async with TestServer(make_head_app(tmp_path / "embed", "embeddings", 16, None)) as server:
            client = openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none", max_retries=0)
            reply = await client.embeddings.create(model="embed", input=TEXTS)
            floats = await client.embeddings.create(model="embed", input=TEXTS[0], encoding_format="float")
            await client.close()
        assert floats.data[0].embedding == pytest.approx(reply.data[0].embedding, abs=1e-6)
        for entry, state in zip(reply.data, states, strict=True):
            assert entry.embedding == pytest.approx((state / state.norm()).tolist(), abs=1e-5)

    asyncio.run(main())
