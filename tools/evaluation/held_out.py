"""Loss on the supervised tokens of a token store, document by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.store import TokenStore

_LOGITS_AT_ONCE = 1 << 26
"""Of a batch: 256 MiB in fp32."""


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
    from trainer.data.encode.tokenizer import load_tokenizer
    from trainer.data.store.inspect import decoded_rows

    if (ours := load_tokenizer(store.tokenizer_path).get_vocab()) != (theirs := tokenizer.get_vocab()):
        odd = min(set(ours.items()) ^ set(theirs.items()))[0]
        raise DataError(
            f"{store.location} was built with another tokenizer than that of {path} (token {odd!r})",
            "build a store with the model's tokenizer",
        )
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
    for batch in _batches(held_out.ids, int(model.config.get_text_config().vocab_size)):
        longest = max(len(held_out.ids[i]) for i in batch)
        ids = torch.tensor([held_out.ids[i] + [0] * (longest - len(held_out.ids[i])) for i in batch])
        # Padding on the right: what comes later is seen by nobody.
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device)).logits.float()
            for row, index in enumerate(batch):
                places = torch.cat([torch.arange(begin, end) for begin, end in held_out.spans[index]])
                loss = functional.cross_entropy(
                    logits[row, places - 1], ids[row, places].to(logits.device), reduction="sum"
                )
                found[held_out.document[index]] += (float(loss), len(places))
    if not np.isfinite(found).all():
        raise DataError("the loss on held-out text is not finite", "the model is broken: verify it")
    return found


def _batches(ids: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[int]]:
    """Numbers of samples of like length, as many together as their logits have room for."""
    batch: list[int] = []
    for index in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[index]) * vocabulary > _LOGITS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
