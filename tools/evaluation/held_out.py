"""Loss on the supervised tokens of a token store, document by document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.evaluation.forward import batches_of_like_length, logits_of, refuse_other_tokenizer
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.store import TokenStore


@dataclass(frozen=True)
class HeldOut:
    """Samples of a store: windows of documents, whose supervised tokens each are a target once."""

    ids: list[list[int]]
    spans: list[list[tuple[int, int]]]
    """Supervised positions of each sample."""
    document: list[int]
    """Which of the documents, counted from 0, a sample is part of."""
    sources: list[str]
    """Of each document."""
    utf8_bytes: NDArray[np.int64]
    """Of the supervised text of each document."""


def read_held_out(store: TokenStore, tokenizer: Any, path: object, max_rows: int | None) -> HeldOut:
    """The samples of the first `max_rows` rows.

    DataError when the store was built with another tokenizer than that of the model in `path`.
    """
    from trainer.data.store.inspect import decoded_rows

    refuse_other_tokenizer(store, tokenizer, path)
    plan = store.plan()
    rows = decoded_rows(store, plan, range(min(plan.n_rows, max_rows or plan.n_rows)))
    samples = [sample for row in rows for sample in row["samples"] if sample["spans"]]
    if not samples:
        raise DataError(f"{store.location} has no supervised token in these rows", "give more rows")
    numbers = {document: number for number, document in enumerate(dict.fromkeys(each["document"] for each in samples))}
    sources = [""] * len(numbers)
    sizes = np.zeros(len(numbers), dtype=np.int64)
    for sample in samples:
        number = numbers[sample["document"]]
        sources[number] = str(sample["source"])
        sizes[number] += sum(len(part["text"].encode()) for part in sample["parts"] if part["supervised"])
    return HeldOut(
        ids=[sample["ids"] for sample in samples],
        spans=[[(int(begin), int(end)) for begin, end in sample["spans"]] for sample in samples],
        document=[numbers[sample["document"]] for sample in samples],
        sources=sources,
        utf8_bytes=sizes,
    )


def document_losses(model: Any, held_out: HeldOut) -> NDArray[np.float64]:
    """[documents, 2]: summed loss (nats) and supervised tokens, as training counts them, in the model's dtype.

    Samples are computed apart from each other, however a store packs them. DataError when a loss is not finite.
    """
    import torch
    from torch.nn import functional

    found = np.zeros((len(held_out.sources), 2))
    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in batches_of_like_length([len(ids) for ids in held_out.ids], vocabulary):
        logits = logits_of(model, [held_out.ids[i] for i in batch])
        for row, index in enumerate(batch):
            places = torch.cat([torch.arange(begin, end) for begin, end in held_out.spans[index]])
            targets = torch.tensor(held_out.ids[index])[places]
            loss = functional.cross_entropy(logits[row, places - 1], targets.to(logits.device), reduction="sum")
            found[held_out.document[index]] += (float(loss), len(places))
    if not np.isfinite(found).all():
        raise DataError("the loss on held-out text is not finite", "the model is broken: verify it")
    return found
