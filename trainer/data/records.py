"""Raw rows to conversations: three formats in, one canonical form out.

    alpaca     {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}
    messages   {"messages": [{"role", "content", "tool_calls"?, ...}], "tools"?}            (OpenAI)
    sharegpt   {"conversations": [{"from", "value"}], "tools"?, "system"?}

The canonical form is the one chat templates read: messages with `role` system, user, assistant or tool, text
`content`, and `tool_calls` whose arguments are an object, never a JSON string (a template would quote it twice).
Whatever does not fit is refused with file and line; nothing is guessed or repaired. Keys that mean nothing to training
(identifiers, dates) are passed over; those that would change it (images, loss weights, other call formats) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.sources import RawRow, name_of_type
from trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}

# Keys of a turn or row that say something about training which is not built: dropping them would be silent.
WEIGHT_KEYS = ("weight", "loss", "train")
CONTENT_KEYS = ("function_call", "refusal", "audio", "images", "image", "videos", "video", "audios")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One training conversation in canonical form. `place` is `file:line`."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None
    place: str
    trained: tuple[bool, ...] | None = None
    pinned: str = ""

    @property
    def empty_answer(self) -> bool:
        """An assistant turn without text and without a tool call: it would teach the model to say nothing."""
        return any(
            message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
            for message in self.messages
        )


@dataclass(frozen=True)
class PlainText:
    """A text document, or a prompt with its completion; with the prompt "" all of it is trained on."""

    prompt: str
    text: str
    place: str


@dataclass(frozen=True)
class TokenIds:
    """A row that is already tokenised: `ids` int64 [tokens], `spans` the supervised token ranges."""

    ids: NDArray[np.int64]
    spans: tuple[tuple[int, int], ...]
    place: str


Record = Conversation | PlainText | TokenIds


def detect_format(row: RawRow) -> str:
    """The format of one row by its keys.

    Raises:
        DataError: it is none of the known ones, or it could be two.
    """
    keys = row.value.keys()
    found = [
        name
        for name, needed in (
            ("messages", {"messages"}),
            ("sharegpt", {"conversations"}),
            ("alpaca", {"instruction", "output"}),
        )
        if needed <= keys
    ]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(sorted(keys)[:8]) or "none"
    if found:
        raise DataError(f"{row.place}: the row could be {' or '.join(found)}", f"say which: --format {found[0]}")
    raise DataError(
        f"{row.place}: no known format (keys: {listing})",
        "known: alpaca (instruction, output), messages (messages) and sharegpt (conversations)",
    )


def read_conversations(rows: Iterable[RawRow], format: str | None = None) -> Iterator[Conversation]:
    """Conversations of one source. The format comes from the first row unless told; every row must have it."""
    for row in rows:
        if format is None:
            format = detect_format(row)
        yield to_conversation(row, format)


def to_conversation(row: RawRow, format: str) -> Conversation:
    """One row of the given format.

    Raises:
        DataError: naming `file:line`, what is wrong and what would be right.
    """
    _refuse_unsupported(row.value, row.place)
    return _READERS[format](row)


def _from_alpaca(row: RawRow) -> Conversation:
    value, place = row.value, row.place
    instruction = _text(value, "instruction", place)
    extra = _optional_text(value, "input", place)
    answer = _text(value, "output", place)
    messages: list[Message] = []
    if system := _optional_text(value, "system", place):
        messages.append({"role": "system", "content": system})
    history = value.get("history")
    for number, pair in enumerate(_list(history, "history", place) if history is not None else [], start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            raise DataError(f"{place}: history[{number}] must be a pair of strings", "write [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n{extra}" if extra.strip() else instruction
    if not question.strip():
        raise DataError(f"{place}: instruction and input are empty", "remove the row or fill it in")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(messages), None, place)


def _from_messages(row: RawRow) -> Conversation:
    place = row.place
    messages: list[Message] = []
    for where, item in _turns(row, "messages"):
        role = _text(item, "role", where)
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise DataError(f"{where}: unknown role '{role}'", f"known roles: {', '.join(ROLES)}")
        calls = item.get("tool_calls")
        message: Message = {"role": role}
        if calls and role != "assistant":
            raise DataError(f"{where}: tool_calls on role '{role}'", "only the assistant calls tools")
        message["content"] = _content(item, where, may_be_absent=bool(calls))
        if calls:
            message["tool_calls"] = [_tool_call(call, where) for call in _list(calls, "tool_calls", where)]
        for key in ("name", "tool_call_id"):
            if text := _optional_text(item, key, where):
                message[key] = text
        reasoning = [text for key in REASONING_KEYS if (text := _optional_text(item, key, where))]
        if reasoning and role == "assistant":
            message["reasoning_content"] = reasoning[0]
        messages.append(message)
    return Conversation(_ordered(messages, place), _tools(row.value.get("tools"), place), place)


def _from_sharegpt(row: RawRow) -> Conversation:
    value, place = row.value, row.place
    messages: list[Message] = []
    if system := _optional_text(value, "system", place):
        messages.append({"role": "system", "content": system})
    for where, item in _turns(row, "conversations"):
        speaker = _text(item, "from", where)
        role = SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise DataError(f"{where}: unknown speaker '{speaker}'", f"known: {', '.join(SHAREGPT_ROLES)}")
        text = _text(item, "value", where)
        if role != "function_call":
            messages.append({"role": role, "content": text})
            continue
        calls = _json(text, "function_call", where)
        calls = calls if isinstance(calls, list) else [calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": [_tool_call(call, where) for call in calls]})
    return Conversation(_ordered(messages, place), _tools(value.get("tools"), place), place)


_READERS: dict[str, Callable[[RawRow], Conversation]] = {
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
}


def _turns(row: RawRow, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place of the turn, turn) for each entry of row[key]."""
    if key not in row.value:
        raise DataError(f"{row.place}: '{key}' is missing", "rows of one file must have one format; see --format")
    turns = _list(row.value[key], key, row.place)
    if not turns:
        raise DataError(f"{row.place}: '{key}' is empty", "remove the row")
    for number, item in enumerate(turns):
        where = f"{row.place}: {key}[{number}]"
        if not isinstance(item, dict):
            raise DataError(f"{where} must be an object, this is {name_of_type(item)}", "write role and content")
        _refuse_unsupported(item, where)
        yield where, item


