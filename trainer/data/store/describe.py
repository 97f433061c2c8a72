"""A token store in words: its data card, and its texts for the search for leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.quality.card import (
    DataCard,
    DuplicateFigures,
    DuplicatePair,
    MaskExample,
    SourceFigures,
    length_figures,
)
from trainer.data.quality.leakage import LeakReport
from trainer.data.store.inspect import decoded_parts
from trainer.data.store.reader import TokenStore
from trainer.data.store.report import DUPLICATE, NEAR_DUPLICATE

EXAMPLES = 6
EXAMPLE_TOKENS = 600
PAIRS_SHOWN = 10
LEAKS_SHOWN = 20


def data_card(store: TokenStore) -> DataCard:
    """The card of a store: figures from its manifest, lengths and mask examples from its documents."""
    manifest = store.manifest
    plan = manifest["plan"]
    return {
        "title": f"Data card: {store.name}",
        "facts": {
            "rows": f"{manifest['rows']:,} of {plan['sequence_length']:,} tokens",
            "padding": f"{manifest['padding_share']:.2%}",
            "long text": f"{plan['long_text']}, windows of {plan['window']:,} overlap by {plan['overlap']:,}",
            "tokenizer": manifest["tokenizer_fingerprint"][:16],
            "chat template": manifest["template_sha256"][:16],
            "content": store.fingerprint[:16],
            "seed": str(manifest["recipe"]["seed"]),
        },
        "sources": [_source(source) for source in manifest["sources"]],
        "lengths": length_figures(store.lengths()),
        "duplicates": _duplicates(store),
        "examples": list(_examples(store)),
        "notes": list(_notes(manifest)),
    }


def store_texts(store: TokenStore) -> Iterator[tuple[str, str]]:
    """(place, text) of every document, decoded without control tokens."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    for index in range(store.n_documents):
        ids, _ = store.document(index)
        yield store.place(index), str(tokenizer.decode(ids.astype(np.int64).tolist(), skip_special_tokens=True))


def leak_lines(report: LeakReport) -> Iterator[str]:
    """The report for a terminal."""
    for split, texts in report.texts.items():
        yield f"{split}: {texts:,} documents"
    if not report.leaks:
        yield "no document of one store is in another, exactly or nearly"
    for (split, other, kind), count in report.counts.items():
        yield f"leak       {count:,} documents of {split} are in {other} ({kind})"
    for leak in report.leaks[:LEAKS_SHOWN]:
        yield f"  {leak.place} = {leak.other_place} ({leak.kind}, similarity {leak.similarity:.2f})"
    if (more := len(report.leaks) - LEAKS_SHOWN) > 0:
        yield f"  and {more:,} more: --json lists all"


def _source(source: Mapping[str, Any]) -> SourceFigures:
    return {
        "name": source["name"],
        "format": source["format"],
        "rows": source["rows"],
        "kept": source["kept"],
        "documents": source["documents"],
        "tokens": source["tokens"],
        "supervised_tokens": source["supervised_tokens"],
        "dropped": source["left_out"]["counts"],
        "changed": source["changed"]["counts"],
    }


def _duplicates(store: TokenStore) -> DuplicateFigures:
    """Duplicates that were left out; those that were kept are among the notes."""
    left_out = [source["left_out"]["counts"] for source in store.manifest["sources"]]
    examples: list[DuplicatePair] = []
    report = "reports/left_out.jsonl"
    if any(file["name"] == report for file in store.manifest["files"]):
        with store.file(report).open(encoding="utf-8") as stream:
            dropped = (entry for entry in map(json.loads, stream) if "repeats" in entry and not entry["kept"])
            for entry in islice(dropped, PAIRS_SHOWN):
                kind = "exact" if entry["reason"] == DUPLICATE else "near"
                examples.append({"kept": entry["repeats"], "dropped": entry["place"], "kind": kind})
    return {
        "exact": sum(counts.get(DUPLICATE, 0) for counts in left_out),
        "near": sum(counts.get(NEAR_DUPLICATE, 0) for counts in left_out),
        "examples": examples,
    }


def _examples(store: TokenStore) -> Iterator[MaskExample]:
    """Documents evenly spread over the store, cut after a while."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    names, source = store.source_names, store.column("source")
    count = min(EXAMPLES, store.n_documents)
    for index in (np.arange(count) * store.n_documents // max(count, 1)).tolist():
        ids, spans = store.document(index)
        size = min(len(ids), EXAMPLE_TOKENS)
        shown = [(start, min(stop, size)) for start, stop in spans.tolist() if start < size]
        parts = list(decoded_parts(tokenizer, ids[:size].astype(np.int64).tolist(), shown))
        yield {"place": store.place(index), "source": names[int(source[index])], "parts": parts}


def _notes(manifest: Mapping[str, Any]) -> Iterator[str]:
    for source in manifest["sources"]:
        for note, count in source["notes"]["counts"].items():
            yield f"{source['name']}: {count:,} {note}"
        if source["supervised_lost"]:
            yield f"{source['name']}: {source['supervised_lost']:,} supervised tokens lost to long_text"
        if source["windows_dropped"]:
            yield f"{source['name']}: {source['windows_dropped']:,} windows without a target dropped"
    for label, weight in manifest["class_weights"].items():
        yield f"class {label}: loss weight {weight:.3f}"
