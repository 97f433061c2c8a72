"""Models that do not generate: class probabilities and embeddings, batched as they come.

A directory whose architecture ends in ForSequenceClassification answers /v1/classify. One with sentence-transformers'
`1_Pooling/config.json` answers /v1/embeddings with the pooling written there (mean, last token or first token) over the
hidden states of `AutoModel`, scaled to length 1.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from tools.serving.protocol import RequestError, check_model, parse_object
from trainer.errors import DataError

CLASSIFIER = "ForSequenceClassification"
POOLING_FILE = Path("1_Pooling", "config.json")
POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "first",
}
MAX_TEXTS = 256


def head_of(path: Path) -> str | None:
    """The route of a model that does not generate, or None; reads two small files."""
    try:
        architectures = json.loads((path / "config.json").read_bytes()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return None
    if any(str(name).endswith(CLASSIFIER) for name in architectures):
        return "classify"
    return "embeddings" if (path / POOLING_FILE).is_file() else None


class Batcher:
    """Answers texts with a function that takes a list of them: what waits while one batch runs is the next batch."""

    def __init__(self, compute: Callable[[list[list[int]]], list[Any]], most: int) -> None:
        self._compute = compute
        self._most = most
        self._waiting: list[tuple[list[int], asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, ids: list[int]) -> Any:
        """The result for one text."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            batch = [(ids, future) for ids, future in batch if not future.cancelled()]
            try:
                results = await asyncio.to_thread(self._compute, [ids for ids, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)


def make_head_app(path: Path, route: str, max_batch: int, context: int | None) -> web.Application:
    """The routes of a model with a head; `route` is `classify` or `embeddings`."""
    from tools.model_directory.loading import load_tokenizer
    from tools.serving.protocol import MAX_BODY_BYTES, models_list

    tokenizer = load_tokenizer(path)
    model, compute = _classifier(path, tokenizer) if route == "classify" else _embedder(path, tokenizer)
    longest = min(context or 1 << 30, getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
    batcher = Batcher(compute, max_batch)
    facts = {
        "max_model_len": longest,
        "weights": "plain",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    started = int(time.time())

    async def ask(request: web.Request) -> web.Response:
        fields = parse_object(await request.read())
        check_model(fields, path.name)
        if unknown := set(fields) - {"model", "input", "encoding_format", "user"}:
            name = min(unknown)[:100]
            raise RequestError(400, f"{name!r} is not a field this server knows", param=name)
        if fields.get("encoding_format", "float") not in ("float", "base64"):
            raise RequestError(400, "encoding_format is neither float nor base64", param="encoding_format")
        texts = [fields["input"]] if isinstance(fields.get("input"), str) else fields.get("input")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError(400, "input is neither a text nor a list of texts", param="input")
        if len(texts) > MAX_TEXTS:
            raise RequestError(400, f"input has more than {MAX_TEXTS} texts", param="input")
        encoded = [[int(token) for token in ids] for ids in tokenizer(texts)["input_ids"]]
        for number, ids in enumerate(encoded):
            if not 0 < len(ids) <= longest:
                message = f"input[{number}] has {len(ids)} tokens, the model takes 1 to {longest}"
                raise RequestError(400, message, param="input", code="context_length_exceeded")
        results = await asyncio.gather(*(batcher.answer(ids) for ids in encoded))
        as_text = fields.get("encoding_format") == "base64"
        data = [_entry(route, number, result, as_text) for number, result in enumerate(results)]
        count = sum(map(len, encoded))
        return web.json_response(
            {
                "object": "list",
                "model": path.name,
                "data": data,
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    async def health(request: web.Request) -> web.Response:
        return web.json_response({})

    async def models(request: web.Request) -> web.Response:
        return web.json_response(models_list(path.name, started, facts))

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post(f"/v1/{route}", ask)
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    return app


def _entry(route: str, number: int, result: Any, as_text: bool) -> dict[str, Any]:
    if route == "classify":
        return {"index": number, **result}
    vector: Any = result
    if as_text:
        import base64

        import numpy as np

        vector = base64.b64encode(np.asarray(result, dtype="<f4").tobytes()).decode()
    return {"object": "embedding", "index": number, "embedding": vector}


def _classifier(path: Path, tokenizer: Any) -> tuple[Any, Callable[[list[list[int]]], list[Any]]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = _load(AutoModelForSequenceClassification, path)
    labels = {int(number): str(label) for number, label in model.config.id2label.items()}
    if model.config.pad_token_id is None:  # how the head finds the last token of a padded text
        model.config.pad_token_id = _pad_id(tokenizer)

    def classify(batch: list[list[int]]) -> list[Any]:
        logits = model(**_padded(batch, model.config.pad_token_id, model.device)).logits.float()
        several = model.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
        rows = (logits.sigmoid() if several else logits.softmax(-1)).cpu()
        return [{"label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)} for row in rows]

    return model, torch.inference_mode()(classify)


def _embedder(path: Path, tokenizer: Any) -> tuple[Any, Callable[[list[list[int]]], list[Any]]]:
    import torch
    from transformers import AutoModel

    chosen = json.loads((path / POOLING_FILE).read_bytes())
    pooling = [name for field, name in POOLINGS.items() if chosen.get(field)]
    if len(pooling) != 1:
        raise DataError(f"{path / POOLING_FILE} names {len(pooling)} poolings out of {list(POOLINGS)}", "set one true")
    model = _load(AutoModel, path)
    pad = _pad_id(tokenizer)

    def embed(batch: list[list[int]]) -> list[Any]:
        inputs = _padded(batch, pad, model.device)
        hidden, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"]
        lengths = mask.sum(-1)
        if pooling[0] == "mean":
            pooled = (hidden * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
        else:
            places = lengths - 1 if pooling[0] == "last" else torch.zeros_like(lengths)
            pooled = hidden[torch.arange(len(batch)), places]
        return [row.tolist() for row in torch.nn.functional.normalize(pooled, dim=-1).cpu()]

    return model, torch.inference_mode()(embed)


def _load(kind: Any, path: Path) -> Any:
    import torch

    from tools.model_directory.loading import quiet_transformers

    quiet_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    try:
        model = kind.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the model in {path} does not load: {reason}", "export it again or restore it") from error
    return model.to(device).eval()


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _padded(batch: list[list[int]], pad: int, device: Any) -> dict[str, Any]:
    """Token ids and attention mask [texts, longest], padded on the right."""
    import torch

    longest = max(map(len, batch))
    ids = [[*row, *[pad] * (longest - len(row))] for row in batch]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
