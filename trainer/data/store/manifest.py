"""What must stand in the manifest of a token store, value by value: its hash proves nothing about who made it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]


class _Part(BaseModel):
    """Strict about what is read here, and indifferent to what is only told."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Part):
    name: str
    bytes: Number
    xxh3: Hash
    sha256: Hash
    documents: Number | None = None

    @model_validator(mode="after")
    def _shards_have_documents(self) -> _File:
        if self.name.startswith("tokens/") and self.documents is None:
            raise ValueError("a shard without its number of documents")
        return self


class _Plan(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    sequence_length: Annotated[int, Field(ge=1, lt=1 << 31)]
    window: Annotated[int, Field(ge=1, lt=1 << 31)]
    overlap: Annotated[int, Field(ge=0, lt=1 << 31)]
    pin_prefix: bool
    long_text: Literal["windows", "truncate", "drop", "error"]
    packing: bool
    by_source: bool


class _Named(_Part):
    name: str


class _Manifest(_Part):
    documents: Number
    tokens: Number
    supervised_tokens: Number
    plan: _Plan
    tokenizer_fingerprint: Hash
    template_sha256: Hash
    vocabulary_size: Annotated[int, Field(ge=1, lt=1 << 31)]
    padding_id: Number
    labels: list[Any]
    class_weights: dict[str, Any]
    sources: list[_Named]
    inputs: list[_Named]
    files: list[_File]


def what_is_wrong(manifest: dict[str, Any]) -> str | None:
    """The first value that is missing or not of its kind, by its place in the manifest; None when all are right."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return ".".join(map(str, first["loc"])) or "it"
    return None
