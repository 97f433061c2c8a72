"""YAML text to plain values that remember where they were written.

PyYAML reads YAML 1.1, where `no` is false, `012` is ten, `1:30` is ninety and `1e-6` is text. Here scalars follow the
core schema of YAML 1.2: `true`, `false`, `null`, numbers as everybody writes them, and everything else is text. The
writer (`dump`) quotes by the same rules, so what it writes reads back equal.

Nothing here can be made to hang or to run code: the size, depth and number of values are bounded before a tree is
built, aliases included, and tags are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_VALUES = 20_000

_STANDARD = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
}

KeyPath = tuple[str, ...]


# libyaml reads a hundred times faster than PyYAML's own scanner; both give the same events.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads core-schema scalars only."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML copies it on the first addition


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # YAML folds exotic line ends (\x85, \u2028, ...) in every style but the double-quoted one.
        style = '"' if len(data.splitlines()) > 1 or data[-1:].isspace() else None
        return self.represent_scalar(_STANDARD + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _name, (_pattern, _first_characters) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_STANDARD + _name, re.compile(_pattern), _first_characters)


@dataclass
class Document:
    """Plain values (dict with text keys, list, str, int, float, bool, None), the place of each key, and problems."""

    value: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse(text: str, place_of_line: Callable[[int], str]) -> Document:
    """Read one YAML document; `place_of_line` names a line (counted from 1) for messages. Never raises."""
    document = Document()
    try:
        if problem := _too_much(text):
            document.problems.append(f"{place_of_line(problem[0])}: {problem[1]}")
            return document
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(f"{place_of_line(line)}: not valid YAML: {what}")
        return document
    except (yaml.YAMLError, UnicodeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        document.problems.append(f"{place_of_line(1)}: not valid YAML: {first_line}")
        return document
    if node is not None:
        document.value = _Builder(document, place_of_line).value(node, (), 0)
    return document


def dump(value: Any) -> str:
    """Write plain values as YAML in block style; `parse` reads it back equal."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def _too_much(text: str) -> tuple[int, str] | None:
    """The line and the reason why `text` is not worth building, found without recursion."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        line = event.start_mark.line + 1 if event.start_mark else 1
        if depth > MAX_DEPTH:
            return line, f"nested deeper than {MAX_DEPTH} levels"
        if aliases > MAX_ALIASES:
            return line, f"more than {MAX_ALIASES} aliases"
    return None


class _TooManyError(Exception):
    """Aliases expand to more values than a configuration can need."""


class _Builder:
    """Turns nodes into values and writes places and problems into a document."""

    def __init__(self, document: Document, place_of_line: Callable[[int], str]) -> None:
        self.document = document
        self.place_of_line = place_of_line
        self.values = 0

    def place(self, node: yaml.Node) -> str:
        return self.place_of_line(node.start_mark.line + 1)

    def value(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        try:
            return self._value(node, path, depth)
        except _TooManyError:
            self.document.problems.append(
                f"{self.place(node)}: aliases expand to more than {MAX_VALUES} values or to {MAX_DEPTH} levels"
            )
            return None

    def _value(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise _TooManyError
        if isinstance(node, yaml.MappingNode) and node.tag == _STANDARD + "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _STANDARD + "seq":
            return [self._value(item, (*path, str(index)), depth + 1) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        return self._refuse(node, f"the tag {node.tag!r} is not supported; write a plain value")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key must be a single word")
                continue
            key = self._text(key_node)
            if key is None:
                continue
            here = (*path, key)
            if key in result:
                first = self.document.places[here]
                self._refuse(key_node, f"key {'.'.join(here)!r} was already given at {first}")
                continue
            self.document.places[here] = self.place(key_node)
            result[key] = self._value(value_node, here, depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = self._text(node)
        if text is None:
            return None
        kind = node.tag.removeprefix(_STANDARD)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            if kind == "float":
                number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                return number if math.isfinite(number) else self._refuse(node, f"{text} is not a finite number")
        except (ValueError, KeyError):
            return self._refuse(node, f"{text[:40]!r} cannot be read as {kind}")
        if kind == "str":
            return text
        return self._refuse(node, f"the tag {node.tag!r} is not supported; write a plain value")

    def _text(self, node: yaml.ScalarNode) -> str | None:
        text = str(node.value)
        # Neither can be a file name or be written back as UTF-8.
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse(node, "text with a NUL or half a surrogate pair")
            return None
        return text

    def _refuse(self, node: yaml.Node, problem: str) -> None:
        self.document.problems.append(f"{self.place(node)}: {problem}")