def _refuse_unsupported(item: dict[str, Any], place: str) -> None:
    for key in WEIGHT_KEYS:
        if item.get(key) not in (None, True, 1):
            raise DataError(
                f"{place}: '{key}': {item[key]!r} asks for another loss mask", "remove it, or remove the row"
            )
    for key in CONTENT_KEYS:
        if item.get(key):
            raise DataError(f"{place}: '{key}' cannot be trained on", "remove it, or remove the row")


def _ordered(messages: list[Message], place: str) -> tuple[Message, ...]:
    if any(message["role"] == "system" for message in messages[1:]):
        raise DataError(f"{place}: a system message after the first turn", "put one system message first")
    if all(message["role"] == "system" for message in messages):
        raise DataError(f"{place}: nothing but a system message", "remove the row")
    return tuple(messages)


def _text(value: dict[str, Any], key: str, place: str) -> str:
    if key not in value:
        raise DataError(f"{place}: '{key}' is missing", "rows of one file must have one format; see --format")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: '{key}' must be a string, this is {name_of_type(text)}", "write text, or remove the row"
        )
    return text


def _optional_text(value: dict[str, Any], key: str, place: str) -> str:
    return "" if value.get(key) is None else _text(value, key, place)


def _list(value: Any, key: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{place}: '{key}' must be an array, this is {name_of_type(value)}", "write [...]")
    return value


def _content(item: dict[str, Any], place: str, *, may_be_absent: bool) -> str:
    """Text of a message: a string, or text parts joined; null only beside tool calls (as the OpenAI API writes it)."""
    content = item.get("content")
    if content is None and may_be_absent:
        return ""
    if not isinstance(content, list):
        return _text(item, "content", place)
    texts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type", "unknown") if isinstance(part, dict) else name_of_type(part)
            raise DataError(f"{place}: content part of type '{kind}'", "only text parts can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _json(text: str, what: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {what} is not JSON", "write an object, or the JSON text of one") from error


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}} from any of the usual spellings."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        identifier, call = call.get("id"), call["function"]
    else:
        identifier = call.get("id") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise DataError(f"{place}: a tool call without a name", 'write {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments of a tool call", place) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: arguments of '{call['name']}' are {name_of_type(arguments)}", "write an object")
    canonical: dict[str, Any] = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return canonical | ({"id": identifier} if isinstance(identifier, str) else {})


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Tool descriptions: an array, or its JSON text as sharegpt files have it; none and empty are the same."""
    if isinstance(value, str):
        value = _json(value, "tools", place) if value.strip() else None
    if value is None or value == []:
        return None
    tools = []
    for tool in _list(value, "tools", place):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a tool without a name", 'write {"name": ..., "parameters": {...}}')
        tools.append({"type": "function", "function": function})
    return tools
