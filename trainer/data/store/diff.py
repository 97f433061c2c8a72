"""What differs between two token stores: documents, tokenizer, template, recipe, plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.reader import TokenStore

SHOWN = 5
FACTS = {
    "tokenizer_fingerprint": "tokenizer",
    "template_sha256": "chat template",
    "vocabulary_size": "vocabulary size",
    "schema": "schema",
}


@dataclass(frozen=True)
class StoreDiff:
    """Two stores compared.

    `only_first` and `only_second` are places of documents whose ids and mask are in one store only (the first few),
    with their counts; `moved` says that both hold the same documents in another order.
    """

    stores: tuple[str, str]
    equal: bool
    documents: tuple[int, int]
    tokens: tuple[int, int]
    supervised_tokens: tuple[int, int]
    common: int
    only_first: tuple[str, ...]
    only_first_count: int
    only_second: tuple[str, ...]
    only_second_count: int
    moved: bool
    facts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        first, second = self.stores
        if self.equal:
            yield f"equal: {self.documents[0]:,} documents, {self.tokens[0]:,} tokens, in the same order"
        else:
            for name, numbers in (
                ("documents", self.documents),
                ("tokens", self.tokens),
                ("supervised", self.supervised_tokens),
            ):
                yield f"{name:<11}{numbers[0]:,} and {numbers[1]:,} ({numbers[1] - numbers[0]:+,})"
            yield f"common     {self.common:,} documents" + (", in another order" if self.moved else "")
            for store, places, count in (
                (first, self.only_first, self.only_first_count),
                (second, self.only_second, self.only_second_count),
            ):
                if count:
                    yield f"only in {store}: {count:,} documents, first {', '.join(places)}"
        for fact in self.facts:
            yield f"differs    {fact}"


def diff_stores(first: TokenStore, second: TokenStore) -> StoreDiff:
    """Compare two stores by the hashes of their documents (ids and loss mask) and by their manifests.

    Stores are equal when they hold the same documents in the same order for the same tokenizer; where the inputs lay
    and how rows are packed are listed as facts only.
    """
    hashes = first.column("document_hash"), second.column("document_hash")
    missing, extra = _only(*hashes), _only(hashes[1], hashes[0])
    same_order = np.array_equal(*hashes)
    facts = tuple(_facts(first.manifest, second.manifest))
    same_ids = first.manifest["tokenizer_fingerprint"] == second.manifest["tokenizer_fingerprint"]

    def both(name: str) -> tuple[int, int]:
        return int(first.manifest[name]), int(second.manifest[name])

    return StoreDiff(
        stores=(str(first.path), str(second.path)),
        equal=same_order and same_ids,
        documents=both("documents"),
        tokens=both("tokens"),
        supervised_tokens=both("supervised_tokens"),
        common=len(hashes[0]) - len(missing),
        only_first=tuple(first.place(int(index)) for index in missing[:SHOWN]),
        only_first_count=len(missing),
        only_second=tuple(second.place(int(index)) for index in extra[:SHOWN]),
        only_second_count=len(extra),
        moved=not same_order and not len(missing) and not len(extra),
        facts=facts,
    )


def _only(mine: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Indexes of the documents that the other store lacks; a document that is there twice must be there twice."""
    order = np.argsort(mine, kind="stable")
    sorted_mine, sorted_others = mine[order], np.sort(others)
    occurrence = np.arange(len(mine)) - np.searchsorted(sorted_mine, sorted_mine, side="left")
    available = np.searchsorted(sorted_others, sorted_mine, side="right") - np.searchsorted(
        sorted_others, sorted_mine, side="left"
    )
    return np.sort(order[occurrence >= available]).astype(np.int64)


def _facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for key, name in FACTS.items():
        if first[key] != second[key]:
            yield f"{name}: {_short(first[key])} and {_short(second[key])}"
    for kind in ("plan", "recipe"):
        mine, others = dict(_flat(first[kind])), dict(_flat(second[kind]))
        for key in sorted(mine.keys() | others.keys()):
            if mine.get(key) != others.get(key):
                yield f"{kind} {key}: {mine.get(key)} and {others.get(key)}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _short(value: Any) -> str:
    return str(value)[:12]
