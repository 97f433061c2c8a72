"""LoRA checkpoints at export: merged into a whole model, or apart as an adapter that peft, transformers and vLLM load.

A LoRA checkpoint holds the adapter only. Its base is read from where training read it, or from `--base`, and must have
the content that training saw. Merged weights are base + alpha / rank * B A in fp32, one tensor in memory at a time.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from tools.artefact import copy_files, describe, new_directory, tensor_bytes, write_manifest, write_weights
from tools.models import load_config, model_on_meta, weight_files
from trainer.adapter_file import (
    CONFIG_NAME,
    STEM,
    AdapterConfig,
    adapted_modules,
    parameter_names,
    read_adapter_config,
    stored_name,
)
from trainer.checkpoint.slices import Floats, SliceReader
from trainer.durable import write_file
from trainer.errors import CheckpointError, DataError, MissingInputError, UsageError
from trainer.weight_files import weights_fingerprint

if TYPE_CHECKING:
    from tools.proof import Proof

MODEL_CONFIGS = ("config.json", "generation_config.json")
"""Of the base: beside an adapter they would make its directory look like a whole model."""


class MergedWeights:
    """The whole model of a LoRA checkpoint, read as SliceReader reads that of any other.

    Raises MissingInputError when the base is not there, DataError when it is not the one that was trained with.
    """

    def __init__(self, adapter_weights: SliceReader, adapter: AdapterConfig, base: Path | None) -> None:
        self._reader, self._scale = adapter_weights, adapter.scale
        self.path, self.manifest, self.buffer = adapter_weights.path, adapter_weights.manifest, adapter_weights.buffer
        self._factors = {
            f"{name}.weight": parameter_names(name) for name in adapted_modules(adapter_weights.parameters)
        }
        base = find_base(adapter_weights, adapter, base)
        known = set(model_on_meta(load_config(self.path / "model")).state_dict()) - set(self.manifest.buffers)
        self._files = {name: file for name, file in weight_files(base, "model").items() if name in known}
        self.parameters = {name: _shape(file, name) for name, file in self._files.items()}

    def read(self, kind: str, parameter: str) -> Floats:
        """The flattened parameter, fp32, newly allocated; `kind` is master, there are no moments."""
        with safe_open(self._files[parameter], framework="pt") as file:
            weight = file.get_tensor(parameter).float()
        if parameter in self._factors:
            down, up = (
                torch.from_numpy(self._reader.read(kind, name)).view(self._reader.parameters[name])
                for name in self._factors[parameter]
            )
            weight.addmm_(up, down, alpha=self._scale)
        merged: Floats = weight.reshape(-1).numpy()
        return merged


def find_base(reader: SliceReader, adapter: AdapterConfig, base: Path | None) -> Path:
    """The directory of the base model: `base` if given, else where training read it. Every byte of it is hashed."""
    found = base or Path(adapter.base)
    if not found.is_dir():
        raise MissingInputError(f"the base model {found} of {reader.path} is not there", "name it: --base DIR")
    present, trained = weights_fingerprint(found), reader.manifest.identity.get("base")
    if present != trained:
        raise DataError(
            f"{found} is not the base that {reader.path} was trained with (its weights are {present}, not {trained})",
            "name the right one: --base DIR",
        )
    return found


def write_adapter(
    checkpoint: Path, out: Path, *, dtype: str, trained_dtype: str, base: Path | None, verify: bool
) -> tuple[dict[str, Any], Proof | None]:
    """Write the adapter of a LoRA checkpoint to the new directory `out`, in peft's format, with the tokenizer.

    `dtype` is float32 or bfloat16. Returns {tensors, parameters, bytes} and the proof; raises as export_checkpoint.
    """
    from tools.proof import compare_model_with_probe

    reader, adapter = SliceReader(checkpoint), read_adapter_config(checkpoint / "model")
    if adapter is None:
        raise UsageError(f"{checkpoint} is no LoRA checkpoint", "leave --lora out: it is exported whole")
    file_dtype = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    plan = {stored_name(name): (file_dtype, shape) for name, shape in reader.parameters.items()}
    names = {stored_name(name): name for name in reader.parameters}
    if base is not None:
        adapter = replace(adapter, base=str(base.absolute()))
    proof: Proof | None = None
    with new_directory(out, tensor_bytes(plan)) as building:
        entries = write_weights(
            building, STEM, plan, lambda name: _patterns(reader, names[name], dtype), tensor_bytes(plan)
        )
        model_files = sorted((checkpoint / "model").iterdir())
        entries |= copy_files(
            [file for file in model_files if file.name not in (*MODEL_CONFIGS, CONFIG_NAME)], building
        )
        texts = {CONFIG_NAME: json.dumps(adapter.as_json(), indent=2) + "\n"}
        write_file(building / CONFIG_NAME, texts[CONFIG_NAME])
        if verify:
            model = load_with_adapter(building, find_base(reader, adapter, base))
            proof = compare_model_with_probe(model, checkpoint, dtype=dtype, trained_dtype=trained_dtype)
            if not proof.passed:
                raise CheckpointError(
                    f"base and adapter are not the live model: logits differ by up to {proof.logit_max_diff:.3g} where "
                    f"{proof.tolerance:.1g} is allowed (checkpoint {checkpoint})",
                    "nothing was exported; try an earlier checkpoint, and report this",
                )
            texts["proof.json"] = json.dumps(asdict(proof) | {"loaded_with": loaded_with()}, indent=1) + "\n"
            write_file(building / "proof.json", texts["proof.json"])
        texts["README.md"] = _card(out.name, reader, adapter, proof)
        write_file(building / "README.md", texts["README.md"])
        entries |= {name: describe(building / name) for name in texts}
        manifest = reader.manifest
        about = {"kind": "adapter", "step": manifest.step, "dtype": dtype, "checkpoint": checkpoint.name}
        write_manifest(building, entries, about | {"identity": manifest.identity, "provenance": manifest.provenance})
        size = sum(path.stat().st_size for path in building.iterdir())
    count = sum(math.prod(shape) for shape in reader.parameters.values())
    return {"tensors": len(plan), "parameters": count, "bytes": size}, proof


def load_with_adapter(directory: Path, base: Path) -> Any:
    """The base with the adapter files of `directory`, fp32: through peft if it is installed, else by the formula."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    if has_peft():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, directory, local_files_only=True).eval()
    adapter = read_adapter_config(directory)
    if adapter is None:
        raise DataError(f"{directory} has no {CONFIG_NAME}", "export it again")
    with safe_open(directory / f"{STEM}.safetensors", framework="pt") as file, torch.no_grad():
        stored = set(file.keys())
        for name, module in model.named_modules():
            down, up = map(stored_name, parameter_names(name))
            if down in stored:
                module.weight.addmm_(file.get_tensor(up).float(), file.get_tensor(down).float(), alpha=adapter.scale)
                stored -= {down, up}
    if stored:
        raise DataError(f"{directory}: {min(stored)} has no place in the base model", "export it again")
    return model.eval()


