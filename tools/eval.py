"""Exact match of a model's answers on held-out prompts.

    steadfast eval out/model --data heldout.jsonl

Each line is an object with `messages`; the last message is the assistant's reference answer, everything before it is
the prompt. Answers are generated greedily and compared after trimming white space at both ends. Rows may carry a
`family`, then each family is reported too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    from tools.chat import Prompts

SPARE_TOKENS = 8
SHOWN = 3


class Sample(NamedTuple):
    """One prompt (its last message), what the model answered and what was expected."""

    prompt: str
    answer: str
    expected: str
    ok: bool


@dataclass(frozen=True)
class FamilyScore:
    """Exact match within one family of rows."""

    rows: int
    correct: int
    exact_match: float


@dataclass(frozen=True)
class EvalReport:
    """How many answers were exactly right."""

    exact_match: float
    """Share of rows in [0, 1]."""
    rows: int
    correct: int
    by_family: dict[str, FamilyScore]
    samples: list[Sample]
    """A few rows, wrong ones first."""
    too_long: int
    """Rows whose prompt leaves no room for an answer in the model's context; they count as wrong."""
    seconds: float


@dataclass(frozen=True)
class _Question:
    ids: list[int]
    prompt: str
    expected: str
    expected_tokens: int
    family: str | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast eval`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model directory (exported or quantized)")
    parser.add_argument("--data", type=Path, required=True, metavar="JSONL", help="held-out conversations")
    parser.add_argument("--max-rows", type=int, metavar="N", help="use the first N rows (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="prompts generated together")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="bound on an answer (default: from the data)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table with examples."""
    from tools.chat import read_rows

    for name in ("max_rows", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "give a positive number")
    rows = read_rows(arguments.data, arguments.max_rows)
    report = exact_match(
        arguments.model,
        rows,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        source=str(arguments.data),
    )
    print(json.dumps(asdict(report), ensure_ascii=False) if arguments.json else _table(report))
    return 0


def exact_match(
    model_path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    source: str = "rows",
) -> EvalReport:
    """Answer every row greedily and count exact matches.

    `max_new_tokens` defaults to the longest reference plus a few tokens: a longer answer cannot match anyway. `source`
    names the rows in errors. Raises DataError for a row without a reference answer or a model that does not load.
    """
    from tools.chat import Prompts, check_chat_template, context_length, stop_ids
    from tools.models import check_model_directory, load_model, load_tokenizer

    started = time.monotonic()
    if not rows:
        raise DataError(f"{source}: there are no rows", "give at least one")
    check_model_directory(model_path)
    # The tokenizer first: a bad row is found before the model takes its time to load.
    tokenizer = load_tokenizer(model_path)
    check_chat_template(tokenizer, model_path)
    prompts_of = Prompts(tokenizer)
    questions = [_question(tokenizer, prompts_of, row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]
    model, _ = load_model(model_path)
    limit = max_new_tokens or max(question.expected_tokens for question in questions) + SPARE_TOKENS
    context = context_length(model)
    stops = stop_ids(model, tokenizer)
    answers = [""] * len(questions)
    fitting = [i for i, question in enumerate(questions) if context is None or len(question.ids) < context]
    # Neighbours in length share a batch: little padding, and short answers end together.
    fitting.sort(key=lambda i: (len(questions[i].ids), questions[i].expected_tokens))
    for begin in range(0, len(fitting), batch_size):
        indices = fitting[begin : begin + batch_size]
        prompts = [questions[i].ids for i in indices]
        room = limit if context is None else min(limit, context - max(map(len, prompts)))
        for index, answer in zip(indices, _answers(model, tokenizer, prompts, room, stops), strict=True):
            answers[index] = answer
    verdicts = [answer == question.expected for answer, question in zip(answers, questions, strict=True)]
    correct = sum(verdicts)
    return EvalReport(
        exact_match=correct / len(rows),
        rows=len(rows),
        correct=correct,
        by_family=_families(questions, verdicts),
        samples=_samples(questions, answers, verdicts),
        too_long=len(questions) - len(fitting),
        seconds=time.monotonic() - started,
    )


def _question(tokenizer: Any, prompts: Prompts, row: dict[str, Any], place: str) -> _Question:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place}: there is no list of messages", 'give {"messages": [{"role": ..., "content": ...}]}')
    if len(messages) < 2 or messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise DataError(f"{place}: the last message is not an assistant's answer", "end every row with its reference")
    tools = row.get("tools")
    try:
        ids = prompts.ids(messages[:-1], json.loads(tools) if isinstance(tools, str) else tools)
    except ValueError as error:
        raise DataError(f"{place}: {error}", "check its roles, their order and its texts") from error
    expected = messages[-1]["content"].strip()
    family = row.get("family")
    return _Question(
        ids=ids,
        prompt=str(messages[-2].get("content")),
        expected=expected,
        expected_tokens=len(tokenizer.encode(expected, add_special_tokens=False)),
        family=None if family is None else str(family),
    )


def _answers(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[str]:
    """Greedy answers to `prompts`, generated together, padded on the left."""
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    # Also replaces what the model's own configuration would add (sampling, penalties): exact match means greedy.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad
    )
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        generated = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
    texts = []
    for tokens in generated:
        end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
        texts.append(tokenizer.decode(tokens[:end], skip_special_tokens=True).strip())
    return texts


def _families(questions: list[_Question], verdicts: list[bool]) -> dict[str, FamilyScore]:
    grouped: dict[str, list[bool]] = {}
    for question, verdict in zip(questions, verdicts, strict=True):
        if question.family is not None:
            grouped.setdefault(question.family, []).append(verdict)
    return {
        family: FamilyScore(len(group), sum(group), sum(group) / len(group))
        for family, group in sorted(grouped.items())
    }


def _samples(questions: list[_Question], answers: list[str], verdicts: list[bool]) -> list[Sample]:
    order = sorted(range(len(questions)), key=lambda index: verdicts[index])
    wrong = [index for index in order if not verdicts[index]][: SHOWN - 1]
    right = [index for index in order if verdicts[index]]
    chosen = (wrong + right)[:SHOWN] if right else [index for index in order if not verdicts[index]][:SHOWN]
    return [
        Sample(questions[index].prompt, answers[index], questions[index].expected, verdicts[index]) for index in chosen
    ]


def _table(report: EvalReport) -> str:
    width = max([len("all rows"), *map(len, report.by_family)])
    lines = [f"{'family':<{width}}  {'rows':>6}  {'exact match':>11}"] if report.by_family else []
    lines += [
        f"{family:<{width}}  {score.rows:>6}  {score.exact_match:>11.1%}" for family, score in report.by_family.items()
    ]
    lines.append(f"{'all rows':<{width}}  {report.rows:>6}  {report.exact_match:>11.1%}")
    if report.too_long:
        lines.append(f"{report.too_long} prompts leave no room for an answer in the model's context; counted as wrong")
    lines.append(f"{report.seconds:.1f} s, greedy; examples:")
    for sample in report.samples:
        lines.append(f"  {'right' if sample.ok else 'WRONG'}  prompt    {_short(sample.prompt)}")
        lines.append(f"         answer    {_short(sample.answer)}")
        if not sample.ok:
            lines.append(f"         expected  {_short(sample.expected)}")
    return "\n".join(lines)


def _short(text: str, length: int = 100) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= length else shown[: length - 2] + '…"'
