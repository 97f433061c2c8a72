"""Every key in words: type, default, meaning and an override to copy; and the JSON schema for editors."""

from __future__ import annotations

from typing import Any

from trainer.config.document import dump
from trainer.config.schema import Config
from trainer.config.words import hint, keys, sections
from trainer.errors import UsageError

# What stands in the example of a key that has no default, or whose default is "nothing".
EXAMPLES: dict[str, Any] = {
    "run.dir": "runs/mine",
    "model.path": "models/qwen-7b",
    "model.config": {"model_type": "llama", "hidden_size": 128},
    "data.train": "stores/train",
    "data.eval": "stores/eval",
    "data.sequence_length": 4096,
    "data.window": 2048,
    "data.overlap": 512,
    "data.pin_prefix": True,
    "data.long_text": "windows",
    "data.mixture": [{"rows": 100000, "weights": {"chat": 3, "code": 1}}, {"weights": {"chat": 1, "code": 1}}],
    "data.shuffle_blocks": 16,
    "data.cache_dir": "/scratch/steadfast",
    "train.max_steps": 1000,
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "array": "list",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors and validators."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Steadfast configuration"}


def explain(key: str | None = None) -> str:
    """Explain one key (`data.overlap`), one section (`data`) or, without `key`, everything."""
    if key is None:
        return "\n\n".join(_section(name) for name in sections())
    if key in sections():
        return _section(key)
    if key in keys():
        return _key(key, _properties(key.partition(".")[0]))
    raise UsageError(f"there is no key {key!r}", hint(key))


def explanations(key: str | None = None) -> list[dict[str, Any]]:
    """The same as data: one entry a key with its type, default, meaning and example."""
    explain(key)  # refuses an unknown key
    wanted = [name for name in keys() if key is None or name == key or name.startswith(f"{key}.")]
    return [
        {
            "key": name,
            "type": _type(_properties(name.partition(".")[0])[name.partition(".")[2]]),
            "required": keys()[name].is_required(),
            "default": None if keys()[name].is_required() else keys()[name].default,
            "meaning": _meaning(name),
            "example": _example(name),
        }
        for name in wanted
    ]


def _properties(section: str) -> dict[str, Any]:
    properties: dict[str, Any] = sections()[section].model_json_schema()["properties"]
    return properties


def _section(name: str) -> str:
    summary = " ".join((sections()[name].__doc__ or "").split())
    properties = _properties(name)
    parts = [_key(key, properties) for key in keys() if key.startswith(f"{name}.")]
    return "\n".join([f"{name}: {summary}", *(f"  {line}" for part in parts for line in part.splitlines())])


def _key(key: str, properties: dict[str, Any]) -> str:
    field = keys()[key]
    default = "required" if field.is_required() else f"default {_value(field.default)}"
    return (
        f"{key}: {_type(properties[key.partition('.')[2]])}, {default}\n"
        f"  {_meaning(key)}\n"
        f"  on the command line: {_example(key)}"
    )


def _meaning(key: str) -> str:
    return " ".join((keys()[key].description or "").split())


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return f"always {schema['const']}"
    bounds = "".join(f" {sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return _TYPES.get(schema.get("type", ""), "mapping") + bounds


def _example(key: str) -> str:
    value = EXAMPLES.get(key, keys()[key].default)
    quote = "'" if isinstance(value, dict | list) else ""
    return f"{quote}{key}={_value(value)}{quote}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return dump(value).removesuffix("...\n").strip()
