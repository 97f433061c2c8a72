"""Many samples through a causal language model at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError

if TYPE_CHECKING:
    import torch

    from trainer.data.store import TokenStore

_LOGITS_AT_ONCE = 1 << 26
"""Of a batch: 256 MiB in fp32."""


def refuse_other_tokenizer(store: TokenStore, tokenizer: Any, path: object) -> None:
    """DataError when the store was built with another tokenizer than that of the model in `path`."""
    from trainer.data.encode.tokenizer import load_tokenizer

    if (ours := load_tokenizer(store.tokenizer_path).get_vocab()) != (theirs := tokenizer.get_vocab()):
        odd = min(set(ours.items()) ^ set(theirs.items()))[0]
        raise DataError(
            f"{store.location} was built with another tokenizer than that of {path} (token {odd!r})",
            "build a store with the model's tokenizer",
        )


def batches_of_like_length(lengths: Sequence[int], vocabulary: int) -> Iterator[list[int]]:
    """Numbers of samples of like length, as many together as their logits have room for."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] * vocabulary > _LOGITS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def logits_of(model: Any, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits fp32 [samples, longest, vocabulary] on the model's device; those beyond a sample's end mean nothing."""
    import torch

    longest = max(map(len, samples))
    # Padding on the right: what comes later is seen by nobody.
    ids = torch.tensor([[*sample, *[0] * (longest - len(sample))] for sample in samples])
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    return logits
