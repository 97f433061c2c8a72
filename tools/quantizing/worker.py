"""Runs in the environment of llm-compressor: a request as JSON comes in, an answer as JSON goes out, in the last line.

    {"action": "compress", "model", "out", "scheme", "calibration": [[ids], ...]}     weights and config.json in `out`
    {"action": "compare", "model", "changed", "prompts": [[ids], ...]}                a Quality

Both with "trusted_code", the revision of the model's own code that may run, or null: this process reads and hashes the
files itself, so what the other one looked at does not matter.

Of our own modules it imports only what needs nothing but torch.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import DataError, SteadfastError
from trainer.model.remote_code import own_classes, trust_remote_code
from trainer.orphans import die_with_parent

# Heads and routers keep their precision: they decide, and are small.
IGNORED = ["lm_head", "re:.*score$", "re:.*classifier$", r"re:.*(router|mlp\.gate)$"]


def main() -> None:
    """Entry of the process."""
    request = json.load(sys.stdin)
    die_with_parent(request.pop("parent"))
    action, trusted_code = request.pop("action"), request.pop("trusted_code")
    try:
        trust_remote_code(Path(request["model"]), trusted_code)
        answer = compress(**request) if action == "compress" else compare(**request)
    except SteadfastError as error:
        answer = {"fact": error.fact, "remedy": error.remedy}
    print(json.dumps(answer), flush=True)


def compress(model: str, out: str, scheme: str, calibration: list[list[int]]) -> dict[str, Any]:
    """Write the model in `scheme` to the existing directory `out`."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot

    loaded = _load(model, torch.bfloat16)  # what engines expect of scales and norms
    options: dict[str, Any] = {}
    if calibration:
        longest = max(map(len, calibration))
        rows = {"input_ids": calibration, "attention_mask": [[1] * len(row) for row in calibration]}
        options = {
            "dataset": Dataset.from_dict(rows),
            "max_seq_length": longest,
            "num_calibration_samples": len(calibration),
            "shuffle_calibration_samples": False,
        }
    if scheme == "sparse24-magnitude":
        _prune_by_magnitude(loaded)
    else:
        try:
            oneshot(model=loaded, recipe=_recipe(scheme), **options)
        except RuntimeError as error:
            # To calibrate layer by layer the library rewrites the source of the network, which not every code survives.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise DataError(
                f"llm-compressor cannot make {scheme} of {model}: {reason}",
                "fp8, w4a16-rtn and int8 follow no code" if own_classes(Path(model)) else "choose another scheme",
            ) from error
    loaded.save_pretrained(out, save_compressed=not scheme.startswith("sparse24"))
    return {"layers": sum(1 for module in loaded.modules() if isinstance(module, torch.nn.Linear)) - 1}


def _recipe(scheme: str) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    common = {"targets": "Linear", "ignore": IGNORED}
    if scheme == "fp8":
        return [QuantizationModifier(scheme="FP8_DYNAMIC", **common)]
    if scheme == "w4a16-rtn":
        return [QuantizationModifier(scheme="W4A16", **common)]
    if scheme == "w4a16-gptq":
        return [GPTQModifier(scheme="W4A16", **common)]
    if scheme == "w4a16-awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(scheme="W4A16", **common)]
    if scheme == "w8a8":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", **common)]
    pruning = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"], "ignore": IGNORED}
    if scheme == "sparse24-sparsegpt":
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

        return [SparseGPTModifier(**pruning)]
    if scheme == "sparse24-wanda":
        from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

        return [WandaPruningModifier(**pruning)]
    raise SteadfastError(f"the environment knows no scheme {scheme}")


def _prune_by_magnitude(model: Any) -> None:
    """Of each four neighbouring weights of a row, zero the two smallest."""
    import torch

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 4 == 0:
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)


def compare(model: str, changed: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Load both from disk, let the changed one generate, and say how close it is."""
    import torch

    from tools.quantizing.quality import quality

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    original, other = _load(model, dtype), _load(changed, dtype)
    with torch.inference_mode():
        other.generate(torch.tensor([prompts[0][:16]], device=other.device), max_new_tokens=4, do_sample=False)
    return asdict(quality(original, other, prompts))


def _load(path: str, dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, device_map=device
        ).eval()
    except Exception as error:
        reason = (re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__)[:300]
        raise DataError(f"{path} does not load: {reason}", "is it a whole model?") from error


if __name__ == "__main__":
    main()
