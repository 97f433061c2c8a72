"""Make a smaller model and say what it lost.

    steadfast quantize out/model out/int8 --scheme int8 --data heldout.jsonl

int8: every weight matrix but the head becomes one byte a weight with one scale per output channel; activations keep
their dtype. The result is loaded again and compared with the original before it gets its name: share of positions
with the same first choice, and the KL divergence of the next-token distributions. `steadfast serve`, `steadfast eval`
and tools.models.load_model read it; plain transformers refuses it (it looks for files of other names).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError, MissingInputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tools.proof import Distance

SCHEMES = ("int8",)
MAX_PROMPTS = 64
SHARD_BYTES = 5 * 10**9
# Not F16: products with unscaled int8 values leave its range.
READABLE = ("F32", "BF16")
# Used when the model brings no probes and the user no data: enough to see a broken model, not to judge a good one.
BUILT_IN_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody is surprised any more.",
    "What is 17 plus 25? The sum is 42, because 7 plus 5 is 12: write 2, carry 1.",
    "北京是中国的首都。今天天气很好，我们去公园散步吧。",
)


@dataclass(frozen=True)
class QuantizeReport:
    """What the smaller model weighs and what it lost."""

    out: str
    scheme: str
    layers: int
    """Linear layers that were quantized."""
    bytes_before: int
    """Bytes of all weight files."""
    bytes_after: int
    top1_agreement: float
    """Share of positions where both models rank the same token first."""
    mean_kl: float
    """KL(original || quantized) in nats, mean over positions."""
    max_kl: float
    positions: int
    prompts: int
    prompts_from: str
    seconds: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast quantize`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model directory with safetensors weights")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make; must not exist")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="how weights are stored")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=f"compare on this too: JSONL rows with messages or text, or a plain text file; first {MAX_PROMPTS} rows",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Quantize and print what was lost."""
    from tools.artefact import readable_bytes

    texts = read_texts(arguments.data) if arguments.data else None
    report = quantize_model(arguments.model, arguments.out, arguments.scheme, texts)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"quantized {report.layers} layers to {report.scheme} in {report.seconds:.1f} s: weights "
        f"{readable_bytes(report.bytes_before)} -> {readable_bytes(report.bytes_after)} "
        f"({report.bytes_after / report.bytes_before:.0%})"
    )
    print(
        f"against the original on {report.prompts} prompts ({report.prompts_from}), {report.positions} positions: "
        f"same first choice {report.top1_agreement:.2%}, KL mean {report.mean_kl:.2e} max {report.max_kl:.2e} nats"
    )
    if report.prompts_from == "built-in sentences":
        print("these sentences only show that the model works; --data measures it on your own")
    print(f"next: steadfast serve {report.out}")
    return 0


def quantize_model(
    model: Path, out: Path, scheme: str = "int8", texts: Sequence[str | Sequence[dict[str, Any]]] | None = None
) -> QuantizeReport:
    """Write the quantized form of the model directory `model` to the new directory `out`.

    `texts` are plain strings or conversations (lists of messages) to compare on, beside the probes in `proof.json`.
    Raises UsageError for a model that is quantized already, DataError when a weight is not finite or the result gives
    logits that are not, CannotWriteError when `out` exists or its disk is too small. After an error `out` is not there.
    """
    from tools.artefact import copy_files, describe, new_directory, tensor_bytes, write_manifest, write_weights
    from tools.int8 import quantized_layers
    from tools.models import (
        INT8_STEM,
        QUANTIZATION_NAME,
        WEIGHT_SUFFIXES,
        check_model_directory,
        is_quantized,
        load_config,
        load_model,
        load_tokenizer,
        model_on_meta,
        quiet_transformers,
        weight_files,
    )
    from tools.proof import distance
    from trainer.durable import write_file

    started = time.monotonic()
    if scheme not in SCHEMES:
        raise UsageError(f"there is no scheme '{scheme}'", f"choose {', '.join(SCHEMES)}")
    check_model_directory(model)
    if is_quantized(model):
        raise UsageError(f"{model} is quantized already", "quantize the export it was made from")
    quiet_transformers()
    files = weight_files(model, "model")
    layers = quantized_layers(model_on_meta(load_config(model)))
    absent = [name for name in layers if f"{name}.weight" not in files]
    if absent:
        raise DataError(f"{model} has no weight {absent[0]}.weight", "give a complete model in the transformers layout")
    if not layers:
        raise DataError(f"{model} has no linear layers that {scheme} covers", "serve it as it is")
    plan = _plan(files, {f"{name}.weight" for name in layers})
    prompts, prompts_from = _prompts(model, load_tokenizer(model), texts)
    with new_directory(out, tensor_bytes(plan)) as building:
        entries = write_weights(building, INT8_STEM, plan, _Reader(files, plan), SHARD_BYTES)
        skipped = (*WEIGHT_SUFFIXES, "manifest.json", "proof.json", "README.md")
        small_files = [path for path in sorted(model.iterdir()) if path.is_file() and not path.name.endswith(skipped)]
        entries |= copy_files(small_files, building)
        about: dict[str, Any] = {"scheme": scheme, "layers": layers, "scales": "per output channel, symmetric"}
        write_file(building / QUANTIZATION_NAME, json.dumps(about, indent=1) + "\n")
        # Done only when it was loaded from disk and has answered; a broken file fails here and never gets its name.
        lost = distance(load_model(model)[0], load_model(building)[0], prompts)
        about["compared_with_original"] = asdict(lost) | {"prompts": len(prompts), "prompts_from": prompts_from}
        write_file(building / QUANTIZATION_NAME, json.dumps(about, indent=1) + "\n")
        entries[QUANTIZATION_NAME] = describe(building / QUANTIZATION_NAME)
        write_file(building / "README.md", _model_card(out.name, model, lost, prompts_from))
        entries["README.md"] = describe(building / "README.md")
        write_manifest(building, entries, {"kind": "quantized model", "scheme": scheme, "made_from": _origin(model)})
    before = sum(path.stat().st_size for path in set(files.values()))
    after = sum(entry.bytes for name, entry in entries.items() if name.endswith(".safetensors"))
    return QuantizeReport(
        out=str(out),
        scheme=scheme,
        layers=len(layers),
        bytes_before=before,
        bytes_after=after,
        top1_agreement=lost.top1_agreement,
        mean_kl=lost.mean_kl,
        max_kl=lost.max_kl,
        positions=lost.positions,
        prompts=len(prompts),
        prompts_from=prompts_from,
        seconds=time.monotonic() - started,
    )


