"""Chunks to parts in worker processes, results in the order of the input."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer.data.build.parts import PartEncoder, Task, read_part
from trainer.data.build.recipe import Recipe
from trainer.data.build.row_steps import RowSteps
from trainer.data.build.work import Work
from trainer.data.encode.fast_tokenizer import Twin, verified_twin
from trainer.data.encode.templates import Encoder
from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.quality.decontaminate import EvalIndex
from trainer.data.store.report import SourceReport
from trainer.errors import PeerLostError
from trainer.orphans import die_with_parent

AHEAD = 2
"""Chunks that wait per worker: enough to keep them busy, few enough to bound memory."""

_encoder: PartEncoder | None = None


@dataclass(frozen=True)
class Settings:
    """What an encoder needs besides the tokenizer; `fast`: use its twin (see `fast_tokenizer`)."""

    recipe: Recipe
    evaluation: EvalIndex | None
    fast: bool


def encode_all(
    tasks: Iterator[Task], settings: Settings, tokenizer: Any, work: Work, workers: int
) -> Iterator[tuple[Task, SourceReport]]:
    """Make the part of every task that has none yet; yields tasks with their counts, in order.

    With one worker everything happens in this process.

    Raises:
        DataError, CannotWriteError: of the first task, in the order of the input, that failed.
        PeerLostError: a worker process was killed.
        TwinMismatch: the tokenizer's twin gave other ids; nothing that it made may be used.
    """
    finished = work.finished()
    if workers == 1:
        encoder = make_encoder(settings, tokenizer)
        for task in tasks:
            done = task.name in finished
            yield task, read_part(work.parts / task.name).report if done else encoder.write(task, work.parts)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings, os.getpid()),
    )
    waiting: deque[tuple[Task, Future[SourceReport] | None]] = deque()
    try:
        for task in tasks:
            done = task.name in finished
            waiting.append((task, None if done else pool.submit(_encode_chunk, task, work.parts)))
            while len(waiting) > workers * AHEAD:
                yield _result(*waiting.popleft(), work)
        while waiting:
            yield _result(*waiting.popleft(), work)
    except BrokenProcessPool as error:
        raise PeerLostError(
            "a worker process of the build was killed (out of memory?)",
            "start the same build again, it continues; fewer --workers need less memory",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def make_encoder(settings: Settings, tokenizer: Any) -> PartEncoder:
    """The encoder of one process."""
    recipe = settings.recipe
    twin = verified_twin(tokenizer, Path(recipe.tokenizer)) if settings.fast else None
    encoder = Encoder(tokenizer, recipe.mask.train_on, twin if isinstance(twin, Twin) else None)
    return PartEncoder(recipe, tokenizer, encoder, RowSteps(recipe, settings.evaluation))


def _result(task: Task, future: Future[SourceReport] | None, work: Work) -> tuple[Task, SourceReport]:
    return task, read_part(work.parts / task.name).report if future is None else future.result()


def _start_worker(settings: Settings, parent: int) -> None:
    global _encoder  # noqa: PLW0603 - the one thing a worker process keeps between tasks
    die_with_parent(parent)
    # Ctrl-C reaches the whole group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _encoder = make_encoder(settings, load_tokenizer(Path(settings.recipe.tokenizer)))


def _encode_chunk(task: Task, directory: Path) -> SourceReport:
    if _encoder is None:
        raise RuntimeError("this worker process was not started")
    return _encoder.write(task, directory)
