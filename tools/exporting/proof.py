"""The proof of an export, by a process that has seen nothing of its making.

It is given the directory, the checkpoint and the sizes and hashes as they were written, and shows in this order:

    files       every one has the sha256 of what the exporter meant to write, and no other lies there
    inventory   the tensors of the architecture that config.json names: none missing, unknown, empty, not finite
    weights     each equal, bit by bit, to the checkpoint's in the dtype of the file
    logits      plain `from_pretrained` loads it without a complaint, and it answers the probes as the live model did

The logits were stored when the checkpoint was saved. They are what the first three cannot replace: they come from the
engine that trained, by another path than the weights.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.model_directory.writing import UNFINISHED_NAME, Entry, describe
from trainer.checkout import command_of
from trainer.errors import CheckpointError, DataError, NotEqualError, SteadfastError
from trainer.orphans import die_with_parent

if TYPE_CHECKING:
    import torch

PROBE_NAME = "probe.safetensors"
FLOAT32_TOLERANCE = 1e-4
ROUNDED_SHARE = 0.05
REMEDY = "nothing was exported; try again or an earlier checkpoint, and report this"
_START_COMMAND = command_of("tools.exporting.proof")


@dataclass(frozen=True)
class Claim:
    """What is to be proved: that `model` (a directory) holds `checkpoint` in `dtype`, in exactly these `files`."""

    model: str
    checkpoint: str
    dtype: str
    files: Mapping[str, Entry]
    trusted_code: str | None = None
    """Revision of the model's own code that may run (`trainer.model.remote_code`)."""
    base: str | None = None
    """Of a LoRA checkpoint: the directory of its base, which was compared with the one that was trained with."""
    apart: bool = False
    """Whether `model` is the adapter alone."""


@dataclass(frozen=True)
class Proof:
    """What was shown; written as `proof.json`."""

    files: int
    """Files whose sha256 is that of what was written."""
    tensors: int
    """Tensors of the architecture, each equal bit by bit to the checkpoint's in the dtype of the file."""
    logit_max_diff: float
    top1_agreement: float
    prompts: list[list[int]]
    """Token ids of the probes."""
    positions: int
    """Positions compared: the last ones of every probe."""
    tolerance: float
    dtype: str
    loaded_with: str
    """The library, and its version, that loaded it."""


