"""From messages to token ids and back: the chat template, and where an answer ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.encode.rendering import ChatTemplate
from trainer.errors import DataError, MissingInputError

Message = Mapping[str, Any]


def check_chat_template(tokenizer: Any, path: Path) -> None:
    """DataError when the tokenizer of the model in `path` has no chat template."""
    if not tokenizer.chat_template:
        raise DataError(f"{path} has no chat template", "put the chat_template.jinja of its training beside it")


class Prompts:
    """Makes prompts of conversations with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[bool, ChatTemplate] = {}
        # Longest first: the error names the whole token, not the shorter one inside it.
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control = sorted(control, key=len, reverse=True)

    def ids(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant's next answer begins.

        Raises ValueError when the template refuses the conversation (in its own words), and when a text holds what the
        tokenizer would turn into a control token: no text may open or close turns.
        """
        for number, message in enumerate(messages):
            self._refuse_control_tokens(f"messages[{number}]", message)
        self._refuse_control_tokens("tools", tools)
        try:
            text = self.text(messages, tools, prompt=True)
        except DataError as error:
            raise ValueError(error.fact) from error
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation, rendered in the sandbox and within limits of time and size.

        With `prompt` it ends where the assistant's next answer begins. DataError when the template refuses it.
        """
        with_tools = [*tools] if tools else None
        if bool(tools) not in self._templates:
            try:
                source = str(self._tokenizer.get_chat_template(None, with_tools))
            except ValueError as error:
                raise DataError(f"the tokenizer has no default chat template: {error}", "name one 'default'") from error
            self._templates[bool(tools)] = ChatTemplate(source, "the chat template", self._tokenizer.special_tokens_map)
        conversation = [dict(message) for message in messages]
        return self._templates[bool(tools)].render(conversation, with_tools, "request", prompt=prompt)[0]

    def _refuse_control_tokens(self, place: str, value: Any) -> None:
        if isinstance(value, str):
            if found := next((token for token in self._control if token in value), None):
                raise ValueError(f"{place} holds {found}, a control token of this model")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._refuse_control_tokens(place, key)
                self._refuse_control_tokens(place, item)
        elif isinstance(value, list | tuple):
            for item in value:
                self._refuse_control_tokens(place, item)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: those of the generation configuration and the tokenizer's end of sequence."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in [*found, tokenizer.eos_token_id] if token is not None})


def context_length(model: Any) -> int | None:
    """Positions the model was made for: prompt and answer together; None when it does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, at most `limit`; DataError names the file and line of a bad one."""
    rows: list[dict[str, Any]] = []
    for number, line in _lines(path):
        if limit is not None and len(rows) == limit:
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object", "one JSON object a line")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no rows", "give a file with at least one JSON object")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise MissingInputError(f"{path} does not exist", "check the path") from error
    except IsADirectoryError as error:
        raise MissingInputError(f"{path} is a directory", "give a file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", "convert it, e.g. with iconv") from error
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
