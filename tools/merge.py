"""Merge models of one architecture into one, or an adapter into its base.

    steadfast merge out/adapter -o out/model --method lora --base models/base        what peft calls merge_and_unload
    steadfast merge out/a out/b -o out/mean --method linear --weights 0.7 0.3        weighted average
    steadfast merge out/a out/b -o out/between --method slerp --t 0.4                on the arc between them
    steadfast merge out/a out/b -o out/both --method ties --base models/base --density 0.5 --weights 1 1

lora     base + alpha / rank x B A, of an adapter in peft's format (plain LoRA)
linear   sum of weight x tensor, divided by the sum of the weights (https://arxiv.org/abs/2203.05482)
slerp    spherical interpolation of two models, tensor by tensor (https://en.wikipedia.org/wiki/Slerp)
ties     what each model changed against the base, trimmed to the largest `density` of it, summed where the majority of
         the weight agrees on the sign, averaged, added to the base (https://arxiv.org/abs/2306.01708)

All but lora take the formulas of mergekit (extra 'merge'). Names, shapes and tokenizers must be the same; configuration
and tokenizer are those of the first model (ties: of the base). One tensor at a time is in memory, computed in fp32.
Nobody has trained the result of an average: measure it (steadfast eval).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tools.model_directory.tensors import ModelTensors

METHODS = ("lora", "linear", "slerp", "ties")
DTYPES = ("float32", "bfloat16", "float16")
INSTALL = "pip install -e '.[merge]'"
SHARD_BYTES = 5 * 10**9

MergeTensors = Callable[..., "torch.Tensor"]


@dataclass(frozen=True)
class Recipe:
    """How models are merged; what a method does not use is None or empty."""

    method: str
    weights: tuple[float, ...] = ()
    """One for each model, in their order."""
    t: float | None = None
    """0 is the first model, 1 the second."""
    density: float | None = None
    """Share of the elements of each change that is kept."""


@dataclass(frozen=True)
class MergeReport:
    """What was written."""

    out: str
    method: str
    models: list[str]
    tensors: int
    bytes: int
    seconds: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast merge`."""
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model directories with safetensors")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help="directory to make; must not exist"
    )
    parser.add_argument("--method", choices=METHODS, required=True, help="see above")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="linear, ties: one for each model (all 1)"
    )
    parser.add_argument("--t", type=float, metavar="T", help="slerp: 0 is the first model, 1 the second (0.5)")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="ties, lora: what was fine-tuned")
    parser.add_argument("--density", type=float, metavar="D", help="ties: share of each change that is kept (0.5)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the first model)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Merge and say what was written."""
    from tools.model_directory.writing import readable_bytes

    recipe = recipe_of(
        arguments.method, len(arguments.models), arguments.weights, arguments.t, arguments.density, arguments.base
    )
    if recipe.method == "lora":
        report = merge_adapter(arguments.models[0], arguments.out, arguments.base, arguments.dtype)
    else:
        report = merge_models(arguments.models, arguments.out, recipe, arguments.base, arguments.dtype)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"merged {', '.join(report.models)} by {report.method} into {report.out}: {report.tensors} tensors, "
        f"{readable_bytes(report.bytes)}, {report.seconds:.1f} s"
    )
    print(f"next: steadfast eval {report.out} beside the models it was made of")
    return 0


def recipe_of(
    method: str,
    count: int,
    weights: Sequence[float] | None = None,
    t: float | None = None,
    density: float | None = None,
    base: Path | None = None,
) -> Recipe:
    """The recipe that `count` models are merged by; UsageError for what the method cannot or must have."""
    unused: dict[str, dict[str, object]] = {
        "lora": {"--weights": weights, "--t": t, "--density": density},
        "linear": {"--t": t, "--density": density, "--base": base},
        "slerp": {"--weights": weights, "--density": density, "--base": base},
        "ties": {"--t": t},
    }
    if given := [name for name, value in unused[method].items() if value is not None]:
        raise UsageError(f"{method} does not use {given[0]}", "leave it out")
    if method == "lora":
        if count != 1:
            raise UsageError(f"lora merges one adapter, not {count}", "merge one, and the next into the result")
        return Recipe(method)
    if method == "slerp":
        if count != 2:
            raise UsageError(f"slerp merges two models, not {count}", "use linear for more")
        if not 0 <= (t := 0.5 if t is None else t) <= 1:
            raise UsageError(f"--t {t:g} is not between the models", "give a number from 0 to 1")
        return Recipe(method, t=t)
    if weights is not None and len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models", "give one for each")
    weights = tuple(weights or [1.0] * count)
    if method == "linear":
        if count < 2 or not sum(weights):
            raise UsageError("there is nothing to average", "give two models or more, and weights with a sum")
        return Recipe(method, weights)
    if base is None:
        raise UsageError("ties needs the model that the others were fine-tuned from", "give it with --base")
    if not 0 < (density := 0.5 if density is None else density) <= 1:
        raise UsageError(f"--density {density:g} keeps nothing or more than all", "give a number above 0, up to 1")
    return Recipe(method, weights, density=density)


