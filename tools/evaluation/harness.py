"""lm-evaluation-harness on task files of this machine: no hub, no network, and only what the files name."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError, MissingInputError, UsageError

TEMPLATES = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None


def require_harness() -> None:
    """UsageError when lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", "pip install -e '.[lm-eval]'")


def run_tasks(model: Any, tokenizer: Any, directory: Path, *, batch_size: int, limit: int | None) -> list[TaskScore]:
    """Run every task file (*.yaml) of `directory`; relative data_files in them lie there, too.

    Raises MissingInputError without task files, DataError naming what the harness says of a bad one.
    """
    require_harness()
    if not any(directory.glob("*.yaml")):
        raise MissingInputError(f"{directory} holds no task files (*.yaml)", f"copy one of {TEMPLATES} and its data")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    logging.disable(logging.WARNING)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        with contextlib.chdir(directory):
            manager = TaskManager(include_path=str(directory.absolute()), include_defaults=False)
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            done = lm_eval.simple_evaluate(
                model=wrapped, tasks=sorted(manager.all_tasks), task_manager=manager, limit=limit, log_samples=False
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the tasks of {directory} cannot be run: {reason}", "see the templates") from error
    finally:
        logging.disable(logging.NOTSET)
    scores = []
    for task, found in (done or {"results": {}})["results"].items():
        for key, value in found.items():
            metric, _, rest = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                stderr = found.get(f"{metric}_stderr,{rest}")
                scores.append(TaskScore(task, metric, float(value), stderr if isinstance(stderr, float) else None))
    return scores
