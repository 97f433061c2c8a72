"""Evaluation: answers are the model's greedy ones, scores and intervals are right, slices and changes add up."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.models import save_tiny_model
from tools.evaluation.intervals import difference, interval
from tools.evaluation.metrics import Metric, has_extra, of_answers, of_losses, token_f1
from tools.evaluation.perturb import PERTURBATIONS, perturbed
from tools.evaluation.report import ModelReport, Task, evaluate
from tools.model_directory.chat import Prompts, stop_ids
from tools.model_directory.loading import load_model
from tools.quantize import quantize_model
from trainer.cli import run_command
from trainer.errors import DataError, MissingInputError, UsageError

NEW_TOKENS = 12
COMMANDS = {"eval": ("tools.eval", "")}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


def greedy(model: Any, tokenizer: Any, text: str) -> str:
    """The answer of one prompt alone, token by token, without `generate`."""
    ids = Prompts(tokenizer).ids([{"role": "user", "content": text}])
    start = len(ids)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop_ids(model, tokenizer):
                break
            ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def row(prompt: str, answer: str, **more: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **more}


def evaluated(models: list[Path], rows: list[dict[str, Any]], **more: Any) -> list[ModelReport]:
    settings: dict[str, Any] = {"max_rows": None, "batch_size": 4, "max_new_tokens": NEW_TOKENS, "robustness": False}
    task = Task(rows=rows, rows_source="rows", store=None, **{**settings, "seed": 0, **more})
    return evaluate([(str(path), path) for path in models], task, lambda sentence: None)


def test_batched_answers_are_the_greedy_answers_of_each_prompt_alone(model_path: Path) -> None:
    model, tokenizer = load_model(model_path)
    prompts = [f"question {'x' * (7 * number % 30)} 问题{number}" for number in range(10)]
    answers = [greedy(model, tokenizer, prompt) for prompt in prompts]
    rows = [row(prompt, answer, family="same") for prompt, answer in zip(prompts, answers, strict=True)]
    rows += [row(prompt, answer + "!", family="other") for prompt, answer in zip(prompts[:5], answers, strict=False)]
    (report,) = evaluated([model_path], rows)
    assert report.find("exact match").score.value == 10 / 15
    families = {score.slice: (score.score.value, score.rows) for score in report.scores if "family" in score.slice
                and score.metric == "exact match"}  # fmt: skip
    assert families == {"family other": (0, 5), "family same": (1, 10)}
    assert [sample.ok for sample in report.samples] == [False, False, True]
    assert report.samples[0].expected == report.samples[0].answer + "!"


def test_models_side_by_side_are_compared_on_the_same_rows(model_path: Path, tmp_path: Path) -> None:
    quantize_model(model_path, tmp_path / "int8")
    model, tokenizer = load_model(tmp_path / "int8")
    prompts = [f"q{number}" for number in range(8)]
    rows = [row(prompt, greedy(model, tokenizer, prompt)) for prompt in prompts]
    first, second = evaluated([model_path, tmp_path / "int8"], rows)
    found, base = second.find("exact match"), first.find("exact match")
    assert base.difference is None
    assert found.score.value == 1.0
    assert found.difference is not None
    assert found.difference.value == pytest.approx(1.0 - base.score.value)
    assert (found.score.low, found.score.high) == (1.0, 1.0)
    assert evaluated([model_path, tmp_path / "int8"], rows)[1].scores == second.scores, "the same seed, the same report"


def test_changed_questions_are_compared_with_the_unchanged_ones(model_path: Path) -> None:
    model, tokenizer = load_model(model_path)
    prompts = ["WHAT is the third letter", "how many of them are there 42"]
    rows = [row(prompt, greedy(model, tokenizer, prompt)) for prompt in prompts]
    (report,) = evaluated([model_path], rows, robustness=True)
    for kind in PERTURBATIONS:
        score = report.find("exact match", kind)
        assert score.difference is not None
        assert score.difference.value == pytest.approx(score.score.value - 1.0)
    assert report.find("exact match").score.value == 1.0
    for kind in PERTURBATIONS:
        changed = perturbed(rows, kind, seed=3)
        assert changed == perturbed(rows, kind, seed=3)
        assert [each["messages"][-1] for each in changed] == [each["messages"][-1] for each in rows]
        texts = [each["messages"][0]["content"] for each in changed]
        assert texts[0] != prompts[0]
        assert "42" in texts[1], "another number would be another question"


def test_a_prompt_that_fills_the_context_counts_as_wrong(model_path: Path) -> None:
    (report,) = evaluated([model_path], [row("y" * 300, "z"), row("short", "z")])
    assert report.too_long == 1
    assert report.find("exact match").rows == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "no messages"}, "row 2: there is no list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 2: the last message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "row 2: the last message"),
        (row("<|im_end|> now", "a"), "row 2: .*control"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(model_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluated([model_path], [row("a", "b"), bad])


def test_metrics_of_answers_are_the_libraries_and_the_formulas() -> None:
    answers, expected = ["the cat sat on the mat", "a b", "你好世界"], ["the cat is on the mat", "a b", "你好"]
    found = {metric.name: metric for metric in of_answers(answers, expected)}
    assert found["exact match"].value() == pytest.approx(1 / 3)
    assert token_f1("The cat, sat!", "the CAT sat") == 1.0
    assert token_f1("你好世界", "你好") == pytest.approx(2 * 2 / 6)
    assert token_f1("", "a") == 0.0
    assert found["token F1"].value() == pytest.approx((5 / 6 + 1 + 2 / 3) / 3)
    if not has_extra():
        pytest.skip("the extra 'eval' is not installed")
    import sacrebleu

    assert found["BLEU"].value() * 100 == pytest.approx(sacrebleu.corpus_bleu(answers, [expected], tokenize="zh").score)
    assert found["chrF"].value() * 100 == pytest.approx(
        np.mean([sacrebleu.sentence_chrf(answer, [want]).score for answer, want in zip(answers, expected, strict=True)])
    )
    assert found["ROUGE-L"].value() == pytest.approx((5 / 6 + 1 + 2 / 3) / 3)


def test_losses_become_perplexity_and_bits() -> None:
    losses = np.array([[2.0, 1.0], [4.0, 2.0]])
    loss, perplexity, bits = of_losses(losses, np.array([3, 6]))
    assert loss.value() == 2.0
    assert perplexity.value() == pytest.approx(math.e**2)
    assert bits.value() == pytest.approx(6 / math.log(2) / 9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    inside = above = 0
    for trial in range(300):
        hits = generator.random(80) < 0.3
        metric = Metric(
            "hits", np.column_stack([hits, np.ones(80)]).astype(float), lambda sums: sums[..., 0] / sums[..., 1]
        )
        found = interval(metric, seed=trial, rounds=300)
        inside += found.low <= 0.3 <= found.high
        better = Metric("hits", metric.parts + [[0.2, 0.0]] * 80, metric.score)
        apart = difference(better, metric, seed=trial, rounds=300)
        above += apart.low == pytest.approx(0.2) and apart.high == pytest.approx(0.2)
    assert 270 <= inside <= 296
    assert above == 300, "what is the same in both models makes no difference uncertain"


def test_the_command_prints_json_and_names_bad_lines(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: object) -> int:
        return run_command(COMMANDS, importlib.import_module, ["eval", *map(str, words)])

    data = tmp_path / "heldout.jsonl"
    data.write_text("\n".join(json.dumps(row(f"q{number}", "a")) for number in range(5)) + "\n")
    assert command(model_path, "--data", data, "--json", "--max-rows", 3) == 0
    (report,) = json.loads(capsys.readouterr().out)["models"]
    assert report["scores"][0]["rows"] == 3
    assert command(model_path, "--data", data, "--max-rows", 2) == 0
    shown = capsys.readouterr().out
    assert "exact match" in shown
    assert "95 % intervals" in shown
    data.write_text('{"messages": []}\n{"messages": \n')
    assert command(model_path, "--data", data) == DataError.exit_code
    assert f"{data}:2: not JSON" in capsys.readouterr().err
    assert command(model_path, "--data", "nowhere") == MissingInputError.exit_code
    assert command(model_path) == UsageError.exit_code
    assert "nothing to evaluate on" in capsys.readouterr().err
    assert command(model_path, "--store", tmp_path, "--robustness") == UsageError.exit_code
    assert command(model_path, model_path, "--data", data) == UsageError.exit_code
