"""How close two models are: on the probes stored beside a checkpoint, and on any prompts.

A probe is a row of token ids with the live engine's logits at its last positions. They are written when a checkpoint is
saved, so parity can be shown later without the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import CheckpointError, DataError

PROBE_NAME = "probe.safetensors"
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_SHARE = 0.05
MAX_PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Proof:
    """The outcome of a comparison with stored logits; written as `proof.json`."""

    logit_max_diff: float
    top1_agreement: float
    prompts: list[list[int]]
    """Token ids of the probes."""
    positions: int
    """Positions compared: the last ones of every probe."""
    tolerance: float
    dtype: str
    passed: bool


@dataclass(frozen=True)
class Distance:
    """How far a changed model is from its original, over all positions of some prompts."""

    top1_agreement: float
    mean_kl: float
    """Mean over positions of KL(original || changed), in nats."""
    max_kl: float
    positions: int


def compare_with_probe(model_path: Path, checkpoint: Path, *, dtype: str, trained_dtype: str) -> Proof:
    """Load `model_path` with plain transformers in float32 and compare it (see `compare_model_with_probe`)."""
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the export of {checkpoint} does not load: {reason}", "nothing was exported") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise CheckpointError(
                f"the export of {checkpoint} has {kind.replace('_', ' ')}: {names[0]}", "nothing was exported"
            )
    return compare_model_with_probe(model, checkpoint, dtype=dtype, trained_dtype=trained_dtype)


def compare_model_with_probe(model: Any, checkpoint: Path, *, dtype: str, trained_dtype: str) -> Proof:
    """Compare a float32 model, whose files have `dtype`, with the logits stored in `checkpoint`.

    Where both the training and the file are float32 the allowed difference is 1e-4. Where one is bfloat16 it is 5 % of
    the largest stored logit: bfloat16 keeps 8 bits, so every weight and activation is off by up to 0.4 %, and the
    errors of the layers add up; a weight that is wrong and not only rounded moves logits by the size of the logits
    themselves.
    """
    ids, logits = _read_probe(checkpoint)
    kept = logits.shape[1]
    largest_difference, same, count = 0.0, 0, 0
    finite = True
    with torch.inference_mode():
        for row, expected in zip(ids, logits, strict=True):
            found = model(input_ids=row[None], logits_to_keep=kept).logits[0, -kept:].float()
            difference = (found - expected).abs().max().item()
            finite = finite and math.isfinite(difference)
            largest_difference = max(largest_difference, difference)
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            count += kept
    rounded = "bfloat16" in (dtype, trained_dtype)
    tolerance = BFLOAT16_SHARE * max(1.0, float(logits.abs().max())) if rounded else FLOAT32_TOLERANCE
    return Proof(
        logit_max_diff=largest_difference,
        top1_agreement=same / count,
        prompts=ids.tolist(),
        positions=count,
        tolerance=tolerance,
        dtype=dtype,
        passed=finite and largest_difference <= tolerance,
    )


def distance(original: Any, changed: Any, prompts: Sequence[Sequence[int]]) -> Distance:
    """Compare the next-token distributions of two models at every position of `prompts` (token ids, one by one).

    KL and argmax are computed in fp32. Raises DataError when `changed` gives logits that are not finite.
    """
    same, count, total, largest = 0, 0, 0.0, 0.0
    with torch.inference_mode():
        for row in _rows(prompts, original.device):
            first = torch.log_softmax(original(input_ids=row).logits[0].float(), dim=-1)
            second = torch.log_softmax(changed(input_ids=row).logits[0].float(), dim=-1)
            if not torch.isfinite(second).all():
                raise DataError("the changed model gives logits that are not finite", "keep the original")
            divergence = (first.exp() * (first - second)).sum(-1).clamp_(min=0)
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
            count += row.shape[1]
            total += float(divergence.sum())
            largest = max(largest, float(divergence.max()))
    if count == 0:
        raise DataError("there is no prompt to compare the models on", "give some with --data")
    return Distance(same / count, total / count, largest, count)


def _rows(prompts: Sequence[Sequence[int]], device: Any) -> Iterator[torch.Tensor]:
    for prompt in prompts:
        if prompt:
            yield torch.tensor([list(prompt)[:MAX_PROMPT_TOKENS]], dtype=torch.long, device=device)


def _read_probe(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    path = checkpoint / PROBE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {checkpoint} has no {PROBE_NAME}, so there is nothing to verify against",
            "export without verification",
        )
    tensors = load_file(path)
    ids, logits = tensors["input_ids"].long(), tensors["logits"].float()
    if ids.ndim != 2 or logits.ndim != 3 or ids.shape[0] != logits.shape[0] or not 0 < logits.shape[1] <= ids.shape[1]:
        raise CheckpointError(f"{path} is not a probe", "export without verification")
    return ids, logits
