"""`steadfast eval --store` gives the loss that validation gave in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import settings
from tools.evaluation.report import Task, evaluate
from tools.export import export_checkpoint
from trainer.data.store import open_store

TRAIN = "tests.support.training:train"


def test_the_loss_on_a_store_is_that_of_validation(tmp_path: Path, two_ranks: Any, store: Any) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    values = settings(run, store.path, train__max_steps=2, data__eval=str(store.path))
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    (expected,) = [event for event in events if event["event"] == "evaluate"]
    export_checkpoint(run, out, verify=False)
    task = Task(None, "", open_store(store.path), None, 4, None, robustness=False, seed=0)
    (report,) = evaluate([("model", out)], task, lambda sentence: None)
    loss = report.find("loss").score.value
    assert loss == pytest.approx(next(expected[name] for name in expected if name.endswith("/loss")), abs=1e-6)
    assert report.find("perplexity").score.value == pytest.approx(math.exp(loss))
    by_source = [score for score in report.scores if score.metric == "loss" and score.slice.startswith("store source")]
    assert sum(score.rows for score in by_source) in (0, report.find("loss").rows)