def merge_models(
    models: Sequence[Path], out: Path, recipe: Recipe, base: Path | None = None, dtype: str | None = None
) -> MergeReport:
    """Write the merge of `models` to the new directory `out`; `base` is for ties.

    Raises UsageError when mergekit is not installed, DataError when the models do not fit together or a value is not
    finite, CannotWriteError when `out` exists or its disk is too small. After an error `out` does not exist.
    """
    from tools.model_directory.loading import check_model_directory, is_quantized, load_config, quiet_transformers
    from tools.model_directory.tensors import ModelTensors, architecture_shapes, check_inventory
    from tools.model_directory.writing import refuse_existing
    from trainer.durable import sha256_of_file

    started = time.monotonic()
    refuse_existing(out)
    merge_tensors = _merge_tensors()
    sources = [*models, *([base] if base else [])]
    for path in sources:
        check_model_directory(path)
        if is_quantized(path):
            raise DataError(f"{path} is quantized", "merge the models before, then quantize")
    quiet_transformers()
    opened = [ModelTensors(path) for path in sources]
    expected = architecture_shapes(load_config(sources[0]))
    for tensors in opened:
        check_inventory(tensors, expected)
    _same_tokenizers(sources)
    first = sources[-1] if base else sources[0]
    plan = _plan(opened[0], dtype)
    origins = [{"name": path.resolve().name, **_identity(path, sha256_of_file)} for path in sources]
    about = {"kind": "merged model", **asdict(recipe), "made_from": origins, "mergekit": _version(), "dtype": dtype}
    pieces = _Merger(opened, recipe, bool(base), {name: entry[0] for name, entry in plan.items()}, merge_tensors)
    sentence = "Merged by Steadfast with the formulas of mergekit. Nobody has trained it: measure it before use."
    _write(out, plan, pieces, about, config_of=first, tokenizer_of=first, sentence=sentence, expected=expected)
    return _report(out, recipe.method, models, plan, started)


def merge_adapter(adapter: Path, out: Path, base: Path | None = None, dtype: str | None = None) -> MergeReport:
    """Write the model that the LoRA `adapter` (a directory in peft's format) makes of its base to the directory `out`.

    `base` defaults to the one that the adapter names, `dtype` to the base's. Raises MissingInputError when one of them
    is not there, DataError for an adapter that is not plain LoRA or does not fit the base; as `merge_models` otherwise.
    """
    from tools.diff import TOKENIZER_FILES
    from tools.exporting.adapter import AdapterFile
    from tools.model_directory.loading import check_model_directory, load_config, quiet_transformers
    from tools.model_directory.tensors import ModelTensors, architecture_shapes, check_inventory
    from tools.model_directory.writing import refuse_existing
    from trainer.durable import sha256_of_file

    started = time.monotonic()
    refuse_existing(out)
    quiet_transformers()
    factors = AdapterFile(adapter)
    base = base or Path(factors.config.base)
    check_model_directory(base)
    opened, expected = ModelTensors(base), architecture_shapes(load_config(base))
    check_inventory(opened, expected)
    factors.check(opened.shapes, base)
    plan = _plan(opened, dtype)
    origins = [{"name": path.resolve().name} for path in (adapter, base)]
    origins[1] |= _identity(base, sha256_of_file)
    about = {"kind": "merged model", "method": "lora", "made_from": origins, "dtype": dtype}

    def pieces(name: str) -> Iterator[np.ndarray[Any, Any]]:
        yield _in_dtype(name, factors.merged(name, opened.whole(name)), plan[name][0])

    own_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
    sentence = f"The adapter {adapter.resolve().name}, merged by Steadfast into {base.resolve().name}."
    tokenizer_of = adapter if own_tokenizer else base
    _write(out, plan, pieces, about, config_of=base, tokenizer_of=tokenizer_of, sentence=sentence, expected=expected)
    return _report(out, "lora", [adapter], plan, started)


