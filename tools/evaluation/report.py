"""Several models on the same data: scores with intervals, differences, slices, robustness; as a table or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tools.evaluation import intervals
from tools.evaluation.generation import answer
from tools.evaluation.held_out import HeldOut, document_losses, read_held_out
from tools.evaluation.intervals import Interval
from tools.evaluation.metrics import Metric, of_answers, of_losses, select
from tools.evaluation.perturb import PERTURBATIONS, perturbed
from tools.evaluation.questions import Question, questions_of

if TYPE_CHECKING:
    from trainer.data.store import TokenStore

ALL = "all"
SHOWN = 3
FEWEST = 2
"""Rows of a slice: an interval of one row says nothing."""
OF_SLICES = ("exact match", "token F1", "loss")
"""Metrics that are also told for slices and perturbations; the others would fill pages."""


class Sample(NamedTuple):
    """One prompt (its last message), what the model answered and what was expected."""

    prompt: str
    answer: str
    expected: str
    ok: bool


@dataclass(frozen=True)
class Score:
    """One number of the report."""

    metric: str
    slice: str
    """All rows, some of them ("family arithmetic"), or all of them changed ("typos")."""
    rows: int
    """Rows, or documents of a store."""
    percent: bool
    higher_is_better: bool
    score: Interval
    difference: Interval | None = None
    """To the first model on the same rows; of changed rows: to the same model's answers to the unchanged ones."""


@dataclass
class ModelReport:
    """What was found of one model."""

    model: str
    scores: list[Score] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    """A few rows, wrong ones first."""
    too_long: int = 0
    """Rows whose prompt leaves no room for an answer in the model's context; they count as wrong."""
    seconds: float = 0.0

    def find(self, metric: str, name: str = ALL) -> Score:
        """The score of that metric and slice."""
        return next(score for score in self.scores if (score.metric, score.slice) == (metric, name))


@dataclass(frozen=True)
class Task:
    """What to evaluate on."""

    rows: list[dict[str, Any]] | None
    rows_source: str
    store: TokenStore | None
    max_rows: int | None
    batch_size: int
    max_new_tokens: int | None
    robustness: bool
    seed: int


@dataclass
class _Found:
    """Metrics of one model by slice; of all rows, then of changed ones."""

    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    slices: dict[str, tuple[str, np.ndarray[Any, Any]]] = field(default_factory=dict)
    """Name to the kind of rows ("answers", "held out") and the numbers of those that belong to it."""


def evaluate(models: Sequence[tuple[str, Path]], task: Task, say: Callable[[str], None]) -> list[ModelReport]:
    """Evaluate every model (what to call it, its directory), one after the other in memory.

    Raises DataError naming a row that cannot be asked or a model that does not load.
    """
    from tools.model_directory.chat import check_chat_template
    from tools.model_directory.loading import check_model_directory, load_model, load_tokenizer

    for _, path in models:
        check_model_directory(path)
        if task.rows is not None:
            check_chat_template(load_tokenizer(path), path)
    reports, first = [], None
    for name, path in models:
        started = time.monotonic()
        # The tokenizer first: a bad row is found before the model takes its time to load.
        tokenizer = load_tokenizer(path)
        asked = _questions(task, tokenizer)
        held_out = None if task.store is None else read_held_out(task.store, tokenizer, path, task.max_rows)
        model, _ = load_model(path)
        report, found = ModelReport(name), _Found()
        if held_out is not None:
            say(f"{name}: loss on {len(held_out.sources)} documents")
            _measure_held_out(found, model, held_out)
        for kind, questions in asked.items():
            say(f"{name}: answering {len(questions)} questions{'' if kind == ALL else f', {kind}'}")
            _measure_answers(found, report, model, tokenizer, kind, questions, task)
        del model
        first = first or found
        report.scores = _scores(found, first, task.seed)
        report.seconds = time.monotonic() - started
        reports.append(report)
    return reports


def _questions(task: Task, tokenizer: Any) -> dict[str, list[Question]]:
    """The questions as they are, and changed, by the name of the change."""
    from tools.model_directory.chat import Prompts

    if task.rows is None:
        return {}
    prompts = Prompts(tokenizer)
    asked = {ALL: questions_of(task.rows, tokenizer, prompts, task.rows_source)}
    for kind in PERTURBATIONS if task.robustness else ():
        changed = perturbed(task.rows, kind, task.seed)
        asked[kind] = questions_of(changed, tokenizer, prompts, f"{task.rows_source} with {kind}")
    return asked


