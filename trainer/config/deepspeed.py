"""DeepSpeed's JSON: read, checked and compiled into the dictionary that `deepspeed.initialize` gets.

A file in configs/ds/ says how memory is saved (ZeRO stage, offload, buckets). What the run's configuration already
says (batch sizes, clipping, precision, optimizer, schedule) is filled in here and must not be said twice. Nothing of
DeepSpeed is imported: a login node checks a file in a fraction of a second.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from trainer.checkout import ROOT
from trainer.config import deepspeed_keys as known
from trainer.config.device import Device
from trainer.config.schema import Config
from trainer.errors import ConfigError

SHIPPED = ROOT / "configs" / "ds"
MAX_BYTES = 1 << 20
STAGES = (1, 2, 3)


def load_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """Read configs/ds/NAME.json for a bare name, else the file at a path relative to the current directory.

    Raises ConfigError for an unknown name, an unreadable file, invalid JSON, a key given twice or a non-object.
    """
    path = _path_of(name_or_path)
    try:
        text = path.read_bytes()[: MAX_BYTES + 1].decode()
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read DeepSpeed JSON {path} (engine.deepspeed): {error}"]) from error
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}:{error.lineno}: not valid JSON: {error.msg}"]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: not valid JSON: {error}"]) from error
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: a DeepSpeed configuration is a JSON object"])
    return value


def place_of(name_or_path: str) -> str:
    """How messages name the file behind `engine.deepspeed`."""
    return str(_path_of(name_or_path)) if _is_path(name_or_path) else f"configs/ds/{name_or_path}.json"


def lint(settings: dict[str, Any], place: str, device: Device) -> list[str]:
    """Every reason why `settings` cannot be used on `device`, each one line that begins with `place`."""
    problems: list[str] = []
    sections = {name for name in known.SECTIONS if "." not in name}
    top_level = {*known.OWNED, *known.PASSED, *sections}
    for key, value in settings.items():
        if key in known.REMOVED:
            problems.append(f"{place}: {key} was removed from DeepSpeed; delete it")
        elif key in known.REFUSED:
            problems.append(f"{place}: {key} is not used here ({known.REFUSED[key]}); delete it")
        elif key in known.OWNED:
            problems.extend(_owned_problems(key, value, place))
        elif key in known.PASSED:
            problems.extend(_kind_problem(key, value, known.PASSED[key], place))
        elif key in sections:
            problems.extend(_section_problems(key, value, place))
        else:
            problems.append(f"{place}: unknown key {key!r}{_did_you_mean(key, [*top_level, *known.REMOVED])}")
    problems.extend(_meaning_problems(settings, place))
    problems.extend(_device_problems(settings, place, device))
    return problems


def check_deepspeed(name_or_path: str, device: Device) -> list[str]:
    """Read and lint what `engine.deepspeed` names; returns problems, never raises."""
    try:
        settings = load_deepspeed_json(name_or_path)
    except ConfigError as error:
        return error.problems
    return lint(settings, place_of(name_or_path), device)


def check_swap_place(config: Config) -> list[str]:
    """What is wrong with where optimizer state is swapped to; never raises, an unreadable JSON is named elsewhere."""
    try:
        return _swap_problems(config, load_deepspeed_json(config.engine.deepspeed))
    except ConfigError:
        return []


def micro_batches(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of every rank when `rows` rows are dealt out over all ranks, rounded up.

    Where ranks x micro-batch does not divide the rows, the slots left over hold empty rows.
    """
    return -(-rows // (micro_batch_size * world_size))


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches a rank adds up in one optimizer step: its share of the global batch."""
    return micro_batches(config.train.global_batch_size, config.train.micro_batch_size, world_size)


def compile_deepspeed(
    config: Config, *, world_size: int, accumulation_steps: int, device: Device, hidden_size: int | None = None
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; optimizer and scheduler are given to it as objects, not as settings.

    `hidden_size` sizes buckets that are "auto"; without it the hidden size in model.config is used, else DeepSpeed's
    own defaults. Raises ConfigError with every problem of the JSON.
    """
    settings = load_deepspeed_json(config.engine.deepspeed)
    if problems := lint(settings, place_of(config.engine.deepspeed), device):
        raise ConfigError(problems)
    if hidden_size is None and config.model.config is not None:
        found = config.model.config.get("hidden_size")
        hidden_size = found if isinstance(found, int) and found > 0 else None
    given = {key: value for key, value in settings.items() if value is not None and key not in known.OWNED}
    compiled = copy.deepcopy(given)
    compiled["zero_optimization"] = _resolved(
        compiled["zero_optimization"], "zero_optimization", device=device, hidden_size=hidden_size
    )
    if swaps_optimizer(compiled):
        compiled["zero_optimization"]["offload_optimizer"]["nvme_path"] = _swap_directory(config, settings)
    precision = settings.get("bf16")
    compiled["bf16"] = {
        **(precision if isinstance(precision, dict) else {}),
        "enabled": config.model.dtype == "bfloat16",
    }
    compiled["train_batch_size"] = config.train.micro_batch_size * accumulation_steps * world_size
    compiled["train_micro_batch_size_per_gpu"] = config.train.micro_batch_size
    compiled["gradient_accumulation_steps"] = accumulation_steps
    # Always written: DeepSpeed clips to 1.0 when the key is absent. 0 switches clipping off.
    compiled["gradient_clipping"] = config.train.max_gradient_norm
    # True would replace the optimizer we pass by one that is compiled with C++ when optimizer states are offloaded.
    compiled["zero_force_ds_cpu_optimizer"] = False
    compiled.setdefault("wall_clock_breakdown", False)
    compiled.setdefault("steps_per_print", sys.maxsize)
    return compiled


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of what `compile_deepspeed` made."""
    return int(settings["zero_optimization"]["stage"])


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether optimizer states live in the memory of the host; `settings` is what `compile_deepspeed` made."""
    return _value(settings, "zero_optimization.offload_optimizer.device") not in (None, "none")


def swaps_optimizer(settings: dict[str, Any]) -> bool:
    """Whether optimizer states live in files on a local disk; `settings` is what `compile_deepspeed` made."""
    return bool(_value(settings, "zero_optimization.offload_optimizer.device") == "nvme")


def _swap_problems(config: Config, settings: dict[str, Any]) -> list[str]:
    place = config.engine.nvme_path or _value(settings, "zero_optimization.offload_optimizer.nvme_path")
    if place or not swaps_optimizer(settings):
        return []
    return [f"engine.deepspeed: {config.engine.deepspeed} offloads to nvme: set engine.nvme_path to a local directory"]


def _swap_directory(config: Config, settings: dict[str, Any]) -> str:
    """A directory of this run's own below engine.nvme_path or the JSON's: DeepSpeed names swap files by rank only."""
    if problems := _swap_problems(config, settings):
        raise ConfigError(problems)
    place = config.engine.nvme_path or _value(settings, "zero_optimization.offload_optimizer.nvme_path")
    own = hashlib.sha256(str(Path(config.run.dir).absolute()).encode()).hexdigest()[:12]
    return str(Path(place).absolute() / f"steadfast-{own}")


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith(".json")


def _path_of(name_or_path: str) -> Path:
    if _is_path(name_or_path):
        return Path(name_or_path)
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if name_or_path in shipped:
        return SHIPPED / f"{name_or_path}.json"
    meant = _did_you_mean(name_or_path, shipped)
    raise ConfigError(
        [
            f"engine.deepspeed: there is no {name_or_path!r} in configs/ds{meant}; "
            f"have: {', '.join(shipped)}, or a path that ends in .json"
        ]
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is given twice")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text)


def _did_you_mean(word: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _owned_problems(key: str, value: Any, place: str) -> list[str]:
    if value == "auto":
        return []
    if key in ("bf16", "fp16") and isinstance(value, dict) and value.get("enabled", "auto") == "auto":
        return _section_problems(key, value, place) if key == "bf16" else []
    return [f'{place}: {key} is decided by {known.OWNED[key]} of the configuration; remove it here or write "auto"']


def _section_problems(name: str, value: Any, place: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, dict):
        return [f"{place}: {name} is a JSON object (got {value!r})"]
    problems: list[str] = []
    for key, inner in value.items():
        full = f"{name}.{key}"
        if full in known.REMOVED:
            problems.append(f"{place}: {full} was removed from DeepSpeed; delete it")
        elif key.startswith("cpu_offload"):
            problems.append(f"{place}: {full} is deprecated; write offload_optimizer or offload_param")
        elif key not in known.SECTIONS[name]:
            problems.append(f"{place}: unknown key {full!r}{_did_you_mean(key, [*known.SECTIONS[name]])}")
        elif full in known.SECTIONS:
            problems.extend(_section_problems(full, inner, place))
        elif inner == "auto":
            if full not in known.AUTO and key not in ("pin_memory", "enabled"):
                problems.append(f'{place}: {full} has no "auto" here; give a value or remove the key')
        else:
            problems.extend(_kind_problem(full, inner, known.SECTIONS[name][key], place))
    return problems


def _kind_problem(key: str, value: Any, kind: str, place: str) -> list[str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        known.FLAG: isinstance(value, bool),
        known.COUNT: number and value >= 0 and (isinstance(value, int) or value.is_integer()),
        known.NUMBER: number and value >= 0,
        known.TEXT: isinstance(value, str),
        known.ANY: True,
    }
    # null is DeepSpeed's "not given".
    return [] if value is None or fits[kind] else [f"{place}: {key} must be {kind} (got {value!r})"]


def _meaning_problems(settings: dict[str, Any], place: str) -> list[str]:
    """Settings that are spelt right and still cannot work or would be ignored by DeepSpeed."""
    problems = []
    stage = _value(settings, "zero_optimization.stage")
    if stage is None:
        problems.append(f"{place}: zero_optimization.stage is missing; give 1, 2 or 3")
    elif stage == 0:
        problems.append(f"{place}: ZeRO stage 0 trains on with non-finite gradients; use stage 1, which skips them")
    elif stage not in STAGES:
        problems.append(f"{place}: zero_optimization.stage must be 1, 2 or 3 (got {stage!r})")
    for what in ("param", "optimizer"):
        section = f"zero_optimization.offload_{what}"
        where = _value(settings, f"{section}.device")
        if where is None and _value(settings, section):
            problems.append(f"{place}: {section}.device is missing; give cpu or none")
        elif where == "nvme" and what == "param":
            problems.append(f"{place}: {section}.device is nvme, which works for the optimizer only; give cpu or none")
        elif where == "nvme" and stage in (1, 2):
            problems.append(f"{place}: {section}.device is nvme, which needs stage 3; give cpu or none")
        elif where not in (None, "none", "cpu", "nvme"):
            problems.append(f"{place}: {section}.device must be cpu or none (got {where!r})")
        elif where == "cpu" and what == "param" and stage in (1, 2):
            problems.append(f"{place}: {section} needs stage 3; DeepSpeed would ignore it at stage {stage}")
    problems.extend(
        f"{place}: {key} = {_value(settings, key)!r} is not supported: checkpoints cannot hold its state; remove it"
        for key, harmless in known.UNSAVED.items()
        if _value(settings, key) not in (None, *harmless)
    )
    for key, reason in (
        ("zero_optimization.compute_grad_norm", "the gradient norm guards against non-finite steps"),
        ("bf16.check_grad_overflow", "the check guards against non-finite steps"),
    ):
        if _value(settings, key) is False:
            problems.append(f"{place}: {key} must stay true: {reason}")
    problems.extend(
        f"{place}: {key} must stay false: checkpoints hold fp32 master weights"
        for key in ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states")
        if _value(settings, key) is True
    )
    return problems


def _device_problems(settings: dict[str, Any], place: str, device: Device) -> list[str]:
    if device != "cpu":
        return []
    wanted = [key for key in known.GPU_ONLY if _value(settings, key) not in (None, False, 0, "none")]
    if str(_value(settings, "checkpoint.writer.type")).lower() == "fast":
        wanted.append("checkpoint.writer.type")
    return [
        f"{place}: {key} = {_value(settings, key)!r} works on a CUDA device only, and this run has none; remove it"
        for key in wanted
    ]


def _value(settings: dict[str, Any], dotted: str) -> Any:
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _resolved(section: dict[str, Any], name: str, *, device: Device, hidden_size: int | None) -> dict[str, Any]:
    """`section` with every "auto" replaced, whole numbers as integers and pinned memory only where it exists.

    null is "not given": such keys are left out.
    """
    result: dict[str, Any] = {}
    for key, value in section.items():
        full = f"{name}.{key}"
        if isinstance(value, dict):
            result[key] = _resolved(value, full, device=device, hidden_size=hidden_size)
        elif value not in (None, "auto"):
            result[key] = int(value) if isinstance(value, float) and value.is_integer() else value
        elif full in known.AUTO:
            result[key] = known.AUTO[full](hidden_size)
    if "device" in section and section.get("pin_memory", "auto") in ("auto", None):
        # A CPU run has nothing to pin; on a GPU pinned memory makes offloading fast.
        result["pin_memory"] = device == "cuda"
    return result
