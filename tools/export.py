"""Turn a checkpoint into a safetensors model that plain transformers loads, and prove that it is the same model.

    steadfast export runs/NAME out/model
    steadfast export runs/NAME/checkpoints/step-00000100 out/model --dtype bfloat16 --max-shard-size 2GB
    steadfast export runs/NAME out/model --sign key.pem --push s3://bucket/model
    steadfast export runs/LORA out/adapter --lora apart

A run directory stands for its newest valid checkpoint. Weights are read and written in pieces of a few megabytes, so
memory does not depend on the model; a killed export goes on with the next shard when the same command is given again.
OUT appears only when every byte of the checkpoint is as it was committed, and a fresh process has loaded the result
with plain transformers, found every tensor equal to the checkpoint's, and got the logits that the live model gave when
the checkpoint was saved (that process holds the whole model in fp32). If not: exit code 1, and nothing at OUT.
A LoRA run is merged into its base, or written apart as an adapter in peft's format, proved on that base.
--no-verify leaves all that out: names, shapes, sizes and finite values are checked, and the model card says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import add_trust_argument
from trainer.errors import MissingInputError

if TYPE_CHECKING:
    from tools.exporting.checkpoint_tensors import CheckpointTensors
    from tools.exporting.proof import Claim, Proof
    from tools.model_directory.writing import Entry
    from trainer.adapter_file import AdapterConfig

MODEL_STEM = "model"
DEFAULT_SHARD_BYTES = 5 * 10**9
DTYPES = ("float32", "bfloat16", "float16")
TRAINING_CONFIG = "training-config.yaml"


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


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast export`."""
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="run directory or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as trained)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file")
    parser.add_argument(
        "--lora",
        choices=["merged", "apart"],
        default="merged",
        help="of a LoRA run: a whole model (default), or the adapter in peft's format",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="base model of a LoRA run (default: where it was)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check the checkpoint and prove that OUT is the model that was trained",
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign OUT with a PEM key (extra 'sign')")
    parser.add_argument("--push", metavar="URL", help="copy OUT there too, its manifest last (any fsspec URL)")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print what came of it."""
    from tools.model_directory.writing import parse_size, readable_bytes
    from tools.push import push
    from trainer.remote import open_destination

    if arguments.push:
        open_destination(arguments.push, "--push")
    report = export_checkpoint(
        arguments.source,
        arguments.out,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size),
        verify=arguments.verify,
        sign_with=arguments.sign,
        trusted_code=arguments.trust_remote_code,
        lora=arguments.lora,
        base=arguments.base,
    )
    if arguments.push:
        push(arguments.out, arguments.push)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"exported step {report.step} to {report.out}: {report.tensors} tensors, {report.parameters:,} parameters, "
        f"{report.dtype}, {readable_bytes(report.bytes)}, {report.seconds:.1f} s"
    )
    if report.logit_max_diff is None:
        print("not verified: neither the checkpoint's bytes nor the logits were checked")
    else:
        print(
            f"verified in a fresh process: {report.tensors} tensors equal to the checkpoint's; the "
            f"largest logit difference is {report.logit_max_diff:.2e} (allowed {report.tolerance:.1e}), same first "
            f"choice at {report.top1_agreement:.1%} of the probe positions"
        )
    if arguments.push:
        print(f"copied to {arguments.push}")
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
    sign_with: Path | None = None,
    trusted_code: str | None = None,
    lora: str = "merged",
    base: Path | None = None,
    prove: Callable[[Claim], Proof] | None = None,
) -> ExportReport:
    """Write the model of `source` (a run or a checkpoint) to the new directory `out`.

    `dtype` is float32, bfloat16 or float16, by default the dtype the model was trained in. With `verify` every byte of
    the checkpoint is checked and `prove` examines the result, by default in a process of its own. `trusted_code` is the
    revision of the model's own code that may run (`trainer.model.remote_code`). Of a LoRA run `lora` says whether the
    adapter is merged into `base` (default: the directory it was trained with) or written apart.

    Raises CheckpointError when the checkpoint is damaged or lacks a tensor of its architecture, NotEqualError when the
    verification fails, DataError when a weight is not finite or the base is another one, MissingInputError when the
    base is not there, CannotWriteError when `out` exists or its disk is too small, RunLockedError when another process
    writes it. After an error `out` does not exist.
    """
    from tools.model_directory.loading import quiet_transformers
    from tools.model_directory.signing import require_key, require_signing, sign
    from tools.model_directory.writing import new_directory, refuse_existing, tensor_bytes, write_manifest

    started = time.monotonic()
    refuse_existing(out)
    if sign_with is not None:
        require_signing()
        require_key(sign_with)
    if not source.exists():
        raise MissingInputError(f"{source} does not exist", "give a run directory or one of its checkpoints")
    quiet_transformers()
    opened = _open(source, dtype, verify=verify, trusted_code=trusted_code, apart=lora == "apart", base=base)
    tensors, manifest = opened.tensors, opened.tensors.reader.manifest
    recipe = {
        "checkpoint": opened.manifest_sha256,
        "dtype": tensors.dtype,
        "max_shard_bytes": max_shard_bytes,
        "lora": lora,
    }
    with new_directory(out, tensor_bytes(tensors.plan), recipe) as building:
        entries = _write_model(building, opened, max_shard_bytes)
        proof = None
        if verify:
            proof = _prove(building, opened, entries, trusted_code, prove)
            _add(building, entries, "proof.json", json.dumps(asdict(proof), indent=1) + "\n")
        _add(building, entries, "README.md", _card(out.name, opened, proof))
        about = {
            "kind": "adapter" if opened.apart else "model",
            "step": manifest.step,
            "dtype": tensors.dtype,
            "checkpoint": opened.checkpoint.name,
            "checkpoint_manifest_sha256": opened.manifest_sha256,
            "identity": manifest.identity,
            "provenance": manifest.provenance,
        }
        write_manifest(building, entries, about)
        if sign_with is not None:
            sign(building, sign_with)
        total_bytes = sum(path.stat().st_size for path in building.iterdir())
    return ExportReport(
        out=str(out),
        checkpoint=str(opened.checkpoint),
        step=manifest.step,
        dtype=tensors.dtype,
        tensors=len(tensors.plan),
        parameters=tensors.parameters,
        bytes=total_bytes,
        seconds=time.monotonic() - started,
        logit_max_diff=proof.logit_max_diff if proof else None,
        top1_agreement=proof.top1_agreement if proof else None,
        tolerance=proof.tolerance if proof else None,
        lora=None if opened.adapter is None else lora,
    )


@dataclass(frozen=True)
class _Opened:
    """A verified checkpoint, ready to be written as a whole model, or `apart` as the adapter alone."""

    checkpoint: Path
    manifest_sha256: str
    tensors: CheckpointTensors
    adapter: AdapterConfig | None
    base: Path | None
    apart: bool


def _open(
    source: Path, dtype: str | None, *, verify: bool, trusted_code: str | None, apart: bool, base: Path | None
) -> _Opened:
    from tools.exporting.adapter import find_base
    from tools.exporting.checkpoint_tensors import open_adapter, open_checkpoint
    from trainer.adapter_file import read_adapter_config
    from trainer.checkpoint.verify import MANIFEST_NAME, find_checkpoint, inspect_checkpoint, verify_checkpoint
    from trainer.model.remote_code import trust_remote_code

    checkpoint = find_checkpoint(source, verify_checkpoint if verify else inspect_checkpoint)
    trust_remote_code(checkpoint / "model", trusted_code)
    adapter = read_adapter_config(checkpoint / "model")
    if adapter is not None:
        if verify or not apart:
            base = find_base(checkpoint, adapter, base)
        if base is not None:
            adapter = replace(adapter, base=str(base.absolute()))
    tensors = open_adapter(checkpoint, dtype) if apart else open_checkpoint(checkpoint, dtype, base)
    digest = hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest()
    return _Opened(checkpoint, digest, tensors, adapter, base, apart)


def _write_model(building: Path, opened: _Opened, max_shard_bytes: int) -> dict[str, Entry]:
    """Everything that loads and explains the model; name to size and hash of each file."""
    from tools.model_directory.writing import copy_files, tensor_bytes, write_shards
    from trainer.adapter_file import CONFIG_NAME, STEM

    checkpoint, tensors = opened.checkpoint, opened.tensors
    if opened.apart and opened.adapter is not None:
        # peft reads one file of weights; any configuration of a model would make it look like a whole one.
        entries = write_shards(building, STEM, tensors.plan, tensors.pieces, tensor_bytes(tensors.plan))
        left_out = {"config.json", "generation_config.json"}
        _add(building, entries, CONFIG_NAME, json.dumps(opened.adapter.as_json(), indent=2) + "\n")
    else:
        entries = write_shards(building, MODEL_STEM, tensors.plan, tensors.pieces, max_shard_bytes)
        left_out = {CONFIG_NAME}
        _add(building, entries, "config.json", _model_config(checkpoint, tensors))
    files = sorted(path for path in (checkpoint / "model").iterdir() if path.name not in left_out | set(entries))
    entries |= copy_files(files, building)
    # checkpoints/step-... of a run: its configuration lies above. A checkpoint that was moved has none.
    training_config = checkpoint.absolute().parent.parent / "config.yaml"
    if training_config.is_file():
        _add(building, entries, TRAINING_CONFIG, training_config.read_bytes())
    return entries


def _add(building: Path, entries: dict[str, Entry], name: str, content: str | bytes) -> None:
    from tools.model_directory.writing import describe
    from trainer.durable import write_file

    write_file(building / name, content)
    entries[name] = describe(building / name)


def _prove(
    building: Path,
    opened: _Opened,
    entries: dict[str, Entry],
    trusted_code: str | None,
    prove: Callable[[Claim], Proof] | None,
) -> Proof:
    from tools.exporting import proof

    claim = proof.Claim(
        str(building),
        str(opened.checkpoint.absolute()),
        opened.tensors.dtype,
        dict(entries),
        trusted_code=trusted_code,
        base=None if opened.base is None else str(opened.base.absolute()),
        apart=opened.apart,
    )
    return (prove or proof.prove)(claim)


def _model_config(checkpoint: Path, tensors: CheckpointTensors) -> str:
    config = json.loads((checkpoint / "model" / "config.json").read_bytes())
    config.pop("torch_dtype", None)  # the older name of `dtype`; both together contradict each other
    config |= {"dtype": tensors.dtype, "architectures": [tensors.architecture]}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _card(name: str, opened: _Opened, proof: Proof | None) -> str:
    from tools.model_directory.card import adapter_card, model_card

    tensors, adapter, manifest = opened.tensors, opened.adapter, opened.tensors.reader.manifest
    facts: dict[str, Any] = {
        "architecture": tensors.architecture,
        "parameters": f"{tensors.parameters:,}",
        "dtype": tensors.dtype,
        "step": manifest.step,
        **manifest.provenance,
        **{f"trained with {key}": value for key, value in manifest.identity.items()},
    }
    if adapter is not None:
        facts |= {"LoRA base": adapter.base, "LoRA rank": adapter.rank, "LoRA alpha": adapter.alpha}
    proven = (
        "Not verified: exported with --no-verify."
        if proof is None
        else f"Reloaded by a fresh process: {proof.tensors} tensors equal to the checkpoint's, and with "
        f"{proof.loaded_with} the live model's logits on {len(proof.prompts)} probes: largest difference "
        f"{proof.logit_max_diff:.2e} (allowed {proof.tolerance:.1e}), same first choice at {proof.top1_agreement:.1%} "
        "of the positions. Details: `proof.json`."
    )
    source = f"from checkpoint `{opened.checkpoint.name}` by Steadfast."
    if opened.apart and adapter is not None:
        return adapter_card(name, f"A LoRA adapter, exported {source}", facts, proven, base=adapter.base)
    return model_card(name, f"Exported {source}", facts, proven)
