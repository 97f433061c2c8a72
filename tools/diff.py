"""How two model directories differ: every tensor, the configuration, the tokenizer.

    steadfast diff out/before out/after
    steadfast diff out/float32 out/bfloat16 --json

Reads both piece by piece, so models of any size can be compared. Values of different dtypes are compared as numbers.
Exit codes: 0 the same model, 1 not the same. Model cards, manifests and proofs are not compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    from tools.model_directory.tensors import ModelTensors

SHOWN = 20
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both."""

    name: str
    what: str
    """`values`, `dtype`, `shape`, `only in A`, `only in B` or `not finite`."""
    max: float | None = None
    """Largest absolute difference; None where none can be told."""
    mean: float | None = None
    """Mean absolute difference."""
    changed: float | None = None
    """Share of elements that differ."""


@dataclass(frozen=True)
class Difference:
    """All differences of two models; equal models have none."""

    equal: bool
    tensors: int
    """Tensors that both have."""
    different: list[TensorDifference]
    settings: list[str]
    """`file: key: value in A -> value in B`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast diff`."""
    parser.add_argument("a", type=Path, metavar="MODEL_A", help="model directory with safetensors weights")
    parser.add_argument("b", type=Path, metavar="MODEL_B", help="another one")
    parser.add_argument("--all", action="store_true", help=f"show every tensor that differs, not only the {SHOWN} most")
    parser.add_argument("--json", action="store_true", help="print all differences as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, and say by the exit code whether they are equal."""
    found = difference(arguments.a, arguments.b)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0 if found.equal else 1
    for line in found.settings:
        print(line)
    ranked = sorted(found.different, key=lambda each: -math.inf if each.max is None else -each.max)
    shown = ranked if arguments.all else ranked[:SHOWN]
    width = max((len(each.name) for each in shown), default=0)
    for each in shown:
        numbers = ""
        if each.max is not None and each.mean is not None and each.changed is not None:
            numbers = f"  max {each.max:.3e}  mean {each.mean:.3e}  {each.changed:.1%} of the elements"
        print(f"{each.name:<{width}}  {each.what}{numbers}")
    if len(shown) < len(ranked):
        print(f"... and {len(ranked) - len(shown)} more (--all shows them)")
    same = found.tensors - sum(each.what not in ("only in A", "only in B") for each in found.different)
    verdict = "the same model" if found.equal else "not the same"
    print(f"{verdict}: {same} of {found.tensors} common tensors are equal, {len(found.settings)} settings differ")
    return 0 if found.equal else 1


def difference(a: Path, b: Path) -> Difference:
    """Compare two model directories.

    Raises MissingInputError when one is none, UsageError when one is quantized, DataError when one cannot be read.
    """
    from tools.model_directory.loading import check_model_directory, is_quantized
    from tools.model_directory.tensors import ModelTensors

    for path in (a, b):
        check_model_directory(path)
        if is_quantized(path):
            raise UsageError(f"{path} is quantized", "compare the models it was made from, or use steadfast eval")
    first, second = ModelTensors(a), ModelTensors(b)
    common = [name for name in first.shapes if name in second.shapes]
    different = [TensorDifference(name, "only in A") for name in first.shapes if name not in second.shapes]
    different += [TensorDifference(name, "only in B") for name in second.shapes if name not in first.shapes]
    different += [found for name in common if (found := _tensor_difference(first, second, name))]
    settings = [*_config_differences(a, b), *_tokenizer_differences(a, b)]
    return Difference(not different and not settings, len(common), different, settings)


def _tensor_difference(first: ModelTensors, second: ModelTensors, name: str) -> TensorDifference | None:
    import torch

    if first.shapes[name] != second.shapes[name]:
        return TensorDifference(name, f"shape {first.shapes[name]} -> {second.shapes[name]}")
    largest = total = 0.0
    changed = 0
    for one, other in zip(first.pieces(name), second.pieces(name), strict=True):
        if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            continue
        gap = (one.double() - other.double()).abs()
        if not math.isfinite(top := float(gap.max())):
            return TensorDifference(name, "not finite")
        largest = max(largest, top)
        total += float(gap.sum())
        changed += int(gap.count_nonzero())
    elements = max(1, math.prod(first.shapes[name]))
    numbers = (largest, total / elements, changed / elements)
    if first.dtypes[name] != second.dtypes[name]:
        return TensorDifference(name, f"dtype {first.dtypes[name]} -> {second.dtypes[name]}", *numbers)
    return TensorDifference(name, "values", *numbers) if changed else None


def _config_differences(a: Path, b: Path) -> Iterator[str]:
    for file in CONFIG_FILES:
        one, other = (_settings(path / file) for path in (a, b))
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                yield f"{file}: {key}: {_value(one, key)} -> {_value(other, key)}"


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return dict(found)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not readable", "restore it from its source") from error


def _value(settings: dict[str, Any], key: str) -> str:
    text = json.dumps(settings[key], ensure_ascii=False) if key in settings else "absent"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tokenizer_differences(a: Path, b: Path) -> Iterator[str]:
    """By the bytes of their files: equal files give equal ids; different ones need a look."""
    from trainer.durable import sha256_of_file

    for file in TOKENIZER_FILES:
        one, other = a / file, b / file
        if one.is_file() != other.is_file():
            yield f"{file}: only in {'A' if one.is_file() else 'B'}"
        elif one.is_file() and sha256_of_file(one) != sha256_of_file(other):
            yield f"{file}: the contents differ"