def _plan(tensors: ModelTensors, dtype: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is written: names, dtypes and shapes of `tensors`, floating-point ones in `dtype` if it is given."""
    from tools.model_directory.pieces import FILE_DTYPES

    changed = dict.fromkeys(FILE_DTYPES.values(), FILE_DTYPES[dtype]) if dtype else {}
    return {
        name: (changed.get(tensors.dtypes[name], tensors.dtypes[name]), shape) for name, shape in tensors.shapes.items()
    }


def _write(
    out: Path,
    plan: dict[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[np.ndarray[Any, Any]]],
    about: dict[str, Any],
    *,
    config_of: Path,
    tokenizer_of: Path,
    sentence: str,
    expected: dict[str, tuple[int, ...]],
) -> None:
    from tools.diff import TOKENIZER_FILES
    from tools.model_directory.card import model_card
    from tools.model_directory.tensors import ModelTensors, check_inventory
    from tools.model_directory.writing import (
        copy_files,
        describe,
        new_directory,
        tensor_bytes,
        write_manifest,
        write_shards,
    )
    from trainer.durable import write_file

    with new_directory(out, tensor_bytes(plan), about) as building:
        entries = write_shards(building, "model", plan, pieces, SHARD_BYTES)
        kept = [tokenizer_of / name for name in TOKENIZER_FILES] + [config_of / "generation_config.json"]
        entries |= copy_files([file for file in kept if file.is_file()], building)
        config = json.loads((config_of / "config.json").read_bytes())
        if about["dtype"]:
            config |= {"dtype": about["dtype"]}
        write_file(building / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        entries["config.json"] = describe(building / "config.json")
        check_inventory(ModelTensors(building), expected)
        names = ", ".join(origin["name"] for origin in about["made_from"])
        facts = {name: about[name] for name in ("method", "weights", "t", "density") if about.get(name)}
        card = model_card(
            out.name, sentence, {**facts, "made from": names}, "Complete and finite; not compared with anything."
        )
        write_file(building / "README.md", card)
        entries["README.md"] = describe(building / "README.md")
        write_manifest(building, entries, about)


def _report(out: Path, method: str, models: Sequence[Path], plan: dict[str, Any], started: float) -> MergeReport:
    from tools.model_directory.writing import read_manifest

    return MergeReport(
        out=str(out),
        method=method,
        models=[str(path) for path in models],
        tensors=len(plan),
        bytes=sum(entry["bytes"] for entry in read_manifest(out)["files"].values()),
        seconds=time.monotonic() - started,
    )


def _in_dtype(name: str, values: torch.Tensor, file_dtype: str) -> np.ndarray[Any, Any]:
    """Values as they are written; DataError when they are not finite. Whole numbers stay what they are."""
    from tools.model_directory.pieces import FILE_DTYPES, in_file_dtype, is_finite

    dtype = next((key for key, value in FILE_DTYPES.items() if value == file_dtype), None)
    if dtype is None:
        result: np.ndarray[Any, Any] = values.numpy()
        return result
    if not is_finite(values):
        raise DataError(f"{name} is not finite after the merge", "choose other weights")
    return in_file_dtype(name, values, dtype)


class _Merger:
    """Gives the elements of one merged tensor after the other."""

    def __init__(
        self,
        opened: Sequence[ModelTensors],
        recipe: Recipe,
        has_base: bool,
        file_dtypes: dict[str, str],
        merge_tensors: MergeTensors,
    ) -> None:
        self._opened = opened
        self._recipe = recipe
        self._base_index = len(opened) - 1 if has_base else 0 if recipe.method == "slerp" else None
        self._file_dtypes = file_dtypes
        self._merge_tensors = merge_tensors
        self._parameters: dict[str, Any] = {"t": recipe.t}
        if recipe.weights:
            self._parameters = {"weight": list(recipe.weights)}
        if recipe.density is not None:
            self._parameters["density"] = recipe.density

    def __call__(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        from tools.model_directory.pieces import FILE_DTYPES

        if self._file_dtypes[name] not in FILE_DTYPES.values():
            yield self._common(name)
            return
        # Only an average can be taken piece by piece: the others look at the whole tensor (angle, largest values).
        if self._recipe.method == "linear":
            for parts in zip(*(tensors.pieces(name) for tensors in self._opened), strict=True):
                yield self._merged(name, parts)
        else:
            yield self._merged(name, [tensors.whole(name) for tensors in self._opened])

    def _merged(self, name: str, parts: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
        import torch

        values = self._merge_tensors(
            parts,
            self._recipe.method,
            parameters=self._parameters,
            base_index=self._base_index,
            name=name,
            dtype=torch.float32,
        )
        return _in_dtype(name, values, self._file_dtypes[name])

    def _common(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor of whole numbers, which all models must share."""
        import torch

        first, *others = (tensors.whole(name) for tensors in self._opened)
        if not all(torch.equal(first, other) for other in others):
            raise DataError(f"{name} holds whole numbers and differs between the models", "merge models that share it")
        result: np.ndarray[Any, Any] = first.numpy()
        return result


def _same_tokenizers(sources: Sequence[Path]) -> None:
    from trainer.durable import sha256_of_file

    for file in ("tokenizer.json", "tokenizer.model"):
        found = {sha256_of_file(path / file) if (path / file).is_file() else "" for path in sources}
        if len(found) > 1:
            raise DataError(
                f"{file} differs between {_names(sources)}",
                "merge models of one tokenizer: a row of the embedding would mean different tokens",
            )


def _identity(path: Path, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What tells later exactly which model it was."""
    from tools.model_directory.loading import weight_files
    from tools.model_directory.writing import MANIFEST_NAME

    if (manifest := path / MANIFEST_NAME).is_file():
        return {"manifest_sha256": digest(manifest)}
    files = sorted(set(weight_files(path, "model").values()))
    return {"weights_sha256": {file.name: digest(file) for file in files}}


def _names(sources: Sequence[Path]) -> str:
    return ", ".join(path.resolve().name for path in sources)


def _merge_tensors() -> MergeTensors:
    try:
        from mergekit.merge_methods import merge_tensors
    except ModuleNotFoundError as error:
        raise UsageError(f"merging needs a package that is not installed ({error.name})", INSTALL) from error
    function: MergeTensors = merge_tensors
    return function


def _version() -> str:
    from importlib.metadata import version

    return version("mergekit")
