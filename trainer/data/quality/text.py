"""The texts of a record: one view to read them, one function to change them, for every kind of record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trainer.data.records import Conversation, Message, PlainText, Record, TokenIds

# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, Kana, Han (with 々 and 〇) and its
# supplementary planes. One character of them counts as one word wherever this product counts words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003fffd"
)
UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Words between white space; every character of a script without spaces (Han, Kana, Thai, ...) is a word."""
    return _WORD.findall(text) if UNSPACED_CHARACTER.search(text) else text.split()


def turns_of(record: Record) -> Iterator[tuple[str, str]]:
    """(role, text) of every text with one: system, user, assistant, tool.

    The prompt of a `PlainText` is "user", its text "assistant"; a `TokenIds` has no text.
    """
    if isinstance(record, Conversation):
        for message in record.messages:
            yield message["role"], message["content"]
    elif isinstance(record, PlainText):
        if record.prompt:
            yield "user", record.prompt
        yield "assistant", record.text


def text_of(record: Record) -> str:
    """User and assistant texts in order, a line break between them: no system text, no tool results, no template.

    A prompt with its completion is prompt + text, as training sees it; a `TokenIds` gives "".
    """
    if isinstance(record, PlainText):
        return record.prompt + record.text
    return "\n".join(text for role, text in turns_of(record) if role in ("user", "assistant"))


def answer_of(record: Record) -> str:
    """What is answered: assistant texts, a line break between them; the completion of a `PlainText`."""
    return "\n".join(text for role, text in turns_of(record) if role == "assistant")


def identity_of(record: Record) -> str:
    """The text that makes a record the same as another: `text_of`, with tool calls and reasoning.

    Two conversations that differ only in the arguments of a call are not duplicates.
    """
    if not isinstance(record, Conversation):
        return text_of(record)
    lines = []
    for message in record.messages:
        if message["role"] not in ("user", "assistant"):
            continue
        lines += [message[key] for key in ("reasoning_content", "content") if message.get(key)]
        lines += [json.dumps(call["function"], ensure_ascii=False, sort_keys=True) for call in _calls(message)]
    return "\n".join(lines)


def map_text(record: Record, change: Callable[[str], str]) -> Record:
    """The record with `change` applied to each of its texts.

    Texts are the contents of system, user, assistant and tool messages, reasoning, the string values in the arguments
    of tool calls, the prompt and the text of a `PlainText`. Descriptions of tools stay, and so does a `TokenIds`.
    """
    return map_turns(record, lambda role, text: change(text))


def map_turns(record: Record, change: Callable[[str, str], str]) -> Record:
    """`map_text` with a `change` that is also told the role: change(role, text).

    The pinned head of a conversation and the rest of its message are changed one by one, so that the head is still the
    beginning of the message afterwards.
    """
    if isinstance(record, PlainText):
        prompt = change("user", record.prompt) if record.prompt else ""
        return replace(record, prompt=prompt, text=change("assistant", record.text))
    if isinstance(record, TokenIds):
        return record
    messages, pinned = [], record.pinned
    pending = bool(pinned)
    for message in record.messages:
        role, content = message["role"], message["content"]
        changed: Message = dict(message)
        if pending and pinned in content:
            stop = content.index(pinned) + len(pinned)
            pinned = change(role, content[:stop])
            changed["content"] = pinned + (change(role, content[stop:]) if stop < len(content) else "")
            pending = False
        else:
            changed["content"] = change(role, content)
        if "reasoning_content" in message:
            changed["reasoning_content"] = change(role, message["reasoning_content"])
        if calls := _calls(message):
            changed["tool_calls"] = [_map_call(call, role, change) for call in calls]
        messages.append(changed)
    return replace(record, messages=tuple(messages), pinned=pinned)


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _map_call(call: dict[str, Any], role: str, change: Callable[[str, str], str]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": _map_value(function["arguments"], role, change)}}


def _map_value(value: Any, role: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(role, value)
    if isinstance(value, dict):
        return {key: _map_value(item, role, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_value(item, role, change) for item in value]
    return value
