"""Rows that hold a conversation: alpaca, sharegpt and OpenAI messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer.data.records.fields import (
    RowView,
    flag_of,
    json_of,
    list_of,
    missing,
    optional_text_of,
    refuse_contents,
    shorten,
    text_of,
)
from trainer.data.records.record import Conversation, Message
from trainer.data.sources import name_of_type
from trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# What people call the speakers; `function_call` is an assistant's turn that is nothing but calls.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "system": "system",
    "developer": "system",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

Flag = bool | None


def from_alpaca(row: RowView) -> Conversation:
    """Instruction and input make the user's message; `history` comes before it."""
    instruction, extra, answer = row.text("instruction"), row.optional_text("input"), row.text("output")
    messages: list[Message] = []
    system = row.optional_text("system")
    if system:
        messages.append({"role": "system", "content": system})
    history = row.get("history")
    pairs = [] if history is None else list_of(history, row.name("history"), row.place)
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            raise DataError(
                f"{row.place}: {row.name('history')}[{number}] must be a pair of strings", "write [question, answer]"
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n{extra}" if extra.strip() else instruction
    if not question.strip():
        raise DataError(
            f"{row.place}: {row.name('instruction')} and {row.name('input')} are empty",
            "remove the row or fill it in",
        )
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    # What comes before an instruction (the system message) is pinned with it; a history can be of any length.
    pinned = instruction if extra.strip() and not pairs else system
    return Conversation(tuple(messages), None, row.place, pinned=pinned)


def from_messages(row: RowView) -> Conversation:
    """OpenAI chat rows."""
    return _from_turns(row, "messages")


def from_sharegpt(row: RowView) -> Conversation:
    """Sharegpt rows, also those whose turns have role and content."""
    return _from_turns(row, "conversations")


def _from_turns(row: RowView, key: str) -> Conversation:
    name = row.name(key)
    if row.get(key) is None and name not in row.value:
        raise missing(row.value, name, row.place)
    messages, flags = read_messages(row.get(key), name, row.place)
    return assemble(row, messages, flags)


def assemble(row: RowView, messages: list[Message], flags: list[Flag], untrained: int = 0) -> Conversation:
    """A conversation of `messages`, with the row's system text and tools.

    Args:
        row: where system and tools come from.
        messages: in order.
        flags: what each message says about being trained on.
        untrained: so many messages at the beginning are not trained on unless they say so.
    """
    if system := row.optional_text("system"):
        messages, flags = [{"role": "system", "content": system}, *messages], [None, *flags]
        untrained += bool(untrained)
    if any(message["role"] == "system" for message in messages[1:]):
        raise DataError(f"{row.place}: a system message after the first turn", "put one system message first")
    if all(message["role"] == "system" for message in messages):
        raise DataError(f"{row.place}: nothing but a system message", "remove the row")
    speaks = [message["role"] == "assistant" for message in messages]
    trained = None
    if untrained or any(flag is not None for flag in flags):
        trained = tuple(
            said and (index >= untrained if flag is None else flag)
            for index, (said, flag) in enumerate(zip(speaks, flags, strict=True))
        )
    pinned = messages[0]["content"] if messages[0]["role"] == "system" else ""
    tools = tools_of(row.get("tools"), row.place)
    return Conversation(tuple(messages), tools, row.place, trained, pinned)


def read_messages(turns: Any, key: str, place: str) -> tuple[list[Message], list[Flag]]:
    """Canonical messages of an array of turns, and for each whether it says that it is trained on.

    Raises:
        DataError: with the index of the turn.
    """
    if not list_of(turns, key, place):
        raise DataError(f"{place}: '{key}' is empty", "remove the row")
    messages, flags = [], []
    for number, turn in enumerate(turns):
        message, flag = read_message(turn, f"{place}: {key}[{number}]")
        messages.append(message)
        flags.append(flag)
    return messages, flags


def read_message(turn: Any, place: str) -> tuple[Message, Flag]:
    """One turn in either spelling (role and content, or from and value).

    Raises:
        DataError: naming `place` and what is wrong.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{place} must be an object, this is {name_of_type(turn)}", "write role and content")
    refuse_contents(turn, place)
    if turn.get("role") is None and ("from" in turn or "value" in turn):
        role, text_key = _role(turn, "from", place), "value"
    else:
        role, text_key = _role(turn, "role", place), "content"
    flag = flag_of(turn, place)
    if role == "function_call":
        calls = json_of(text_of(turn, text_key, place), "function_call", place)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": [_tool_call(call, place) for call in calls]}, flag
    calls = _calls(turn, place)
    if calls and role != "assistant":
        raise DataError(f"{place}: tool_calls on role '{role}'", "only the assistant calls tools")
    message: Message = {"role": role, "content": _content(turn, text_key, place, may_be_absent=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if text := optional_text_of(turn, key, place):
            message[key] = text
    reasoning = _reasoning(turn, place)
    if reasoning and role != "assistant":
        raise DataError(f"{place}: reasoning on role '{role}'", "only the assistant reasons")
    if reasoning:
        message["reasoning_content"] = reasoning
    if role == "assistant":
        return message, flag
    # A weight of 1 on other roles is what everything has; `train` asks for something there is not.
    if flag and turn.get("weight") is None:
        raise DataError(f"{place}: role '{role}' is not trained on", "only the assistant's turns are: remove the flag")
    return message, None


def _role(turn: dict[str, Any], key: str, place: str) -> str:
    said = text_of(turn, key, place)
    role = SPEAKERS.get(said)
    if role is not None:
        return role
    if key == "role":
        raise DataError(f"{place}: unknown role '{shorten(said)}'", f"known roles: {', '.join(ROLES)}")
    raise DataError(f"{place}: unknown speaker '{shorten(said)}'", f"known: {', '.join(SPEAKERS)}")


def _reasoning(turn: dict[str, Any], place: str) -> str:
    found = {text for key in REASONING_KEYS if key in turn and (text := optional_text_of(turn, key, place))}
    if len(found) > 1:
        raise DataError(f"{place}: {' and '.join(REASONING_KEYS)} disagree", "keep one of them")
    return found.pop() if found else ""


def _content(turn: dict[str, Any], key: str, place: str, *, may_be_absent: bool) -> str:
    """Text of a message: a string, or text parts joined; null only beside tool calls (as the OpenAI API writes it)."""
    content = turn.get(key)
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if not isinstance(content, list):
        return text_of(turn, key, place)
    texts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type", "unknown") if isinstance(part, dict) else name_of_type(part)
            kind = shorten(kind) if isinstance(kind, str) else name_of_type(kind)
            raise DataError(f"{place}: content part of type '{kind}'", "only text parts can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _calls(turn: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Tool calls of a message: `tool_calls`, or the older `function_call` for a single one."""
    calls, call = turn.get("tool_calls"), turn.get("function_call")
    if isinstance(calls, str):
        calls = json_of(calls, "tool_calls", place) if calls.strip() else None
    found = [] if calls is None else [_tool_call(item, place) for item in list_of(calls, "tool_calls", place)]
    if call is None:
        return found
    if found:
        raise DataError(f"{place}: both tool_calls and function_call", "keep tool_calls")
    return [_tool_call(call, place)]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}} from any of the usual spellings."""
    identifier = call.get("id") if isinstance(call, dict) else None
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise DataError(f"{place}: a tool call without a name", 'write {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = json_of(arguments, "arguments of a tool call", place) if arguments.strip() else None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise DataError(
            f"{place}: arguments of '{shorten(call['name'])}' are {name_of_type(arguments)}", "write an object"
        )
    canonical: dict[str, Any] = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return canonical | ({"id": identifier} if isinstance(identifier, str) else {})


def tools_of(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Tool descriptions: an array, or its JSON text as sharegpt files have it; none and empty are the same."""
    if value is None:
        return None
    if isinstance(value, str):
        value = json_of(value, "tools", place) if value.strip() else None
    if value is None or value == []:
        return None
    return list(_described(list_of(value, "tools", place), place))


def _described(tools: Iterable[Any], place: str) -> Iterable[dict[str, Any]]:
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a tool without a name", 'write {"name": ..., "parameters": {...}}')
        yield {"type": "function", "function": function}
