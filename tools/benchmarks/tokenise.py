"""Tokenising: conversations to ids and loss mask, by Steadfast's encoder and by `datasets.map` with transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks import ours
from tools.benchmarks.corpus import make_conversations, train_tokenizer, write_json_lines
from tools.benchmarks.measure import Contender, Facts, Line, Say, compare, run_rounds, stopwatch

SECTION = "tokenise"
UNIT = "Mtok per CPU s"
THEIRS = "tools.benchmarks.tokenise:by_datasets"
GOAL = 4.0


def prepare_inputs(
    work: Path, rows: int, vocabulary_size: int, seed: int, corpus: Sequence[Path], say: Say
) -> tuple[Path, Path]:
    """A file of conversations, the user's or made ones, and a tokenizer trained on them."""
    if corpus:
        found, others = ours.read_messages(corpus)
        found = found[:rows]
        say(f"{SECTION}: {len(found):,} conversations; {others:,} others (tools, reasoning, no answer) are left out")
    else:
        say(f"{SECTION}: making {rows:,} conversations")
        found = make_conversations(rows, seed)
    file = write_json_lines(work / "conversations.jsonl", found)
    say(f"{SECTION}: training a tokenizer")
    return file, train_tokenizer(work / "tokenizer", found, vocabulary_size, ours.chat_template())


def run(work: Path, rows: Path, tokenizer: Path, rounds: int, say: Say) -> list[Line]:
    """Compare encoders over a file of conversations."""

    def arguments(name: str, **more: Any) -> Facts:
        return {"rows": str(rows), "tokenizer": str(tokenizer), "digests": str(work / f"digests-{name}.json"), **more}

    mine = arguments("ours")
    contenders = [
        Contender("Steadfast", "tools.benchmarks.ours:tokenise", mine),
        Contender("datasets.map, batched", THEIRS, arguments("batched", batched=True), "datasets", GOAL),
        Contender("datasets.map, a row a call", THEIRS, arguments("single", batched=False), "datasets", GOAL),
    ]
    outcomes = run_rounds(contenders, rounds, lambda text: say(f"{SECTION}: {text}"))

    def note(facts: Facts) -> str:
        if "digests" not in facts:
            return f"{facts['tokens']:,} tokens, {facts['by']}"
        if not Path(mine["digests"]).is_file():
            return f"{facts['tokens']:,} tokens"
        both = (json.loads(Path(path).read_text()) for path in (mine["digests"], facts["digests"]))
        pairs = [(one.split(":"), other.split(":")) for one, other in zip(*both, strict=True)]
        ids, masks = (sum(one[part] == other[part] for one, other in pairs) for part in (0, 1))
        facts |= {"equal_ids": ids, "equal_masks": masks, "compared": len(pairs)}
        return f"ids equal in {ids:,} of {len(pairs):,} rows, masks in {masks:,}"

    return compare(SECTION, UNIT, contenders, outcomes, note)


def by_datasets(rows: str, tokenizer: str, digests: str, batched: bool) -> Facts:
    """Measure `datasets.map` over `apply_chat_template` with the assistant mask; in one process, nothing cached."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with Path(rows).open(encoding="utf-8") as file:
        data = datasets.Dataset.from_list([json.loads(line) for line in file])

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = loaded.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    with stopwatch() as watch:
        mapped = data.map(encode, batched=batched, remove_columns=data.column_names)
    columns = list(zip(mapped["input_ids"], mapped["assistant_masks"], strict=True))
    Path(digests).write_text(json.dumps([ours.row_digest(ids, mask) for ids, mask in columns]))
    tokens = sum(len(ids) for ids, _ in columns)
    return {"cpu": watch.cpu, "wall": watch.wall, "work": tokens / 1e6, "tokens": tokens, "digests": digests}