def prove(claim: Claim) -> Proof:
    """Examine the claim in a fresh process.

    Raises NotEqualError naming what is not as claimed, CheckpointError when the checkpoint has no probe.
    """
    request = json.dumps({"parent": os.getpid(), **asdict(claim)})
    done = subprocess.run(_START_COMMAND, input=request, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        if "proof" in answer:
            return Proof(**answer["proof"])
        fact, remedy = answer["fact"], answer["remedy"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SteadfastError(f"the process that reloads the export ended with {done.returncode}: {last}") from error
    raise CheckpointError(fact, remedy) if answer["checkpoint_is_at_fault"] else NotEqualError(fact, remedy)


def main() -> None:
    """Entry of the process: a claim as JSON comes in, a proof or what is wrong goes out."""
    request = json.load(sys.stdin)
    die_with_parent(request.pop("parent"))
    request["files"] = {name: Entry(**entry) for name, entry in request["files"].items()}
    answer: dict[str, Any]
    try:
        answer = {"proof": asdict(examine(Claim(**request)))}
    except SteadfastError as error:
        answer = {
            "fact": error.fact,
            "remedy": error.remedy,
            "checkpoint_is_at_fault": isinstance(error, CheckpointError),
        }
    print(json.dumps(answer), flush=True)


def examine(claim: Claim) -> Proof:
    """Show that the claim holds, in this process; raises as `prove` does.

    Forward passes run in float32 whatever the file's dtype. Where both the training and the file are float32 the
    allowed difference is 1e-4. Where one has 16 bits it is 5 % of the largest stored logit: bfloat16 keeps 8 bits, so
    every weight and activation is off by up to 0.4 %, and the errors of the layers add up. What this lets pass, the
    comparison of the weights does not.
    """
    import transformers

    from tools.exporting.adapter import loaded_with
    from tools.exporting.checkpoint_tensors import open_adapter, open_checkpoint, trained_dtype
    from tools.model_directory.loading import load_config, quiet_transformers
    from tools.model_directory.tensors import WEIGHTS_STEM, ModelTensors, architecture_shapes, check_inventory
    from trainer.adapter_file import STEM
    from trainer.model.remote_code import trust_remote_code

    quiet_transformers()
    model, checkpoint = Path(claim.model), Path(claim.checkpoint)
    ids, logits = _read_probe(checkpoint)
    _check_files(model, claim.files)
    trust_remote_code(checkpoint / "model", claim.trusted_code)
    base = None if claim.base is None else Path(claim.base)
    source = open_adapter(checkpoint, claim.dtype) if claim.apart else open_checkpoint(checkpoint, claim.dtype, base)
    try:
        tensors = ModelTensors(model, STEM if claim.apart else WEIGHTS_STEM)
        expected = source.reader.parameters if claim.apart else architecture_shapes(load_config(model))
        check_inventory(tensors, expected)
    except DataError as error:
        raise NotEqualError(error.fact, REMEDY) from error
    _check_weights(tensors, source)
    found, top1 = _compare_logits(_load(model, base if claim.apart else None), ids, logits)
    rounded = {claim.dtype, trained_dtype(source.reader)} != {"float32"}
    tolerance = ROUNDED_SHARE * max(1.0, float(logits.abs().max())) if rounded else FLOAT32_TOLERANCE
    if found > tolerance:
        raise NotEqualError(
            f"the exported model is not the live one: logits differ by up to {found:.3g} where {tolerance:.1g} is "
            f"allowed (checkpoint {checkpoint})",
            REMEDY,
        )
    return Proof(
        files=len(claim.files),
        tensors=len(tensors.shapes),
        logit_max_diff=found,
        top1_agreement=top1,
        prompts=ids.tolist(),
        positions=ids.shape[0] * logits.shape[1],
        tolerance=tolerance,
        dtype=claim.dtype,
        loaded_with=loaded_with() if claim.apart else f"transformers {transformers.__version__}",
    )


def _check_files(model: Path, files: Mapping[str, Entry]) -> None:
    present = {path.name for path in model.iterdir()} - {UNFINISHED_NAME}
    if odd := sorted(present ^ set(files)):
        state = "is missing" if odd[0] in files else "was not written by the export"
        raise NotEqualError(f"{model / odd[0]} {state}", REMEDY)
    for name, entry in files.items():
        if describe(model / name) != entry:
            raise NotEqualError(f"{model / name} is not what was written: its sha256 differs", REMEDY)


def _check_weights(tensors: Any, source: Any) -> None:
    """Bit by bit; `source` is read again, from the slices."""
    import numpy as np
    import torch

    for name, (dtype, shape) in source.plan.items():
        if (tensors.dtypes.get(name), tensors.shapes.get(name)) != (dtype, shape):
            raise NotEqualError(f"{tensors.path}: {name} is not stored as {dtype} with shape {shape}", REMEDY)
        start = 0
        for expected in source.pieces(name):
            stored = tensors.values(name, start, expected.size)
            found = (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy()
            if not np.array_equal(found.view(np.uint8), expected.reshape(-1).view(np.uint8)):
                raise NotEqualError(f"{tensors.path}: {name} is not the checkpoint's", REMEDY)
            start += expected.size


def _load(model_path: Path, base: Path | None) -> Any:
    """The exported model as others load it, fp32; an adapter on its `base`."""
    import torch
    from transformers import AutoModelForCausalLM

    from tools.exporting.adapter import load_with_adapter

    try:
        if base is not None:
            return load_with_adapter(model_path, base)
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
        raise NotEqualError(f"{model_path} does not load: {reason}", REMEDY) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise NotEqualError(f"{model_path} has {kind.replace('_', ' ')}: {names[0]}", REMEDY)
    return model


def _compare_logits(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Largest difference to the stored logits (infinite when some are not numbers) and share of equal first choices."""
    import torch

    kept = logits.shape[1]
    largest, same = 0.0, 0
    with torch.inference_mode():
        for row, expected in zip(ids, logits, strict=True):
            found = model(input_ids=row[None], logits_to_keep=kept).logits[0, -kept:].float()
            largest = max(largest, float((found - expected).abs().nan_to_num(nan=math.inf).max()))
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
    return largest, same / (len(ids) * kept)


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
