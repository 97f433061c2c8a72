"""Turn a checkpoint into a safetensors model that plain transformers loads, and prove that it is the same model.

    steadfast export runs/NAME out/model --verify
    steadfast export runs/NAME/checkpoints/step-00000100 out/model --dtype bfloat16

A run directory stands for its newest valid checkpoint. Weights are read slice by slice and written one tensor at a
time. OUT appears only when everything in it is complete; with --verify only when the reloaded model gives the logits
that the live model gave when the checkpoint was saved.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError, DataError, MissingInputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from tools.adapter import MergedWeights
    from tools.proof import Proof
    from trainer.checkpoint.slices import SliceReader

    Weights = SliceReader | MergedWeights

MODEL_STEM = "model"
DEFAULT_SHARD_BYTES = 5 * 10**9
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how close it is to the live model."""

    out: str
    checkpoint: str
    step: int
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    """Size of all files in `out`."""
    seconds: float
    logit_max_diff: float | None
    """Largest absolute difference to the stored logits of the live model; None without verification."""
    top1_agreement: float | None
    """Share of probe positions where both models rank the same token first."""
    tolerance: float | None
    lora: str | None = None
    """How the adapter of a LoRA run was exported: merged or apart."""


@dataclass(frozen=True)
class _Plan:
    """What will be written: stored tensor name to (safetensors dtype, shape), in model order."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    buffers: frozenset[str]
    architecture: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast export`."""
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="run directory or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--dtype", choices=list(FILE_DTYPES), help="dtype of the weights (default: as trained)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file")
    parser.add_argument(
        "--lora",
        choices=["merged", "apart"],
        default="merged",
        help="of a LoRA run: a whole model (default), or the adapter in peft's format",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model of a LoRA run (default: where it was)")
    parser.add_argument("--verify", action="store_true", help="reload OUT and compare logits with the live model's")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print what came of it."""
    from tools.artefact import parse_size, readable_bytes

    report = export_checkpoint(
        arguments.source,
        arguments.out,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        verify=arguments.verify,
        lora=arguments.lora,
        base=arguments.base,
    )
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"exported step {report.step} to {report.out}: {report.tensors} tensors, {report.parameters:,} parameters, "
        f"{report.dtype}, {readable_bytes(report.bytes)}, {report.seconds:.1f} s"
    )
    if report.logit_max_diff is None:
        print("not verified; --verify compares the logits with the live model's")
    else:
        print(
            f"verified with transformers: largest logit difference {report.logit_max_diff:.2e} "
            f"(allowed {report.tolerance:.1e}), same first choice at {report.top1_agreement:.1%} of the probe positions"
        )
    if report.lora == "apart":
        print("next: load it with peft, transformers or vLLM; --lora merged makes a model for steadfast serve")
    else:
        print(f"next: steadfast serve {report.out}")
    return 0


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = True,
    lora: str = "merged",
    base: Path | None = None,
) -> ExportReport:
    """Write the model of `source` (a run or a checkpoint) to the new directory `out`.

    `dtype` is float32 or bfloat16, by default the dtype the model was trained in. Of a LoRA run `lora` says whether the
    adapter is merged into `base` (default: the directory it was trained with) or written apart.

    Raises CheckpointError when the checkpoint is damaged, lacks a tensor of its architecture or fails the verification,
    DataError when a weight is not finite or the base is another one, MissingInputError when the base is not there,
    CannotWriteError when `out` exists or its disk is too small. After an error `out` does not exist.
    """
    from tools.adapter import MergedWeights, write_adapter
    from tools.artefact import (
        copy_files,
        describe,
        new_directory,
        refuse_existing,
        tensor_bytes,
        write_manifest,
        write_weights,
    )
    from tools.models import load_config, quiet_transformers
    from tools.proof import compare_with_probe
    from trainer.adapter_file import CONFIG_NAME, read_adapter_config
    from trainer.checkpoint.slices import SliceReader
    from trainer.checkpoint.verify import find_checkpoint
    from trainer.durable import write_file

    started = time.monotonic()
    refuse_existing(out)
    if not source.exists():
        raise MissingInputError(f"{source} does not exist", "give a run directory or one of its checkpoints")
    quiet_transformers()
    checkpoint = find_checkpoint(source)
    saved = SliceReader(checkpoint)
    manifest = saved.manifest
    trained_dtype = _trained_dtype(saved)
    dtype = dtype or trained_dtype
    if dtype not in FILE_DTYPES:
        raise UsageError(f"dtype {dtype} cannot be exported", f"choose {' or '.join(FILE_DTYPES)}")
    adapter = read_adapter_config(checkpoint / "model")
    if lora == "apart":
        sizes, proof = write_adapter(
            checkpoint, out, dtype=dtype, trained_dtype=trained_dtype, base=base, verify=verify
        )
        return _report(out, checkpoint, manifest.step, dtype, sizes, started, proof, "apart")
    reader: Weights = saved if adapter is None else MergedWeights(saved, adapter, base)
    plan = _plan(reader, load_config(checkpoint / "model"), dtype)
    with new_directory(out, tensor_bytes(plan.tensors)) as building:
        entries = write_weights(
            building, MODEL_STEM, plan.tensors, lambda name: _read(reader, plan, name, dtype), max_shard_bytes
        )
        own = ("config.json", CONFIG_NAME)
        model_files = sorted(path for path in (checkpoint / "model").iterdir() if path.name not in own)
        entries |= copy_files(model_files, building)
        config = json.loads((checkpoint / "model" / "config.json").read_bytes())
        config.pop("torch_dtype", None)  # the older name of `dtype`; both together contradict each other
        config |= {"dtype": dtype, "architectures": [plan.architecture]}
        write_file(building / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        entries["config.json"] = describe(building / "config.json")
        proof = None
        if verify:
            proof = compare_with_probe(building, checkpoint, dtype=dtype, trained_dtype=trained_dtype)
            if not proof.passed:
                raise CheckpointError(
                    f"the exported model is not the live one: logits differ by up to {proof.logit_max_diff:.3g} "
                    f"where {proof.tolerance:.1g} is allowed (checkpoint {checkpoint})",
                    "nothing was exported; try an earlier checkpoint, and report this",
                )
            write_file(building / "proof.json", json.dumps(asdict(proof), indent=1) + "\n")
            entries["proof.json"] = describe(building / "proof.json")
        write_file(building / "README.md", _model_card(out.name, reader, plan, dtype, proof))
        entries["README.md"] = describe(building / "README.md")
        about = {
            "kind": "model",
            "step": manifest.step,
            "dtype": dtype,
            "checkpoint": checkpoint.name,
            "identity": manifest.identity,
            "provenance": manifest.provenance,
        }
        write_manifest(building, entries, about)
        total_bytes = sum(path.stat().st_size for path in building.iterdir())
    sizes = {"tensors": len(plan.tensors), "parameters": _parameter_count(reader, plan), "bytes": total_bytes}
    return _report(out, checkpoint, manifest.step, dtype, sizes, started, proof, None if adapter is None else "merged")


def _report(
    out: Path,
    checkpoint: Path,
    step: int,
    dtype: str,
    sizes: dict[str, int],
    started: float,
    proof: Proof | None,
    lora: str | None,
) -> ExportReport:
    return ExportReport(
        out=str(out),
        checkpoint=str(checkpoint),
        step=step,
        dtype=dtype,
        **sizes,
        seconds=time.monotonic() - started,
        logit_max_diff=proof.logit_max_diff if proof else None,
        top1_agreement=proof.top1_agreement if proof else None,
        tolerance=proof.tolerance if proof else None,
        lora=lora,
    )


def _trained_dtype(reader: Weights) -> str:
    """The dtype most of the weights had in the live model (some models keep a few in fp32)."""
    import math

    counts: dict[str, int] = {}
    for entry in reader.manifest.parameters.values():
        name = str(entry["dtype"]).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + math.prod(entry["shape"])
    return max(counts, key=lambda name: counts[name], default="float32")


def _plan(reader: Weights, config: Any, dtype: str) -> _Plan:
    """Compare the checkpoint with the architecture of its configuration, name by name and shape by shape."""
    from tools.models import model_on_meta

    model = model_on_meta(config)
    # named_parameters and named_buffers yield a shared tensor once, under its first name.
    persistent = set(model.state_dict())
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    expected_buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    stored = dict(reader.parameters)
    for alias in sorted(set(stored) - set(expected)):
        if alias in persistent and alias not in expected_buffers:
            _drop_alias(reader, stored, alias, _owner(model, alias))
    _same_names("weight", expected, stored, reader)
    for name, shape in expected.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"checkpoint {reader.path}: {name} has shape {stored[name]}, the architecture wants {shape}",
                "the checkpoint's model/config.json is not the one it was trained with",
            )
    _same_names("buffer", expected_buffers, dict(reader.manifest.buffers), reader)
    file_dtype = FILE_DTYPES[dtype]
    tensors = {name: (file_dtype, shape) for name, shape in stored.items()}
    for name, tensor in expected_buffers.items():
        kind = file_dtype if tensor.is_floating_point() else _integer_dtype(reader, name)
        tensors[name] = (kind, tuple(tensor.shape))
    return _Plan(tensors, frozenset(expected_buffers), type(model).__name__)


def _same_names(what: str, expected: dict[str, Any], stored: dict[str, Any], reader: Weights) -> None:
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    for problem, names in (("lacks", missing), ("holds the unknown", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"checkpoint {reader.path} {problem} {what} {names[0]}{more}",
                "the checkpoint's model/config.json is not the one it was trained with",
            )


def _owner(model: Any, alias: str) -> str:
    """The first name of the parameter that `alias` also names."""
    tensor = dict(model.named_parameters(remove_duplicate=False))[alias]
    return next(str(name) for name, candidate in model.named_parameters() if candidate is tensor)


def _drop_alias(reader: Weights, stored: dict[str, tuple[int, ...]], alias: str, owner: str) -> None:
    """Leave out `alias`, which the configuration ties to `owner`, if both are stored and equal bit by bit."""
    if owner not in stored:
        stored[owner] = stored.pop(alias)
        return
    if stored[alias] != stored[owner] or (
        reader.read("master", alias).tobytes() != reader.read("master", owner).tobytes()
    ):
        raise CheckpointError(
            f"checkpoint {reader.path}: {alias} and {owner} differ, but the configuration ties them",
            "set tie_word_embeddings to false in the checkpoint's model/config.json",
        )
    del stored[alias]


def _integer_dtype(reader: Weights, name: str) -> str:
    from trainer.tensor_file import DTYPE_NAMES

    return str(DTYPE_NAMES[reader.buffer(name).dtype])


def _read(reader: Weights, plan: _Plan, name: str, dtype: str) -> np.ndarray[Any, Any]:
    """One tensor in the dtype of the file; bfloat16 as 16-bit patterns. DataError when a value is not finite."""
    import numpy
    import torch

    values = reader.buffer(name) if name in plan.buffers else reader.read("master", name)
    if not numpy.issubdtype(values.dtype, numpy.floating):
        return values
    tensor = torch.from_numpy(numpy.array(values, dtype=numpy.float32, copy=name in plan.buffers))
    if dtype == "bfloat16":
        tensor = tensor.to(torch.bfloat16)
    if not torch.isfinite(tensor).all():
        raise DataError(
            f"checkpoint {reader.path}: {name} holds values that are not finite", "export an earlier checkpoint"
        )
    patterns = tensor.view(torch.int16) if dtype == "bfloat16" else tensor
    result: np.ndarray[Any, Any] = patterns.numpy()
    return result


def _parameter_count(reader: Weights, plan: _Plan) -> int:
    import math

    return sum(math.prod(shape) for name, (_, shape) in plan.tensors.items() if name not in plan.buffers)


def _model_card(name: str, reader: Weights, plan: _Plan, dtype: str, proof: Proof | None) -> str:
    manifest = reader.manifest
    facts = {
        "architecture": plan.architecture,
        "parameters": f"{_parameter_count(reader, plan):,}",
        "dtype": dtype,
        "step": manifest.step,
        **manifest.provenance,
        **{f"trained with {key}": value for key, value in manifest.identity.items()},
    }
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    proven = (
        "Not compared with the live model."
        if proof is None
        else f"Reloaded with transformers and compared with the live model's logits on {len(proof.prompts)} probes: "
        f"largest difference {proof.logit_max_diff:.2e} (allowed {proof.tolerance:.1e}), same first choice at "
        f"{proof.top1_agreement:.1%} of the positions. Details: `proof.json`."
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"Exported by Steadfast from checkpoint `{reader.path.name}`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"| | |\n|---|---|\n{rows}\n\n{proven}\n\nSizes and sha256 of all files: `manifest.json`.\n"
    )


def _cell(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
