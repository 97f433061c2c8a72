"""Pieces of weights on their way to a file: how large, in which dtype, and whether they are finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PIECE_ELEMENTS = 1 << 20
"""Elements in memory at once: 4 MiB in fp32, so that casting, hashing and writing find them in the cache."""


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass without a mask: the extremes carry both on."""
    import torch

    if values.numel() == 0 or not values.is_floating_point():
        return True
    smallest, largest = torch.aminmax(values)
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


def in_file_dtype(name: str, values: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """Finite `values` of tensor `name` as they are written; bfloat16 as 16-bit patterns.

    Raises DataError when one of them is beyond the range of `dtype`.
    """
    import torch

    cast = values.to(getattr(torch, dtype))
    if cast.dtype != values.dtype and not is_finite(cast):
        raise DataError(f"{name} holds values beyond the range of {dtype}", "choose --dtype bfloat16 or float32")
    result: np.ndarray[Any, Any] = (cast.view(torch.int16) if dtype == "bfloat16" else cast).numpy()
    return result
