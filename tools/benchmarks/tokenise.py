"""Tokenising, by Steadfast's encoder and by `datasets.map` with transformers.

Twice: plain texts to ids, and conversations to ids and loss mask, where the chat template costs both sides much.
"""

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
    """Compare encoders over a file of conversations: over their texts, then over the conversations."""
    texts = _compared(work, rows, tokenizer, rounds, say, "texts", [("datasets.map, batched", {"batched": True})])
    forms = [("datasets.map, batched", {"batched": True}), ("datasets.map, a row a call", {"batched": False})]
    return [*texts, *_compared(work, rows, tokenizer, rounds, say, "conversations", forms)]


def _compared(
    work: Path, rows: Path, tokenizer: Path, rounds: int, say: Say, kind: str, forms: list[tuple[str, dict[str, Any]]]
) -> list[Line]:
    """Lines of one comparison; `kind` is "texts" or "conversations"."""

    def arguments(name: str, **more: Any) -> Facts:
        digests = str(work / f"digests-{kind}-{name}.json")
        return {"rows": str(rows), "tokenizer": str(tokenizer), "digests": digests, "kind": kind, **more}

    mine = arguments("ours")
    contenders = [
        Contender("Steadfast", "tools.benchmarks.ours:tokenise", mine),
        *(Contender(name, THEIRS, arguments(name, **form), "datasets", GOAL) for name, form in forms),
    ]
    outcomes = run_rounds(contenders, rounds, lambda text: say(f"{SECTION} {kind}: {text}"))

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

    return compare(f"{SECTION} {kind}", UNIT, contenders, outcomes, note)


def by_datasets(rows: str, tokenizer: str, digests: str, kind: str, batched: bool) -> Facts:
    """Measure `datasets.map` over the tokenizer, or over `apply_chat_template` with the assistant mask.

    In one process, nothing cached.
    """
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with Path(rows).open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    data = datasets.Dataset.from_list([{"text": ours.text_of(row)} for row in found] if kind == "texts" else found)

    def encode_texts(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": loaded(batch["text"], add_special_tokens=False)["input_ids"]}

    def encode_conversations(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = loaded.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    encode = encode_texts if kind == "texts" else encode_conversations
    with stopwatch() as watch:
        mapped = data.map(encode, batched=batched, remove_columns=data.column_names)
    masks = mapped["assistant_masks"] if kind == "conversations" else [[1] * len(ids) for ids in mapped["input_ids"]]
    columns = list(zip(mapped["input_ids"], masks, strict=True))
    Path(digests).write_text(json.dumps([ours.row_digest(ids, mask) for ids, mask in columns]))
    tokens = sum(len(ids) for ids, _ in columns)
    return {"cpu": watch.cpu, "wall": watch.wall, "work": tokens / 1e6, "tokens": tokens, "digests": digests}
