"""Raw rows to records: the formats people keep training data in, and one canonical form for each kind of record.

    alpaca      {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}
    sharegpt    {"conversations": [{"from", "value"} or {"role", "content"}], "tools"?, "system"?}
    messages    {"messages": [{"role", "content", "tool_calls"?, ...}], "tools"?, "system"?}            (OpenAI)
    completion  {"prompt", "completion", "system"?, "tools"?}: both text, or both lists of messages; a chat
    continuation  {"prompt", "completion"}: plain text, one right after the other; only when told
    preference  {"prompt"?, "chosen", "rejected"}: `chosen` is the target, `rejected` is passed over
    text        {"text"}
    tokens      {"input_ids", "labels" or "loss_mask"?}

Columns with other names are told by a mapping (canonical key -> column) or found where there is one reading only; what
was found is in `Layout.mapping`. Whatever does not fit is refused with file and line; nothing is guessed or repaired.
Keys that mean nothing to training (identifiers, dates) are passed over; those that would change it and are not
understood (images, audio, fractional loss weights) are refused.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.data.records.conversations import from_alpaca, from_messages, from_sharegpt
from trainer.data.records.fields import RowView, refuse_unsupported
from trainer.data.records.layout import FORMATS, Layout, columns_of, detect_layout
from trainer.data.records.pairs import from_completion, from_continuation, from_preference
from trainer.data.records.record import Conversation, Message, PlainText, Record, TokenIds
from trainer.data.records.texts import from_text, from_tokens
from trainer.data.sources import RawRow

__all__ = [
    "FORMATS",
    "Conversation",
    "Layout",
    "Message",
    "PlainText",
    "Record",
    "TokenIds",
    "detect_layout",
    "to_record",
]

_READERS: dict[str, Callable[[RowView], Record]] = {
    "alpaca": from_alpaca,
    "sharegpt": from_sharegpt,
    "messages": from_messages,
    "completion": from_completion,
    "continuation": from_continuation,
    "preference": from_preference,
    "text": from_text,
    "tokens": from_tokens,
}


def to_record(row: RawRow, layout: Layout) -> Record:
    """One row of the given layout.

    Raises:
        DataError: naming `file:line`, what is wrong and what would be right.
    """
    columns = columns_of(row, layout)
    refuse_unsupported(row.value, row.place, columns.values())
    return _READERS[layout.format](RowView(row.value, columns, row.place))
