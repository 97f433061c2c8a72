"""Conversations to token ids and an exact loss mask, through the tokenizer's own chat template.

How the mask is found, in this order, per conversation:

1. `markers`: the template has `{% generation %}` blocks; what they enclose is supervised.
2. `prefix`: for every assistant turn the prompt a server would send (all earlier messages plus the generation prompt)
   is *shown* to be a prefix of the whole conversation, in text and in ids; the difference is supervised.
3. `row per turn`: the template rewrites history (drops earlier thinking, writes the stop token only at the end):
   every assistant turn becomes a row of its own whose prompt is exactly what a server would send.
4. otherwise the conversation is refused.

In every case the stop token after each supervised turn must be supervised too: a model that never learns it never
stops.

Text of the data never becomes a control token (see `control_tokens`).

One exception is made for reasoning models: where `<think>` and `</think>` are control tokens and the template takes
`reasoning_content`, an answer that begins with `<think>...</think>` is handed to the template in these two parts.

The rendered text is cut at every border of a supervised span before it is encoded, so no token ever straddles a
border and a supervised token is conditioned on the very ids that a prompt at inference has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.control_tokens import TextEncoder
from trainer.data.records import Conversation, Message
from trainer.errors import DataError

_MARKER_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THINKING = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)
MARKERS, PREFIX, ROW_PER_TURN = "markers", "prefix", "row per turn"
MAX_WHITE_TOKENS = 4

# ChatML turns; everything the assistant must produce, the stop token included, is inside generation markers.
DEFAULT_CHAT_TEMPLATE = """\
{%- set opening = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools %}
{{- '<|im_start|>system\\n' + (opening + '\\n\\n' if opening else '') }}
{{- 'Tools you may call, one JSON description a line:\\n' }}
{%- for tool in tools %}{{ (tool.function if tool.function is defined else tool) | tojson + '\\n' }}{% endfor %}
{{- 'To call one, answer:\\n<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><|im_end|>\\n' }}
{%- elif opening %}
{{- '<|im_start|>system\\n' + opening + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>{"name": ' + call.function.name | tojson + ', "arguments": ' }}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
{{- '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


@dataclass(frozen=True)
class Encoded:
    """Ids of one training document and its supervised spans.

    `ids` is int64 [tokens]; `spans` are disjoint rising (start, stop) token positions whose tokens are targets;
    `method` says how the mask was found; `neutralised` holds the control-token texts of the data that stayed text.
    """

    ids: NDArray[np.int64]
    spans: tuple[tuple[int, int], ...]
    method: str
    neutralised: tuple[str, ...] = ()

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(stop - start for start, stop in self.spans)


class Encoder:
    """Encodes conversations with one tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template and a `tokenizers` backend.

    Raises:
        DataError: no chat template, or no fast backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template", "add chat_template.jinja to its directory")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise DataError("the tokenizer has no tokenizer.json", "save it as a fast tokenizer first")
        self._text = TextEncoder(tokenizer)
        template = tokenizer.chat_template
        written = template if isinstance(template, str) else "".join(template.values())
        self._splits_thinking = {"<think>", "</think>"} <= set(self._text.contents) and "reasoning_content" in written

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """Training documents of one conversation: one, or one per assistant turn when the template needs it.

        A conversation without an assistant turn gives one document without spans.

        Raises:
            DataError: the template refuses the conversation or loses part of it, no exact mask can be found, or the
                stop token would not be supervised.
        """
        self._check_expressible(conversation)
        messages, tools, neutralised = self._neutralise(conversation)
        spans = self._marked_spans(conversation, messages, tools)
        if spans is not None:
            text, found = spans
            encoded = [self._encode_spans(text, found, MARKERS)]
        else:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            whole = self._by_prefix(conversation, messages, tools, turns)
            encoded = [whole] if whole else self._by_row(conversation, messages, tools, turns)
        for document in encoded:
            self._check_stop(document, conversation.place)
        return [replace(document, neutralised=tuple(neutralised)) for document in encoded]

    def is_stop(self, token: int) -> bool:
        """Whether a token can end a turn: the tokenizer's eos or another special token."""
        return token in self._text.stop_ids

    # --- rendering ---

    def _template(self, tools: Any) -> str:
        """The template for conversations with or without tools (a tokenizer may have several by name)."""
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:
            raise DataError(
                f"the tokenizer has no default chat template: {error}", "name one of them 'default'"
            ) from error

    def _render(self, conversation: Conversation, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:
            raise _template_refuses(conversation, error) from error
        return str(text)

    def _render_marked(
        self, conversation: Conversation, messages: list[Message], tools: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text and the character spans inside generation markers (transformers' own tracker)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, spans = render_jinja_template(
                [present],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _template_refuses(conversation, error) from error
        return texts[0], spans[0]

    def _check_expressible(self, conversation: Conversation) -> None:
        """Refuse what the template would drop without a word."""
        template = self._template(conversation.tools)
        lost = [
            name
            for name, used in (
                ("tools", conversation.tools is not None),
                ("tool_calls", any("tool_calls" in message for message in conversation.messages)),
                ("reasoning_content", any("reasoning_content" in message for message in conversation.messages)),
            )
            if used and name not in template
        ]
        if lost:
            raise DataError(
                f"{conversation.place}: the chat template has no place for {' and '.join(lost)}",
                "use a tokenizer whose template has, or remove them from the row",
            )

    def _neutralise(self, conversation: Conversation) -> tuple[list[Message], Any, list[str]]:
        """Messages and tools with control-token texts marked, and these texts."""
        found: list[str] = []

        def mark(value: Any) -> Any:
            return self._text.mark(value, found, conversation.place)

        messages = []
        for message in map(self._split_thinking, conversation.messages):
            marked = {key: mark(value) for key, value in message.items() if key not in ("role", "tool_calls")}
            if "tool_calls" in message:
                marked["tool_calls"] = [call | {"function": mark(call["function"])} for call in message["tool_calls"]]
            messages.append({"role": message["role"], **marked})
        tools = conversation.tools and [tool | {"function": mark(tool["function"])} for tool in conversation.tools]
        return messages, tools, found

    def _split_thinking(self, message: Message) -> Message:
        if not self._splits_thinking or message["role"] != "assistant" or "reasoning_content" in message:
            return message
        found = _THINKING.match(message["content"])
        if not found:
            return message
        return message | {"reasoning_content": found.group(1).strip("\n"), "content": found.group(2)}

    # --- the three ways ---

    def _encode_spans(self, text: str, spans: list[tuple[int, int]], method: str) -> Encoded:
        """Encode rendered text cut at the borders of character `spans`."""
        ids: list[int] = []
        positions: list[tuple[int, int]] = []
        last = 0
        for start, stop in [*spans, (len(text), len(text))]:
            ids += self._text.encode(text[last:start], first=last == 0)
            begin = len(ids)
            ids += self._text.encode(text[start:stop], first=start == 0)
            if len(ids) > begin:
                positions.append((begin, len(ids)))
            last = stop
        return Encoded(np.array(ids, dtype=np.int64), tuple(positions), method)

    def _marked_spans(
        self, conversation: Conversation, messages: list[Message], tools: Any
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """Character spans by generation markers; None when the template has none."""
        if not _MARKER_TAG.search(self._template(tools)):
            return None
        text, found = self._render_marked(conversation, messages, tools)
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            elif start < stop:
                spans.append((start, stop))
        contents = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        contents = [content for content in contents if content and content in text]
        enclosed = any(content in text[start:stop] for start, stop in spans for content in contents)
        if contents and not enclosed:
            raise DataError(
                f"{conversation.place}: the template's generation markers do not enclose the assistant's text",
                "repair the chat template, or remove its {% generation %} markers",
            )
        return text, spans

    def _by_prefix(
        self, conversation: Conversation, messages: list[Message], tools: Any, turns: list[int]
    ) -> Encoded | None:
        """The whole conversation when every prompt is proved to be its prefix; None when one is not."""
        text = self._render(conversation, messages, tools)
        spans = []
        prompts = []
        for turn in turns:
            prompt = self._render(conversation, messages[:turn], tools, prompt=True) if turn else ""
            until = self._render(conversation, messages[: turn + 1], tools)
            if not (until.startswith(prompt) and text.startswith(until)) or not prompt:
                return None
            prompts.append(prompt)
            spans.append((len(prompt), self._end_of_turn(text, len(prompt), len(until))))
        if any(spans[i][1] > spans[i + 1][0] for i in range(len(spans) - 1)):
            return None
        encoded = self._encode_spans(text, spans, PREFIX)
        for prompt, (start, _) in zip(prompts, encoded.spans, strict=False):
            if self._text.encode(prompt, first=True) != encoded.ids[:start].tolist():
                return None
        if len(encoded.spans) != len(turns) or not all(self._ends_with_stop(encoded, span) for span in encoded.spans):
            return None
        return encoded

    def _by_row(
        self, conversation: Conversation, messages: list[Message], tools: Any, turns: list[int]
    ) -> list[Encoded]:
        """One document per assistant turn, supervised in that turn only."""
        documents = []
        for turn in turns:
            prompt = self._render(conversation, messages[:turn], tools, prompt=True) if turn else ""
            text = self._render(conversation, messages[: turn + 1], tools)
            if not prompt or not text.startswith(prompt):
                raise DataError(
                    f"{conversation.place}: no exact loss mask: the prompt of assistant turn {turn} is not the "
                    "beginning of the conversation that the chat template writes",
                    "put {% generation %} markers into the chat template",
                )
            end = self._end_of_turn(text, len(prompt), len(text))
            documents.append(self._encode_spans(text[:end], [(len(prompt), end)], ROW_PER_TURN))
        return documents

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """`stop` without white space that follows an added token: nothing is generated after the stop token."""
        stripped = text[start:stop].rstrip()
        matches = list(self._text.pattern.finditer(stripped))
        return start + len(stripped) if matches and matches[-1].end() == len(stripped) else stop

    # --- the stop token ---

    def _ends_with_stop(self, document: Encoded, span: tuple[int, int]) -> bool:
        """Whether nothing but white space follows the last control token of a span."""
        tail: list[int] = []
        for token in document.ids[span[0] : span[1]][::-1].tolist():
            if token in self._text.stop_ids:
                return not tail or not str(self.tokenizer.decode(tail[::-1])).strip()
            tail.append(token)
            if len(tail) > MAX_WHITE_TOKENS:
                break
        return False

    def _check_stop(self, document: Encoded, place: str) -> None:
        """Every supervised span ends with a stop token, or the next control token of the turn is supervised."""
        for span in document.spans:
            if self._ends_with_stop(document, span):
                continue
            following = next((i for i in range(span[1], len(document.ids)) if self.is_stop(int(document.ids[i]))), None)
            if following is None:
                fact = f"{place}: the stop token is lost: the chat template writes none after the assistant's turn"
            elif any(start <= following < stop for start, stop in document.spans):
                continue
            else:
                token = self.tokenizer.convert_ids_to_tokens(int(document.ids[following]))
                fact = f"{place}: the stop token is lost: {token!r} after the assistant's turn is not supervised"
            raise DataError(
                fact, "let the chat template write the stop token inside {% generation %}, after the assistant's text"
            )


@lru_cache(maxsize=4)
def _encoder_of(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


def _template_refuses(conversation: Conversation, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{conversation.place}: the chat template refuses this conversation: {reason}",
        "change the row, or use a tokenizer whose template takes such conversations",
    )


def encode_conversation(tokenizer: Any, conversation: Conversation) -> list[Encoded]:
    """Training documents of one conversation; see `Encoder.encode`."""
    return _encoder_of(tokenizer).encode(conversation)
