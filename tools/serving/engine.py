"""The embedded engine: transformers' continuous batching in a thread, tokens delivered to asyncio.

Requests join and leave the running batch at every step. The cache is sized by us: the library would take most of the
machine's memory. Attention is plain `sdpa`, which runs everywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestStatus

from tools.model_directory.chat import context_length
from tools.serving.protocol import Sampling
from tools.serving.sampling import sampling_processors
from trainer.errors import SteadfastError, UsageError

PAGE_TOKENS = 32
BATCH_TOKENS = 512
MEMORY_SHARE = 0.25
LEAST_CONTEXT = 64
STOP_SECONDS = 10.0


class EngineError(SteadfastError):
    """The engine failed while answering."""


class _Router:
    """Hands the engine thread's outputs to the event loop; outputs nobody waits for any more are dropped.

    Stands in for the library's router, which keeps such outputs for ever and lets a closed loop kill its thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: dict[str, asyncio.Queue[Any]] = {}
        self._loop = loop

    def deliver(self, output: Any) -> None:
        """Called in the engine thread."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Called in the engine thread, once a step."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:
            logging.getLogger(__name__).debug("the event loop is closed; %d outputs dropped", len(outputs))

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Called in the engine thread when a request cannot go on."""
        state.status = RequestStatus.FAILED
        state.error = str(error)
        self.deliver(state.to_generation_output())

    def _dispatch(self, outputs: list[Any]) -> None:
        for output in outputs:
            if queue := self.waiting.get(output.request_id):
                queue.put_nowait(output)


class Engine:
    """One model, many requests at once.

    `context` is the number of tokens a request may have, prompt and answer together: that of the model, or less where
    memory is short or `most_context` says so. Make and use it in the event loop's thread. `close` ends it.
    """

    def __init__(
        self, model: Any, stop_tokens: list[int], *, max_running: int, most_context: int | None = None
    ) -> None:
        self.stop_tokens = stop_tokens
        self.context, pages = _cache_size(model, max_running, most_context)
        self._numbers = itertools.count()
        # `warmup` of the library only concerns CUDA graphs, which per-request sampling does not go with.
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=stop_tokens or -1, pad_token_id=0, max_new_tokens=self.context
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=pages,
                max_batch_tokens=BATCH_TOKENS,
                max_requests_per_batch=max_running,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.logit_processor = sampling_processors()
        self._router = _Router(asyncio.get_running_loop())
        self._manager.output_router = self._router
        self._manager.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread still takes requests."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    async def generate(self, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> AsyncIterator[list[int]]:
        """Yield the new tokens of an answer as they come; the last one may be a stop token.

        Leaving the iteration early (also by cancellation) takes the request out of the batch. Raises EngineError when
        the engine cannot go on.
        """
        request = f"request-{next(self._numbers)}"
        queue = self._router.waiting[request] = asyncio.Queue()
        finished = False
        try:
            accepted = self._manager.add_request(
                prompt, request_id=request, max_new_tokens=max_new_tokens, streaming=True, sampling=sampling
            )
            if accepted is None:
                raise EngineError("the engine has stopped", "restart the server")
            given = 0
            while not finished:
                output = await queue.get()
                if output.status == RequestStatus.FAILED:
                    finished = True
                    raise EngineError(f"the engine failed: {output.error}", "restart the server")
                finished = output.status == RequestStatus.FINISHED
                new, given = output.generated_tokens[given:], len(output.generated_tokens)
                if new:
                    yield new
        finally:
            del self._router.waiting[request]
            if not finished:
                self._manager.cancel_request(request)

    def close(self) -> None:
        """End the engine's thread; running requests are dropped."""
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)


def _cache_size(model: Any, max_running: int, most_context: int | None) -> tuple[int, int]:
    """Tokens a request may have, and pages of the cache, from the model's context and the memory that is free."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = torch.finfo(model.dtype).bits // 8
    # Keys and values of every layer, and this token's column in the attention mask of a full batch.
    token_bytes = 2 * config.num_hidden_layers * heads * head_size * width + BATCH_TOKENS * width
    affordable = int(_free_memory(model.device) * MEMORY_SHARE) // token_bytes
    # One page more than the tokens need: a request may begin and end inside pages of its own.
    context = min(context_length(model) or affordable, affordable - 2 * PAGE_TOKENS)
    if context < LEAST_CONTEXT and context < (context_length(model) or LEAST_CONTEXT):
        raise UsageError(
            f"free memory holds a cache of {max(affordable, 0)} tokens at {token_bytes} bytes each",
            "free memory, or serve a smaller model",
        )
    context = min(context, most_context or context)
    wanted = max_running * (context + PAGE_TOKENS)
    return context, -(-min(wanted, affordable) // PAGE_TOKENS)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
