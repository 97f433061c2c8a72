"""Exact match: the answers are the model's greedy ones, and the count is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import save_tiny_model
from tools.chat import Prompts, stop_ids
from tools.eval import exact_match
from tools.models import load_model
from trainer.cli import run_command
from trainer.errors import DataError, MissingInputError

NEW_TOKENS = 12


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


def test_batched_answers_are_the_greedy_answers_of_each_prompt_alone(model_path: Path) -> None:
    model, tokenizer = load_model(model_path)
    prompts = [f"question {'x' * (7 * number % 30)} 问题{number}" for number in range(10)]
    answers = [greedy(model, tokenizer, prompt) for prompt in prompts]
    rows = [row(prompt, answer, family="same") for prompt, answer in zip(prompts, answers, strict=True)]
    rows += [row(prompt, answer + "!", family="other") for prompt, answer in zip(prompts[:5], answers, strict=False)]
    report = exact_match(model_path, rows, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert report.correct == 10
    assert report.exact_match == 10 / 15
    assert {name: (score.correct, score.rows) for name, score in report.by_family.items()} == {
        "same": (10, 10),
        "other": (0, 5),
    }
    assert [sample.ok for sample in report.samples] == [False, False, True]
    assert report.samples[0].expected == report.samples[0].answer + "!"


def test_a_prompt_that_fills_the_context_counts_as_wrong(model_path: Path) -> None:
    report = exact_match(model_path, [row("y" * 300, "z"), row("short", "z")])
    assert report.too_long == 1
    assert report.rows == 2


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
        exact_match(model_path, [row("a", "b"), bad])


def test_the_command_prints_json_and_names_bad_lines(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    commands = {"eval": ("tools.eval", "")}
    data = tmp_path / "heldout.jsonl"
    data.write_text("\n".join(json.dumps(row(f"q{number}", "a")) for number in range(5)) + "\n")
    argv = ["eval", str(model_path), "--data", str(data), "--json", "--max-rows", "3"]
    assert run_command(commands, importlib.import_module, argv) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    assert run_command(commands, importlib.import_module, [*argv[:4], "--max-rows", "2"]) == 0
    assert "all rows" in capsys.readouterr().out
    data.write_text('{"messages": []}\n{"messages": \n')
    assert run_command(commands, importlib.import_module, argv) == DataError.exit_code
    assert f"{data}:2: not JSON" in capsys.readouterr().err
    assert run_command(commands, importlib.import_module, [*argv[:3], "nowhere"]) == MissingInputError.exit_code
