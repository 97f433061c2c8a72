"""Rows that hold a prompt and what shall follow it: completions, continuations and preference pairs."""

from __future__ import annotations

from typing import Any

from trainer.data.records.conversations import Flag, assemble, read_message, read_messages
from trainer.data.records.fields import RowView, missing
from trainer.data.records.record import Conversation, Message, PlainText
from trainer.data.sources import name_of_type
from trainer.errors import DataError


def from_completion(row: RowView) -> Conversation:
    """A chat: two texts are a turn of the user and one of the assistant, two lists are turns."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, (list, dict)):
        messages, flags = read_messages(prompt, row.name("prompt"), row.place)
        answer, answer_flags = _turns(completion, row.name("completion"), row.place)
        return assemble(row, messages + answer, flags + answer_flags, untrained=len(messages))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            f"{row.place}: '{row.name('prompt')}' is {name_of_type(prompt)} and '{row.name('completion')}' "
            f"{name_of_type(completion)}",
            "write two strings, or two arrays of messages",
        )
    return _from_strings(row, "completion")


def from_continuation(row: RowView) -> PlainText:
    """Two texts, one right after the other, without a chat template."""
    return PlainText(row.text("prompt"), row.text("completion"), row.place)


def from_preference(row: RowView) -> Conversation:
    """`chosen` is the target: a text, a message, or messages, which may begin with the prompt."""
    name, place = row.name("chosen"), row.place
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if prompt is None:
        if isinstance(chosen, (str, dict)):
            raise DataError(f"{place}: '{name}' has no prompt", "map 'prompt', or give whole conversations")
        messages, flags = _required(row, "chosen")
        return assemble(row, messages, flags, untrained=_shared(chosen, row.get("rejected")))
    if isinstance(prompt, str) and isinstance(chosen, str):
        return _from_strings(row, "chosen")
    if isinstance(prompt, str):
        before: tuple[list[Message], list[Flag]] = [{"role": "user", "content": prompt}], [None]
    else:
        before = read_messages(prompt, row.name("prompt"), place)
    if isinstance(chosen, str):
        after: tuple[list[Message], list[Flag]] = [{"role": "assistant", "content": chosen}], [None]
    else:
        after = _required(row, "chosen")
    if after[0][0]["role"] == "assistant":
        return assemble(row, before[0] + after[0], before[1] + after[1], untrained=len(before[0]))
    # `chosen` is the whole conversation, so what it says about the prompt must be what the prompt says.
    count = len(before[0])
    if isinstance(prompt, str):
        said = [index for index, message in enumerate(after[0]) if message == before[0][0]]
        count = said[-1] + 1 if said else 0
    if not count or after[0][:count][-len(before[0]) :] != before[0]:
        raise DataError(f"{place}: '{name}' does not begin with '{row.name('prompt')}'", "remove one of them")
    return assemble(row, *after, untrained=count)


def _from_strings(row: RowView, target: str) -> Conversation:
    messages = [{"role": "user", "content": row.text("prompt")}, {"role": "assistant", "content": row.text(target)}]
    return assemble(row, messages, [None, None])


def _turns(value: list[Any] | dict[str, Any], name: str, place: str) -> tuple[list[Message], list[Flag]]:
    if isinstance(value, list):
        return read_messages(value, name, place)
    message, flag = read_message(value, f"{place}: {name}")
    return [message], [flag]


def _required(row: RowView, key: str) -> tuple[list[Message], list[Flag]]:
    value, name = row.get(key), row.name(key)
    if name not in row.value:
        raise missing(row.value, name, row.place)
    return _turns(value, name, row.place)


def _shared(chosen: Any, rejected: Any) -> int:
    """Turns at the beginning of both answers: the prompt."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return 0
    same = [one == other for one, other in zip(chosen, rejected, strict=False)]
    count = same.index(False) if False in same else len(same)
    return 0 if count == len(chosen) else count
