"""Loading what this room writes: a plain export, or our int8 artefact, with its tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.model_directory.writing import check_sizes
from trainer.adapter_file import CONFIG_NAME
from trainer.errors import DataError, MissingInputError, SteadfastError
from trainer.names import is_plain_name

if TYPE_CHECKING:
    import torch

QUANTIZATION_NAME = "quantization.json"
INT8_STEM = "model-int8"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def check_model_directory(path: Path) -> None:
    """MissingInputError or DataError when `path` cannot be a model directory; looks at names and sizes only."""
    if not path.is_dir():
        raise MissingInputError(f"{path} is not a directory", "give a model directory, e.g. an export")
    if not (path / "config.json").is_file():
        hint = "steadfast export makes a model of a run" if (path / "checkpoints").is_dir() else "is it a model?"
        if (path / CONFIG_NAME).is_file():
            hint = "it is an adapter: steadfast export --lora merged makes a whole model"
        raise MissingInputError(f"{path} has no config.json", hint)
    check_sizes(path)


def is_quantized(path: Path) -> bool:
    """Whether `path` is an artefact of `steadfast quantize`."""
    return (path / QUANTIZATION_NAME).is_file()


def load_model(path: Path, *, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """The model in `path` ready for inference, and its tokenizer.

    `dtype` defaults to the artefact's own on an accelerator and to float32 on a CPU, where bfloat16 products are many
    times slower. `device` defaults to cuda when there is one. Raises DataError naming what is wrong.
    """
    import torch

    check_model_directory(path)
    quiet_transformers()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device == "cpu":
        dtype = "float32"
    model = _load_int8(path, dtype) if is_quantized(path) else _load_plain(path, dtype)
    return model.to(device).eval(), load_tokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in `path`; DataError when it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _does_not_load(path, "tokenizer", error) from error


def load_config(path: Path) -> Any:
    """The transformers configuration in `path`; DataError when it does not load."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _does_not_load(path, "configuration", error) from error


def model_on_meta(config: Any) -> Any:
    """The causal language model of `config` with shapes and names but no memory; weights are tied as configured."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def weight_files(path: Path, stem: str) -> dict[str, Path]:
    """Tensor name to the safetensors file of `path` that holds it, for files called `stem...`."""
    from safetensors import safe_open

    index = path / f"{stem}.safetensors.index.json"
    try:
        if index.is_file():
            files = json.loads(index.read_bytes())["weight_map"]
            if outside := [file for file in files.values() if not is_plain_name(file)]:
                raise DataError(f"{index} names the file {outside[0]!r}", "weights lie beside their index")
            return {name: path / file for name, file in files.items()}
        single = path / f"{stem}.safetensors"
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except SteadfastError:
        raise
    except Exception as error:
        raise _does_not_load(path, "weights", error) from error
    raise MissingInputError(f"{path} has no {stem}.safetensors", "give a directory that holds safetensors weights")


def quiet_transformers() -> None:
    """No progress bars and no advice from the library: what matters is said by us."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _load_plain(path: Path, dtype: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise _does_not_load(path, "model", error) from error
    # transformers fills missing weights with random numbers and carries on; a model like that must not answer.
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise DataError(f"{path}: {len(names)} weights are {kind.split('_')[0]}, e.g. {names[0]}", "export again")
    return model


def _load_int8(path: Path, dtype: str | None) -> Any:
    import torch
    from safetensors import safe_open

    from tools.model_directory.int8 import SCHEME, replace_layers

    try:
        about = json.loads((path / QUANTIZATION_NAME).read_bytes())
        scheme, names = about["scheme"], list(about["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / QUANTIZATION_NAME} is not readable", "quantize the model again") from error
    if scheme != SCHEME:
        raise DataError(f"{path} is quantized with '{scheme}'; this version reads {SCHEME}", "quantize again")
    config = load_config(path)
    wanted = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
    model = model_on_meta(config)
    _fill_computed_buffers(model)
    files = weight_files(path, INT8_STEM)
    try:
        replace_layers(model, names)
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(set(files.values())):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensor = opened.get_tensor(name)
                    is_scale = name.endswith(".weight_scale")
                    tensors[name] = tensor.to(wanted) if tensor.is_floating_point() and not is_scale else tensor
        found = model.load_state_dict(tensors, strict=False, assign=True)
    except SteadfastError:
        raise
    except Exception as error:
        raise _does_not_load(path, "model", error) from error
    if found.unexpected_keys:
        raise DataError(f"{path}: {found.unexpected_keys[0]} has no place in the model", "quantize the model again")
    model.tie_weights()
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise DataError(f"{path}: {len(empty)} weights are missing, e.g. {empty[0]}", "quantize the model again")
    _load_generation_config(model, path)
    return model.requires_grad_(False)


def _fill_computed_buffers(model: Any) -> None:
    """Compute the buffers that no file holds (rotary frequencies): on the meta device they were never filled.

    To be called before the weights are loaded: the hook used here also draws random weights.
    """
    import torch

    for prefix, module in model.named_modules():
        computed = [name for name in module._non_persistent_buffers_set if getattr(module, name).is_meta]
        for name in computed:
            # NaN marks what the hook below does not fill; whole numbers have no such mark and are not guessed.
            if not getattr(module, name).is_floating_point():
                raise DataError(f"{prefix}.{name} is computed in a way this version does not know", "serve the export")
            setattr(module, name, torch.full_like(getattr(module, name), torch.nan, device="cpu"))
        if computed:
            # The library's own hook for exactly this: it knows each architecture's formula.
            model._init_weights(module)
        for name in computed:
            if not torch.isfinite(getattr(module, name)).all():
                raise DataError(f"{prefix}.{name} is computed in a way this version does not know", "serve the export")


def _load_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _does_not_load(path: Path, what: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"the {what} in {path} does not load: {reason}", "export the model again or restore it")
