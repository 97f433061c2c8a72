"""Every key in words: type, default, meaning and an override to copy; and the JSON schema for editors."""

from __future__ import annotations

from typing import Any

from trainer.config.document import dump
from trainer.config.resume_law import LAW, at_resume
from trainer.config.schema import Config, Section
from trainer.config.words import hint, keys, sections
from trainer.errors import UsageError

# What stands in the example of a key that has no default, or whose default is "nothing".
EXAMPLES: dict[str, Any] = {
    "run.dir": "runs/mine",
    "model.path": "models/qwen-7b",
    "model.config": {"model_type": "llama", "hidden_size": 128},
    "model.trainable": ["lm_head.*", "model.layers.3.*"],
    "model.lora": {"rank": 16},
    "data.train": "stores/train",
    "data.eval": "stores/eval",
    "data.teacher": "stores/train-teacher",
    "data.sequence_length": 4096,
    "data.window": 2048,
    "data.overlap": 512,
    "data.pin_prefix": True,
    "data.long_text": "windows",
    "data.mixture": [{"rows": 100000, "weights": {"chat": 3, "code": 1}}, {"weights": {"chat": 1, "code": 1}}],
    "data.shuffle_blocks": 16,
    "data.cache_dir": "/scratch/steadfast",
    "train.max_steps": 1000,
    "engine.nvme_path": "/local_nvme",
    "checkpoint.upload": "s3://bucket/mine",
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


def json_schema(schema: type[Section] = Config, title: str = "Steadfast configuration") -> dict[str, Any]:
    """The JSON schema of a document, for editors and validators."""
    described = schema.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described, "title": title}


def explain(key: str | None = None, schema: type[Section] = Config) -> str:
    """Explain one key (`data.overlap`), one section (`data`) or, without `key`, everything."""
    if key is None:
        alone = [_key(name, schema) for name in keys(schema) if "." not in name]
        return "\n\n".join([*alone, *(_section(name, schema) for name in sections(schema))])
    if key in sections(schema):
        return _section(key, schema)
    if key in keys(schema):
        return _key(key, schema)
    raise UsageError(f"there is no key {key!r}", hint(key, schema))


def explanations(key: str | None = None, schema: type[Section] = Config) -> list[dict[str, Any]]:
    """The same as data: one entry a key with its type, default, meaning and example."""
    explain(key, schema)  # refuses an unknown key
    known = keys(schema)
    wanted = [name for name in known if key is None or name == key or name.startswith(f"{key}.")]
    return [
        {
            "key": name,
            "type": _type(_property(name, schema)),
            "required": known[name].is_required(),
            "default": None if known[name].is_required() else known[name].default,
            "meaning": _meaning(name, schema),
            "example": _example(name, schema),
            **({"at_resume": LAW[name]} if schema is Config else {}),
        }
        for name in wanted
    ]


def _property(key: str, schema: type[Section]) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    owner = sections(schema)[section] if section else schema
    described: dict[str, Any] = owner.model_json_schema()["properties"][name]
    return described


def _section(name: str, schema: type[Section]) -> str:
    summary = " ".join((sections(schema)[name].__doc__ or "").split())
    parts = [_key(key, schema) for key in keys(schema) if key.startswith(f"{name}.")]
    return "\n".join([f"{name}: {summary}", *(f"  {line}" for part in parts for line in part.splitlines())])


def _key(key: str, schema: type[Section]) -> str:
    field = keys(schema)[key]
    default = "required" if field.is_required() else f"default {_value(field.default)}"
    return (
        f"{key}: {_type(_property(key, schema))}, {default}\n"
        f"  {_meaning(key, schema)}\n"
        f"  on the command line: {_example(key, schema)}"
        + (f"\n  at a resume: {at_resume(key)}" if schema is Config else "")
    )


def _meaning(key: str, schema: type[Section]) -> str:
    return " ".join((keys(schema)[key].description or "").split())


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return f"always {schema['const']}"
    bounds = "".join(f" {sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return _TYPES.get(schema.get("type", ""), "mapping") + bounds


def _example(key: str, schema: type[Section]) -> str:
    field = keys(schema)[key]
    given = field.examples[0] if field.examples else None if field.is_required() else field.default
    value = EXAMPLES.get(key, given)
    quote = "'" if isinstance(value, dict | list) else ""
    return f"{quote}{key}={_value(value)}{quote}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return dump(value).removesuffix("...\n").strip()