def _measure_held_out(found: _Found, model: Any, held_out: HeldOut) -> None:
    found.metrics["held out"] = of_losses(document_losses(model, held_out), held_out.utf8_bytes)
    for source in sorted(set(held_out.sources)):
        rows = np.array([number for number, name in enumerate(held_out.sources) if name == source])
        found.slices[f"store source {source}"] = ("held out", rows)


def _measure_answers(
    found: _Found,
    report: ModelReport,
    model: Any,
    tokenizer: Any,
    kind: str,
    questions: Sequence[Question],
    task: Task,
) -> None:
    answers = answer(model, tokenizer, questions, batch_size=task.batch_size, max_new_tokens=task.max_new_tokens)
    metrics = of_answers(answers.texts, [question.expected for question in questions])
    if kind != ALL:
        found.metrics[kind] = metrics
        return
    found.metrics["answers"] = metrics
    report.too_long = answers.too_long
    report.samples = _samples(questions, answers.texts)
    for name in sorted({name for question in questions for name in question.slices}):
        rows = np.array([number for number, question in enumerate(questions) if name in question.slices])
        found.slices[name] = ("answers", rows)


def _scores(found: _Found, first: _Found, seed: int) -> list[Score]:
    scores = []
    for kind in ("held out", "answers"):
        metrics, base = found.metrics.get(kind, []), first.metrics.get(kind, [])
        against = base if found is not first else [None] * len(metrics)
        scores += [_score(metric, ALL, other, seed) for metric, other in zip(metrics, against, strict=True)]
        groups = {name: rows for name, (of, rows) in found.slices.items() if of == kind}
        for name, rows in groups.items():
            # A slice of everything, and one of next to nothing, say nothing new.
            if not FEWEST <= len(rows) < (len(metrics[0].parts) if metrics else 0):
                continue
            for metric, other in zip(metrics, against, strict=True):
                if metric.name in OF_SLICES:
                    scores.append(_score(select(metric, rows), name, other and select(other, rows), seed))
    for kind in PERTURBATIONS:
        for metric, clean in zip(found.metrics.get(kind, []), found.metrics.get("answers", []), strict=False):
            if metric.name in OF_SLICES:
                scores.append(_score(metric, kind, clean, seed))
    return scores


def _score(metric: Metric, name: str, base: Metric | None, seed: int) -> Score:
    return Score(
        metric.name,
        name,
        len(metric.parts),
        metric.percent,
        metric.higher_is_better,
        intervals.interval(metric, seed),
        None if base is None else intervals.difference(metric, base, seed),
    )


def _samples(questions: Sequence[Question], answers: Sequence[str]) -> list[Sample]:
    every = [
        Sample(question.prompt, text, question.expected, text == question.expected)
        for question, text in zip(questions, answers, strict=True)
    ]
    wrong, right = ([sample for sample in every if sample.ok is ok] for ok in (False, True))
    return (wrong[: SHOWN - 1] + right)[:SHOWN] if right else wrong[:SHOWN]


def table(reports: Sequence[ModelReport]) -> Any:
    """Rich table: a line for each metric and slice, a column for each model."""
    from rich.table import Table

    shown = Table(title="Evaluation", title_justify="left", caption=_caption(reports), caption_justify="left")
    shown.add_column("metric")
    shown.add_column("rows", justify="right")
    for report in reports:
        shown.add_column(report.model, justify="right", overflow="fold")
    for score in reports[0].scores:
        same = [report.find(score.metric, score.slice) for report in reports]
        name = score.metric if score.slice == ALL else f"  {score.slice}: {score.metric}"
        shown.add_row(name, str(score.rows), *map(_cell, same))
    return shown


def _caption(reports: Sequence[ModelReport]) -> str:
    lines = ["in brackets: 95 % intervals by bootstrap over rows, or documents of a store"]
    if len(reports) > 1:
        lines.append("(+/-): difference to the first model on the same rows")
    if any(score.slice in PERTURBATIONS for score in reports[0].scores):
        lines.append("of changed questions: difference to the model's own answers to the unchanged ones")
    return "\n".join(lines)


def _cell(score: Score) -> str:
    found = score.score
    text = f"{_number(found.value, score)} [{_number(found.low, score)}, {_number(found.high, score)}]"
    if score.difference is None:
        return text
    apart = score.difference
    low, high = (_number(bound, score, sign=True) for bound in (apart.low, apart.high))
    return f"{text} ({_number(apart.value, score, sign=True)} [{low}, {high}])"


def _number(value: float, score: Score, *, sign: bool = False) -> str:
    form = "+" if sign else ""
    return format(value * 100, f"{form}.1f") if score.percent else format(value, f"{form}.4g")