def has_peft() -> bool:
    """Whether the extra `lora` is installed."""
    return importlib.util.find_spec("peft") is not None


def loaded_with() -> str:
    """What `load_with_adapter` loads an adapter with, in words."""
    return "peft" if has_peft() else "transformers, the adapter added by its formula (peft is not installed)"


def _patterns(reader: SliceReader, parameter: str, dtype: str) -> np.ndarray[Any, Any]:
    tensor = torch.from_numpy(reader.read("master", parameter))
    if not torch.isfinite(tensor).all():
        raise DataError(
            f"checkpoint {reader.path}: {parameter} holds values that are not finite", "export an earlier checkpoint"
        )
    patterns: np.ndarray[Any, Any] = (
        tensor.to(torch.bfloat16).view(torch.int16) if dtype == "bfloat16" else tensor
    ).numpy()
    return patterns


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _card(name: str, reader: SliceReader, adapter: AdapterConfig, proof: Proof | None) -> str:
    proven = (
        "Not compared with the live model."
        if proof is None
        else f"Loaded on the base with {loaded_with()} and compared with the live model's logits on "
        f"{len(proof.prompts)} probes: largest difference {proof.logit_max_diff:.2e} (allowed {proof.tolerance:.1e}). "
        "Details: `proof.json`."
    )
    facts = {
        "base": adapter.base,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "targets": ", ".join(adapter.targets),
        "step": reader.manifest.step,
        **{f"trained with {key}": value for key, value in reader.manifest.identity.items()},
    }
    rows = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(adapter.base)}\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\nA LoRA adapter, exported by Steadfast from checkpoint `{reader.path.name}`.\n\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n```\n\n'
        f"| | |\n|---|---|\n{rows}\n\n{proven}\n\nSizes and sha256 of all files: `manifest.json`.\n"
    )
