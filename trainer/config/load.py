"""YAML file and `section.key=value` overrides to a `Config` (or another schema), or every problem with its place.

Only the YAML file is read. Paths inside it are taken relative to the current directory, not to the file: the same
file serves many directories, and an override typed in the shell means what the shell means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trainer.config.document import MAX_BYTES, KeyPath, dump, parse
from trainer.config.schema import Config, Engine, Section
from trainer.config.words import hint, keys, sections
from trainer.errors import ConfigError, MissingInputError
from trainer.redact import redacted

_LONGEST_QUOTE = 60
_Schema = TypeVar("_Schema", bound=Section)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `overrides` in order (the last one of a key wins) and validate.

    Raises ConfigError with every problem found, or MissingInputError when the file cannot be opened.
    """
    return config_from_text(_read(path), str(path), overrides)


def named_deepspeed(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """What `engine.deepspeed` of a configuration names, even when the rest is wrong; None when that cannot be said.

    Raises MissingInputError as `load_config` does.
    """
    try:
        values, _, _ = _merged(_read(path), str(path), overrides, Config)
    except ConfigError:
        return None
    engine = values.get("engine")
    named = (engine if isinstance(engine, dict) else {}).get("deepspeed", Engine().deepspeed)
    return named if isinstance(named, str) else None


def config_from_text(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """The same as `load_config` for YAML text; `name` stands for the file in messages."""
    return document_from_text(text, name, overrides, Config)


def load_document(path: Path, overrides: Sequence[str], schema: type[_Schema]) -> _Schema:
    """The same as `load_config` for any schema whose keys stand in sections or at the top."""
    return document_from_text(_read(path), str(path), overrides, schema)


def document_from_text(text: str, name: str, overrides: Sequence[str], schema: type[_Schema]) -> _Schema:
    """The same as `load_document` for YAML text; `name` stands for the file in messages."""
    values, places, problems = _merged(text, name, overrides, schema)
    for section in sections(schema):
        # An empty section (all its keys commented out) is a section of defaults, and a missing one misses its
        # required keys, which says more than "run is missing".
        if values.get(section) is None:
            values[section] = {}
    try:
        document = schema.model_validate(values)
    except ValidationError as error:
        for entry in error.errors(include_url=False, include_context=False):
            problems.append(
                _problem(entry["type"], entry["loc"], entry["msg"], entry.get("input"), places, name, schema)
            )
    if problems:
        raise ConfigError(problems)
    return document


def config_as_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every key written out; `load_config` reads it back equal, but for secrets."""
    return "# Resolved configuration: every key, defaults included.\n" + dump(redacted(config.model_dump()))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise MissingInputError(f"there is no configuration {path}", "ready ones lie in configs/") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MissingInputError(f"cannot read configuration {path}: {reason}", "name a YAML file") from error
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{path}: larger than {MAX_BYTES >> 20} MiB; this is not a configuration"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8"]) from error


def _merged(
    text: str, name: str, overrides: Sequence[str], schema: type[Section]
) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """The document with `overrides` applied, where each key was written, and what was wrong so far."""
    document = parse(text, lambda line: f"{name}:{line}")
    problems, places = document.problems, document.places
    values = document.value if document.value is not None else {}
    if not isinstance(values, dict):
        example = "run: {dir: runs/mine}" if schema is Config else f"{next(iter(keys(schema)))}: ..."
        problems.append(f"{name}:1: a configuration is a mapping of sections, e.g. '{example}'")
        values = {}
    for override in overrides:
        _apply(override, values, places, problems, schema)
    return values, places, problems


def _apply(
    override: str,
    values: dict[str, Any],
    places: dict[KeyPath, str],
    problems: list[str],
    schema: type[Section],
) -> None:
    """Put one `section.key=value` into `values`; the value is YAML (`8`, `null`, `[1, 2]`, `{a: 1}`)."""
    place = f"override {_quote(override)}"
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        problems.append(f"{place}: write section.key=value, e.g. train.max_steps=100")
        return
    if len(path) == 1 and path[0] in sections(schema):
        problems.append(f"{place}: override one key at a time, e.g. {_first_key(path[0], schema)}=...")
        return
    document = parse(text, lambda _: place)
    if document.problems:
        problems.extend(document.problems)
        return
    parent = values
    for depth, key in enumerate(path[:-1], start=1):
        if parent.get(key) is None:
            parent[key] = {}
            places[path[:depth]] = place
        if not isinstance(parent[key], dict):
            problems.append(f"{place}: {_quote('.'.join(path[:depth]))} holds a single value, it has no keys below it")
            return
        parent = parent[key]
    parent[path[-1]] = document.value
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[path] = place


def _problem(
    kind: str,
    location: tuple[int | str, ...],
    message: str,
    value: Any,
    places: dict[KeyPath, str],
    name: str,
    schema: type[Section],
) -> str:
    """One line for one pydantic error: place, key, what is wrong, what was given."""
    path = tuple(str(part) for part in location)
    dotted = ".".join(path)
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), name)
    if kind == "extra_forbidden":
        return f"{place}: unknown key {_quote(dotted)}; {hint(dotted, schema)}"
    if kind == "missing":
        field = keys(schema).get(dotted)
        meaning = f": {' '.join(field.description.split())}" if field is not None and field.description else ""
        return f"{place}: {_quote(dotted)} is missing{meaning}"
    if kind == "value_error":
        return f"{place}: {message.removeprefix('Value error, ')}"
    if path and path[0] in sections(schema) and len(path) == 1:
        return f"{place}: {path[0]} is a section of keys, e.g. {_first_key(path[0], schema)} (got {_quote(value)})"
    return f"{place}: {dotted}: {message[:1].lower()}{message[1:]} (got {_quote(value)})"


def _first_key(section: str, schema: type[Section]) -> str:
    return next(key for key in keys(schema) if key.startswith(f"{section}."))


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 4]}...{text[-1]}"