def read_texts(path: Path) -> list[str | list[dict[str, Any]]]:
    """What to compare on: the `messages` or `text` of the rows of a .jsonl file, the paragraphs of any other."""
    from tools.chat import read_rows

    texts: list[str | list[dict[str, Any]]] = []
    if path.suffix != ".jsonl":
        if not path.is_file():
            raise MissingInputError(f"{path} is not a file", "give a .jsonl or a plain text file")
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8", "convert it, e.g. with iconv") from error
        paragraphs = [part.strip() for part in content.split("\n\n")]
        texts += [part for part in paragraphs if part][:MAX_PROMPTS]
        return texts
    for number, row in enumerate(read_rows(path, MAX_PROMPTS), 1):
        if isinstance(row.get("messages"), list):
            texts.append(row["messages"])
        elif isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            raise DataError(f"{path}, row {number}: neither messages nor text", "give one of both in every row")
    return texts


def _plan(files: dict[str, Path], quantized: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            piece = file.get_slice(name)
            shape = tuple(piece.get_shape())
            dtype = str(piece.get_dtype())
        if name not in quantized:
            plan[name] = (dtype, shape)
            continue
        if dtype not in READABLE or len(shape) != 2:
            raise DataError(f"{path}: {name} is {dtype} with shape {shape}", "give a model in float32 or bfloat16")
        plan[name] = ("I8", shape)
        plan[f"{name}_scale"] = ("F32", (shape[0],))
    return plan


class _Reader:
    """Gives the tensors of the new file in order; keeps the scales of the matrix just given, nothing else."""

    def __init__(self, files: dict[str, Path], plan: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self._files = files
        self._plan = plan
        self._scale: torch.Tensor | None = None

    def __call__(self, name: str) -> np.ndarray[Any, Any]:
        import torch
        from safetensors import safe_open

        from tools.int8 import quantize_rows

        if name not in self._files and self._scale is not None:
            scale: np.ndarray[Any, Any] = self._scale.numpy()
            return scale
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"{self._files[name]}: {name} holds values that are not finite", "export an earlier step")
        if self._plan[name][0] == "I8" and tensor.is_floating_point():
            tensor, self._scale = quantize_rows(tensor)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        result: np.ndarray[Any, Any] = tensor.contiguous().numpy()
        return result


def _prompts(
    model: Path, tokenizer: Any, texts: Sequence[str | Sequence[dict[str, Any]]] | None
) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and where they come from."""
    from tools.chat import Prompts

    prompts: list[list[int]] = []
    origins = []
    proof = model / "proof.json"
    if proof.is_file():
        try:
            prompts += [[int(token) for token in row] for row in json.loads(proof.read_bytes())["prompts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{proof} is not readable", "export the model again") from error
        origins.append("its probes")
    for text in texts or ():
        if isinstance(text, str):
            prompts.append(tokenizer.encode(text))
            continue
        prompts.append(list(tokenizer(Prompts(tokenizer).text(text), add_special_tokens=False)["input_ids"]))
    if texts:
        origins.append("your data")
    if not prompts:
        return [tokenizer.encode(text) for text in BUILT_IN_TEXTS], "built-in sentences"
    return prompts, " and ".join(origins)


def _origin(model: Path) -> dict[str, Any]:
    """Name of the original and the provenance its manifest tells."""
    origin: dict[str, Any] = {"name": model.resolve().name}
    manifest = model / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_bytes())
        origin |= {key: content[key] for key in ("step", "checkpoint", "provenance") if key in content}
        origin["weights"] = {name: entry for name, entry in content["files"].items() if name.endswith(".safetensors")}
    return origin


def _model_card(name: str, model: Path, lost: Distance, prompts_from: str) -> str:
    return (
        f"# {name}\n\nint8 weights of `{model.resolve().name}`, made by `steadfast quantize`: one byte a weight, one "
        "scale per output channel; embeddings and head as they were. Read it with `steadfast serve`, `steadfast eval` "
        "or `tools.models.load_model`; plain transformers finds no weights under its own names and says so.\n\n"
        f"Against the original ({prompts_from}, {lost.positions} positions): same first choice at "
        f"{lost.top1_agreement:.2%}, KL mean {lost.mean_kl:.2e}, max {lost.max_kl:.2e} nats.\n"
    )
