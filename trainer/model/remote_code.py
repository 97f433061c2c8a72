"""Models that bring code of their own: it runs only when the command line names exactly this code.

transformers imports such code from the model directory, through a cache that models share, when `trust_remote_code` is
true. Here that switch stays false. The files are read once, hashed, compared with the revision that the user pinned,
and the very bytes that were hashed are imported, from a private copy; then their classes are registered under the
model's type, as a package for transformers would do. Every later load in this process finds them there.

Code of tokenizers never runs. Torch-free until there is code to import.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.arguments import TRUST_REMOTE_CODE as FLAG
from trainer.errors import DataError, UsageError

_PREFIX = "sha256:"
_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
_registered: dict[str, str] = {}
"""Model type to the revision of the code that serves it in this process."""


def code_files(path: Path) -> dict[str, bytes]:
    """The Python files of the model directory `path`, by name; what lies in directories below it is not imported."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.py")) if file.is_file()}


def revision_of(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents: another name, another byte, a file more or less is another revision."""
    whole = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            whole.update(len(part).to_bytes(8, "little") + part)
    return _PREFIX + whole.hexdigest()


def checked_code(path: Path | None, pinned: str | None) -> dict[str, bytes] | None:
    """The code files of the model directory `path` if it needs them and they are those of the `pinned` revision.

    None when the model needs no code and nothing is pinned, or when `path` is no model directory (others say so).
    `path` is None for a model from scratch.

    Raises:
        UsageError: code is needed and another revision or none was pinned, or pinned and not needed.
        DataError: the code is not in this directory.
    """
    if path is not None and not (path / "config.json").is_file():
        return None
    needed = {} if path is None else own_classes(path)
    if path is None or not needed:
        if pinned is not None:
            raise UsageError(
                f"{FLAG} was given, and {path or 'a model from scratch'} needs no code of its own", f"drop {FLAG}"
            )
        return None
    if elsewhere := [name for name in needed.values() if "--" in name or name.count(".") != 1]:
        raise DataError(f"{path}/config.json takes {elsewhere[0]} from another repository", "copy that file into it")
    files = code_files(path)
    revision = revision_of(files)
    if pinned != revision:
        fact = f"{path} needs code of its own ({', '.join(files) or 'which it does not have'})"
        if pinned is not None:
            fact += f", and {FLAG} {pinned} does not name it as it is now"
        raise UsageError(fact, f"read it; it will run with your rights if you pass {FLAG} {revision}")
    return files


def trust_remote_code(path: Path | None, pinned: str | None) -> str | None:
    """Make transformers know the classes of the model directory `path`; the revision that was imported, or None.

    All ranks call it, before any of them loads the model. Raises as `checked_code`, and DataError when the code does
    not import.
    """
    files = checked_code(path, pinned)
    if path is None or files is None or pinned is None:
        return None
    model_type = str(json.loads((path / "config.json").read_bytes()).get("model_type"))
    if _registered.get(model_type) != pinned:
        try:
            _register(model_type, _import(files, pinned), own_classes(path))
        except Exception as error:
            # Anything at all: it is the model's code that runs here.
            raise DataError(
                f"the code of {path} cannot be used: {type(error).__name__}: {error}",
                "it may need other packages, or another version of transformers",
            ) from error
        _registered[model_type] = pinned
    return pinned


def own_classes(path: Path) -> dict[str, str]:
    """Which classes of `path`'s own code its config.json asks for: auto class to module.class."""
    try:
        asked = json.loads((path / "config.json").read_bytes()).get("auto_map") or {}
        return {name: str(asked[name]) for name in _CLASSES if name in asked}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _import(files: Mapping[str, bytes], revision: str) -> str:
    """Make the files a package of this process; its name. Modules in it are imported when they are asked for."""
    name = f"remote_code_{revision.removeprefix(_PREFIX)[:16]}"
    place = Path(tempfile.mkdtemp(prefix="steadfast-code-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for file, content in files.items():
        (place / file).write_bytes(content)
    if not (place / "__init__.py").exists():
        (place / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no package can be made of {place}")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return name


def _register(model_type: str, package: str, classes: Mapping[str, str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    found: dict[str, Any] = {}
    for auto, place in classes.items():
        module, _, name = place.partition(".")
        found[auto] = getattr(importlib.import_module(f"{package}.{module}"), name)
    config = found.get("AutoConfig")
    if config is None:
        # Its configuration is one that transformers has; only the model is its own.
        config = type(AutoConfig.for_model(model_type))
    else:
        config.model_type = model_type
        AutoConfig.register(model_type, config, exist_ok=True)
    if "AutoModelForCausalLM" in found:
        model = found["AutoModelForCausalLM"]
        model.config_class = config
        AutoModelForCausalLM.register(config, model, exist_ok=True)
