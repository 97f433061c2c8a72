"""How good models are, side by side: loss on held-out text, answers to held-out questions, with confidence intervals.

    steadfast eval out/model --data heldout.jsonl                 exact match, F1, BLEU, ...; by family, source, script
    steadfast eval out/base out/tuned out/int8 --data heldout.jsonl --store out/store/validation
    steadfast eval runs/NAME --data heldout.jsonl --robustness    also asked with typos, in lower case, ...
    steadfast eval out/model --lm-eval tasks/                     task files of lm-evaluation-harness, offline

A line of --data is an object with `messages`; the last one is the assistant's reference, everything before it is the
prompt; `family`, `source` and `language` make slices (without a language: the script). Answers are greedy. --store
gives the loss on the supervised tokens of a token store, as validation in training does. RUN is a run directory or a
checkpoint: what its newest valid checkpoint exports to. BLEU, chrF and ROUGE need the extra `eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import add_trust_argument
from trainer.errors import UsageError

if TYPE_CHECKING:
    from tools.evaluation.harness import TaskScore
    from tools.evaluation.report import ModelReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast eval`."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL|RUN", help="model directories, runs; the first is compared with"
    )
    parser.add_argument("--data", type=Path, metavar="JSONL", help="held-out conversations to answer")
    parser.add_argument("--store", metavar="STORE", help="token store to give the loss on")
    parser.add_argument("--lm-eval", type=Path, metavar="DIR", help="directory of lm-evaluation-harness task files")
    parser.add_argument("--robustness", action="store_true", help="also ask the questions of --data less neatly")
    parser.add_argument("--max-rows", type=int, metavar="N", help="use the first N rows (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="prompts generated together")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="bound on an answer (default: from the data)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of perturbations and intervals")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table with examples."""
    _check(arguments)
    from tools.evaluation import harness
    from tools.evaluation.report import Task, evaluate
    from tools.model_directory.chat import read_rows
    from tools.model_directory.loading import quiet_transformers
    from trainer.data.store import open_store

    quiet_transformers()
    task = Task(
        rows=None if arguments.data is None else read_rows(arguments.data, arguments.max_rows),
        rows_source=str(arguments.data),
        store=None if arguments.store is None else open_store(arguments.store),
        max_rows=arguments.max_rows,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        robustness=arguments.robustness,
        seed=arguments.seed,
    )
    if arguments.lm_eval is not None:
        harness.require_harness()
    with ExitStack() as until_done:
        models = [(str(path), _directory(path, arguments.trust_remote_code, until_done)) for path in arguments.models]
        _trust(models, arguments.trust_remote_code)
        reports = evaluate(models, task, _say) if task.rows is not None or task.store is not None else []
        tasks = {}
        for name, path in models if arguments.lm_eval is not None else ():
            _say(f"{name}: tasks of {arguments.lm_eval}")
            tasks[name] = _run_tasks(path, arguments)
    if arguments.json:
        found: dict[str, Any] = {"models": [asdict(report) for report in reports]}
        found |= {"lm_eval": {name: [asdict(score) for score in scores] for name, scores in tasks.items()}}
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(reports, tasks)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("max_rows", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than 1", "give a positive number")
    if arguments.data is None and arguments.store is None and arguments.lm_eval is None:
        raise UsageError("nothing to evaluate on", "give --data JSONL, --store STORE or --lm-eval DIR")
    if arguments.robustness and arguments.data is None:
        raise UsageError("--robustness changes the questions of --data, and there are none", "give --data JSONL")
    if len({str(path) for path in arguments.models}) < len(arguments.models):
        raise UsageError("a model is given twice", "name each once")


def _directory(path: Path, trusted_code: str | None, until_done: ExitStack) -> Path:
    """The model directory `path`; of a run or a checkpoint, what it exports to, kept until the evaluation is done."""
    from tools.export import export_checkpoint
    from trainer.checkpoint.verify import is_checkpoint

    if not (is_checkpoint(path) or (path / "checkpoints").is_dir()):
        return path
    _say(f"{path}: exporting its newest valid checkpoint")
    out = Path(until_done.enter_context(tempfile.TemporaryDirectory(prefix="steadfast-eval-"))) / "model"
    export_checkpoint(path, out, verify=False, trusted_code=trusted_code)
    return out


def _trust(models: Sequence[tuple[str, Path]], pinned: str | None) -> None:
    """Let the pinned code serve the models that need it; others are loaded as ever."""
    from trainer.model.remote_code import own_classes, trust_remote_code

    needy = [path for _, path in models if own_classes(path)]
    for path in needy or [models[0][1]]:
        trust_remote_code(path, pinned)


def _run_tasks(path: Path, arguments: argparse.Namespace) -> list[TaskScore]:
    from tools.evaluation.harness import run_tasks
    from tools.model_directory.loading import load_model

    model, tokenizer = load_model(path)
    return run_tasks(model, tokenizer, arguments.lm_eval, batch_size=arguments.batch_size, limit=arguments.max_rows)


def _show(reports: Sequence[ModelReport], tasks: dict[str, list[TaskScore]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tools.evaluation.metrics import has_extra
    from tools.evaluation.report import table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if reports:
        console.print(table(reports))
    for report in reports:
        if report.too_long:
            print(
                f"{report.model}: {report.too_long} prompts leave no room for an answer in its context; they are wrong"
            )
        if report.samples:
            print(f"{report.model}, {report.seconds:.1f} s, greedy; examples:")
        for sample in report.samples:
            print(f"  {'right' if sample.ok else 'WRONG'}  prompt    {_short(sample.prompt)}")
            print(f"         answer    {_short(sample.answer)}")
            if not sample.ok:
                print(f"         expected  {_short(sample.expected)}")
    if any(report.samples for report in reports) and not has_extra():
        print("BLEU, chrF and ROUGE: pip install -e '.[eval]'")
    if tasks:
        shown = Table("task", "metric", *tasks, title="lm-evaluation-harness", title_justify="left")
        for rows in zip(*tasks.values(), strict=True):
            cells = [f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr else "") for score in rows]
            shown.add_row(rows[0].task, rows[0].metric, *cells)
        console.print(shown)


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def _short(text: Any, length: int = 100) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= length else shown[: length - 2] + '…"'
