"""Show what training will see: decoded rows with the supervised part marked, and counts per source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.quality.card import MaskPart
from trainer.data.store.packing import RowPlan, window_of
from trainer.data.store.reader import TokenStore
from trainer.errors import UsageError

OPEN_MARK, CLOSE_MARK = "⟦", "⟧"
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def inspect_rows(store: TokenStore, first: int, count: int) -> list[dict[str, Any]]:
    """Rows `first` to `first + count` of the stored plan, decoded.

    Each row is {row, tokens, supervised_tokens, padding, samples}; each sample {sample, document, place, start, stop,
    head, ids, spans, text, parts}. `spans` are target positions relative to the sample, `parts` its text in order as
    {text, supervised}.

    Raises:
        UsageError: no such row.
    """
    plan = store.plan()
    if count < 1 or not 0 <= first < plan.n_rows:
        raise UsageError(
            f"rows {first} to {first + count - 1} are not in the store", f"it has rows 0 to {plan.n_rows - 1}"
        )
    return decoded_rows(store, plan, range(first, min(first + count, plan.n_rows)))


def decoded_rows(store: TokenStore, plan: RowPlan, rows: Iterable[int]) -> list[dict[str, Any]]:
    """These rows of `plan`, as `inspect_rows` describes them."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    return [_row(store, plan, tokenizer, row) for row in rows]


def _row(store: TokenStore, plan: RowPlan, tokenizer: Any, row: int) -> dict[str, Any]:
    tokens = int(plan.tokens[row])
    return {
        "row": row,
        "tokens": tokens,
        "supervised_tokens": int(plan.supervised[row]),
        "padding": plan.sequence_length - tokens,
        "samples": [_sample(store, plan, tokenizer, int(sample)) for sample in plan.samples_of(row)],
    }


def _sample(store: TokenStore, plan: RowPlan, tokenizer: Any, sample: int) -> dict[str, Any]:
    window = window_of(plan, sample)
    start, stop, first, head = window.start, window.stop, window.first_target, window.head
    ids, spans = store.document(window.document)
    targets = [
        (max(int(begin), first) - start + head, min(int(end), stop) - start + head)
        for begin, end in spans
        if max(int(begin), first) < min(int(end), stop)
    ]
    view = np.concatenate([ids[:head], ids[start:stop]]).astype(np.int64).tolist()
    parts = list(decoded_parts(tokenizer, view, targets))
    return {
        "sample": sample,
        "document": window.document,
        "source": store.source_of(window.document),
        "place": store.place(window.document),
        "window": {name: value for name, value in asdict(window).items() if name != "document"},
        "ids": view,
        "spans": targets,
        "text": "".join(part["text"] for part in parts),
        "parts": parts,
    }


def decoded_parts(tokenizer: Any, ids: list[int], spans: Sequence[tuple[int, int]]) -> Iterator[MaskPart]:
    """The text of `ids` in order, cut where supervised `spans` begin and end."""
    last = 0
    for start, stop in [*spans, (len(ids), len(ids))]:
        for begin, end, supervised in ((last, start, False), (start, stop, True)):
            if begin < end:
                text = tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
                yield {"text": text, "supervised": supervised}
        last = stop


def visible(text: str) -> str:
    """Text with control and direction characters written as escapes: data must not steer a terminal."""
    return _INVISIBLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def plain_row(row: Mapping[str, Any]) -> str:
    """A row as text with ⟦supervised⟧ marks, for pipes and files."""
    lines = [row_title(row)]
    for sample in row["samples"]:
        text = "".join(
            f"{OPEN_MARK}{visible(part['text'])}{CLOSE_MARK}" if part["supervised"] else visible(part["text"])
            for part in sample["parts"]
        )
        lines += [sample_title(sample), text]
    return "\n".join([*lines, ""])


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows on a terminal, the supervised part coloured."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text("supervised text is green", style="bold green"))
    for row in rows:
        console.rule(row_title(row))
        for sample in row["samples"]:
            console.print(Text(sample_title(sample), style="dim"))
            text = Text()
            for part in sample["parts"]:
                text.append(visible(part["text"]), style="green" if part["supervised"] else "")
            console.print(text)


def row_title(row: Mapping[str, Any]) -> str:
    """One line about a row."""
    return (
        f"row {row['row']}: {len(row['samples'])} samples, {row['tokens']} tokens, "
        f"{row['supervised_tokens']} supervised, {row['padding']} padding"
    )


def sample_title(sample: Mapping[str, Any]) -> str:
    """One line about a sample: where it comes from, and which part of its document it is when it is a part."""
    window = sample["window"]
    part = f", window {window['index'] + 1} of {window['of']}" if window["of"] > 1 else ""
    head = f" after a pinned head of {window['head']}" if window["head"] else ""
    return f"-- {sample['place']} tokens {window['start']} to {window['stop']}{part}{head}"
