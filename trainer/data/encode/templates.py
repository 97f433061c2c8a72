"""Records to token ids and an exact loss mask; conversations through the tokenizer's own chat template.

How the mask of a conversation is found, in this order, per conversation:

1. `markers`: the template has `{% generation %}` blocks; what they enclose is supervised.
2. `prefix`: for every assistant turn the prompt a server would send (all earlier messages plus the generation prompt)
   is *shown* to be a prefix of the whole conversation, in text and in ids; the difference is supervised.
3. `row per turn`: the template rewrites history (drops earlier thinking, writes the stop token only at the end):
   every trained assistant turn becomes a row of its own whose prompt is exactly what a server would send.
4. otherwise the conversation is refused.

In every case the stop token after each supervised turn must be supervised too: a model that never learns it never
stops.

Text of the data never becomes a control token (see `control_tokens`).

One exception is made for reasoning models: where `<think>` and `</think>` are control tokens and the template takes
`reasoning_content`, an answer that begins with `<think>...</think>` is handed to the template in these two parts.

The rendered text is cut at the borders of *every* assistant turn before it is encoded, whether or not the turn is
trained on: no token ever straddles a border, a supervised token is conditioned on the very ids that a prompt at
inference has, and the ids of a conversation do not depend on which of its turns are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.encode.control_tokens import TextEncoder
from trainer.data.encode.fast_tokenizer import Twin
from trainer.data.encode.rendering import ChatTemplate
from trainer.data.records import Conversation, Message, PlainText, Record, TokenIds
from trainer.errors import DataError, UsageError

_THINKING = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)
_SPACE = re.compile(r"\s*")
_READS_REASONING = re.compile(r"reasoning_content|\.thinking\b|\[['\"]thinking['\"]\]")
MARKERS, PREFIX, ROW_PER_TURN, TEXT, TOKENS = "markers", "prefix", "row per turn", "text", "tokens"
MAX_WHITE_TOKENS = 4
CACHED_HEADS = 1024

Span = tuple[int, int]

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


class LostStopToken(DataError):
    """The stop token after a turn that is trained on would not be supervised."""


@dataclass(frozen=True)
class Encoded:
    """Ids of one training document and its supervised spans.

    `ids` is int64 [tokens]; `spans` are disjoint rising (start, stop) token positions whose tokens are targets; token 0
    is in none, since nothing before it predicts it;
    `method` says how the mask was found; `neutralised` holds the control-token texts of the data that stayed text;
    `turn_ends` are the token positions where turns of the assistant ended, trained or not, as far as they are known (in
    a row per turn: of its last turn); `head` is the number of tokens at the beginning that every window of the document
    should have before it (system message and tools, or an instruction before a long input), 0 for none.
    """

    ids: NDArray[np.int64]
    spans: tuple[Span, ...]
    method: str
    neutralised: tuple[str, ...] = ()
    turn_ends: tuple[int, ...] = ()
    head: int = 0

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(stop - start for start, stop in self.spans)


class _Talk(NamedTuple):
    """A conversation on its way: neutralised messages, and which of the assistant's turns are trained on."""

    messages: list[Message]
    tools: Any
    pinned: str
    neutralised: tuple[str, ...]
    template: ChatTemplate
    turns: list[int]
    wanted: list[bool]
    place: str

    def render(self, until: int, *, prompt: bool = False) -> str:
        """The text of the first `until` messages."""
        return self.template.render(self.messages[:until], self.tools, self.place, prompt=prompt)[0]


class _Cut(NamedTuple):
    """Encoded text with the token positions of assistant turns in it and whether each is trained on.

    `by_turn` is false where a span may be a part of a turn, or several turns.
    """

    text: str
    ids: list[int]
    turns: list[Span]
    trained: list[bool]
    method: str
    by_turn: bool = True


class Encoder:
    """Encodes records with one tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend; conversations need its chat template.
        train_on: all assistant turns or the last one of a conversation; flags of its messages win.
        twin: a faster encoder with the same ids (see `fast_tokenizer`).

    Raises:
        DataError: no fast backend.
        UsageError: `train_on` is neither.
    """

    def __init__(self, tokenizer: Any, train_on: Literal["all", "last"] = "all", twin: Twin | None = None) -> None:
        if train_on not in ("all", "last"):
            raise UsageError(f"cannot train on '{train_on}'", "write 'all' or 'last' (turns of the assistant)")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise DataError("the tokenizer has no tokenizer.json", "save it as a fast tokenizer first")
        self.tokenizer = tokenizer
        self._train_on = train_on
        self._vocabulary = len(tokenizer)
        # transformers looks such attributes up in several steps, every time.
        self._end_of_text: int | None = tokenizer.eos_token_id
        self._text = TextEncoder(tokenizer, twin)
        self._control_texts = tuple(self._text.contents)
        stops = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self._text.stop_ids))]
        self._stops = re.compile("|".join(map(re.escape, stops)) or "(?!)")
        self._thinks = {"<think>", "</think>"} <= set(self._control_texts)
        self._templates: dict[bool, ChatTemplate] = {}
        self._heads: dict[str, list[int]] = {}
        self._before_text = _put_before(tokenizer)

    def encode(self, record: Record) -> list[Encoded]:
        """Training documents of one record: one, or one per trained turn when the chat template needs it.

        A conversation without a trained turn gives a document without spans, or none.

        Raises:
            LostStopToken: a stop token would not be supervised.
            TwinMismatch: the twin gave other ids than the tokenizer.
            DataError: the template refuses the conversation or loses part of it, no exact mask can be found, a text has
                no end-of-text token to end with, or an id is not in the vocabulary.
        """
        if isinstance(record, Conversation):
            return self._encode_conversation(record)
        if isinstance(record, PlainText):
            return [self._encode_text(record)]
        return [self._check_ids(record)]

    def check_again(self) -> None:
        """Compare the twin's next pieces with the tokenizer; see `TextEncoder.check_again`."""
        self._text.check_again()

    # --- text and ids ---

    def _encode_text(self, record: PlainText) -> Encoded:
        """Ids of prompt, text and end-of-text token, after what the tokenizer puts before every text (bos)."""
        if self._end_of_text is None:
            raise DataError(
                f"{record.place}: the tokenizer has no end-of-text token to end a text with",
                "set eos_token in its tokenizer_config.json",
            )
        found: list[str] = []
        prompt, text = (self._text.mark(part, found, record.place) for part in (record.prompt, record.text))
        ids = [*self._before_text, *self._text.encode(prompt, first=True)]
        begin = max(len(ids), 1)
        ids += self._text.encode(text, first=not record.prompt)
        ids.append(self._end_of_text)
        spans = ((begin, len(ids)),) if begin < len(ids) else ()
        return Encoded(np.array(ids, dtype=np.int64), spans, TEXT, tuple(found))

    def _check_ids(self, record: TokenIds) -> Encoded:
        largest = int(record.ids.max(initial=0))
        if largest >= self._vocabulary:
            raise DataError(
                f"{record.place}: tokenizer/model vocabulary mismatch: id {largest} in a vocabulary of "
                f"{self._vocabulary:,}",
                "use the tokenizer that made the ids",
            )
        spans = tuple((max(start, 1), stop) for start, stop in record.spans if stop > 1)
        return Encoded(record.ids, spans, TOKENS)

    # --- conversations ---

    def _encode_conversation(self, conversation: Conversation) -> list[Encoded]:
        talk = self._prepare(conversation)
        text, marked = talk.template.render(talk.messages, talk.tools, talk.place)
        has_markers = talk.template.has_markers(talk.place)
        if not talk.turns:
            ids, _ = self._cut(text, [])
            return [self._finish(_Cut(text, ids, [], [], MARKERS if has_markers else PREFIX), talk)]
        whole = self._by_markers(talk, text, marked) if has_markers else None
        whole = whole or self._by_prefix(talk, text)
        return [self._finish(cut, talk) for cut in ([whole] if whole else self._by_row(talk))]

    def _prepare(self, conversation: Conversation) -> _Talk:
        template = self._template(conversation)
        self._check_expressible(conversation, template)
        found: list[str] = []

        def mark(value: Any) -> Any:
            return self._text.mark(value, found, conversation.place)

        messages = []
        splits = self._thinks and "reasoning_content" in template.source
        for original in conversation.messages:
            message = _split_thinking(original) if splits and original["role"] == "assistant" else original
            marked = {key: mark(value) for key, value in message.items() if key not in ("role", "tool_calls")}
            if "tool_calls" in message:
                marked["tool_calls"] = [call | {"function": mark(call["function"])} for call in message["tool_calls"]]
            if "reasoning_content" in marked:
                marked["thinking"] = marked["reasoning_content"]  # as transformers does for templates that read this
            messages.append({"role": message["role"], **marked})
        tools = conversation.tools and [tool | {"function": mark(tool["function"])} for tool in conversation.tools]
        pinned = conversation.pinned and self._text.mark(conversation.pinned, [], conversation.place)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if conversation.trained is not None:
            wanted = [conversation.trained[turn] for turn in turns]
        else:
            wanted = [self._train_on == "all" or turn == turns[-1] for turn in turns]
        return _Talk(messages, tools, pinned, tuple(found), template, turns, wanted, conversation.place)

    def _template(self, conversation: Conversation) -> ChatTemplate:
        """The template for conversations with or without tools (a tokenizer may have several by name)."""
        with_tools = conversation.tools is not None
        if with_tools not in self._templates:
            if not self.tokenizer.chat_template:
                raise DataError(
                    f"{conversation.place}: the tokenizer has no chat template, which conversations need",
                    "add chat_template.jinja to its directory, or build plain text: --format continuation or text",
                )
            try:
                source = str(self.tokenizer.get_chat_template(None, conversation.tools))
            except ValueError as error:
                raise DataError(
                    f"the tokenizer has no default chat template: {error}", "name one of them 'default'"
                ) from error
            owner = getattr(self.tokenizer, "name_or_path", "")
            name = f"the chat template of {owner}" if owner else "the chat template"
            self._templates[with_tools] = ChatTemplate(source, name, self.tokenizer.special_tokens_map)
        return self._templates[with_tools]

    def _check_expressible(self, conversation: Conversation, template: ChatTemplate) -> None:
        """Refuse what the template would drop without a word."""
        lost = []
        if conversation.tools is not None and "tools" not in template.source:
            lost.append("tools")
        if any("tool_calls" in message for message in conversation.messages) and "tool_calls" not in template.source:
            lost.append("tool_calls")
        reasons = any("reasoning_content" in message for message in conversation.messages)
        if reasons and not _READS_REASONING.search(template.source):
            lost.append("reasoning_content")
        if lost:
            raise DataError(
                f"{conversation.place}: the chat template has no place for {' and '.join(lost)}",
                "use a tokenizer whose template has, or remove them from the row",
            )

    def _cut(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids of rendered text cut at the borders of character `spans`, and the spans in tokens."""
        ids: list[int] = []
        positions: list[Span] = []
        last = 0
        for start, stop in spans:
            ids += self._text.encode(text[last:start], first=last == 0)
            begin = len(ids)
            ids += self._text.encode(text[start:stop], first=start == 0)
            positions.append((begin, len(ids)))
            last = stop
        ids += self._text.encode(text[last:], first=last == 0)
        return ids, positions

    def _finish(self, cut: _Cut, talk: _Talk) -> Encoded:
        self._check_stops(cut, talk.place)
        spans = tuple(
            (max(start, 1), stop)
            for (start, stop), trained in zip(cut.turns, cut.trained, strict=True)
            if trained and stop > max(start, 1)
        )
        return Encoded(
            np.array(cut.ids, dtype=np.int64),
            spans,
            cut.method,
            talk.neutralised,
            tuple(stop for _, stop in cut.turns),
            self._head(cut, talk, spans[0][0] if spans else len(cut.ids)),
        )

    # --- the three ways ---

    def _by_markers(self, talk: _Talk, text: str, marked: Sequence[Span]) -> _Cut | None:
        """By generation blocks; None when they do not say which turns are meant, or not of all that are trained on."""
        spans = sorted(span for span in marked if span[0] < span[1])
        contents = [talk.messages[turn]["content"].strip() for turn in talk.turns]
        apart = all(first[1] <= second[0] for first, second in pairwise(spans))
        if apart and len(spans) == len(contents):
            pairs = zip(spans, contents, strict=True)
            # Content that is nowhere in the text was rewritten by the template (it may): nothing can be compared.
            if all(text.find(content, *span) >= 0 or content not in text for span, content in pairs):
                ids, positions = self._cut(text, spans)
                return _Cut(text, ids, positions, talk.wanted, MARKERS)
        spans = _merged(spans)
        enclosed = [any(text.find(content, *span) >= 0 for span in spans) for content in contents]
        comparable = [bool(content) and content in text for content in contents]
        if any(comparable) and not any(map(_both, enclosed, comparable)):
            raise DataError(
                f"{talk.place}: the template's generation markers do not enclose the assistant's text",
                "repair the chat template, or remove its {% generation %} markers",
            )
        if not (all(talk.wanted) and all(map(_both, enclosed, comparable))):
            return None
        ids, positions = self._cut(text, spans)
        return _Cut(text, ids, positions, [True] * len(spans), MARKERS, by_turn=False)

    def _by_prefix(self, talk: _Talk, text: str) -> _Cut | None:
        """The whole conversation when every prompt is proved to be its prefix; None when one is not."""
        spans: list[Span] = []
        for turn in talk.turns:
            prompt = talk.render(turn, prompt=True) if turn else ""
            until = text if turn + 1 == len(talk.messages) else talk.render(turn + 1)
            if not prompt or not (until.startswith(prompt) and text.startswith(until)):
                return None
            if spans and spans[-1][1] > len(prompt):
                return None
            spans.append((len(prompt), self._end_of_turn(text, len(prompt), len(until))))
        ids, positions = self._cut(text, spans)
        # The first prompt is a piece of its own already.
        for (characters, _), (start, _) in list(zip(spans, positions, strict=True))[1:]:
            if list(self._text.encode(text[:characters], first=True)) != ids[:start]:
                return None
        if not all(self._ends_with_stop(ids, span) for span in positions):
            return None
        return _Cut(text, ids, positions, talk.wanted, PREFIX)

    def _by_row(self, talk: _Talk) -> list[_Cut]:
        """One document per trained turn of the assistant, supervised in that turn only."""
        rows = []
        for turn in (turn for turn, wanted in zip(talk.turns, talk.wanted, strict=True) if wanted):
            prompt = talk.render(turn, prompt=True) if turn else ""
            text = talk.render(turn + 1)
            if not prompt or not text.startswith(prompt):
                raise DataError(
                    f"{talk.place}: no exact loss mask: the prompt of assistant turn {turn} is not the "
                    "beginning of the conversation that the chat template writes",
                    "put {% generation %} markers into the chat template",
                )
            text = text[: self._end_of_turn(text, len(prompt), len(text))]
            ids, positions = self._cut(text, [(len(prompt), len(text))])
            rows.append(_Cut(text, ids, positions, [True], ROW_PER_TURN))
        return rows

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """`stop` without white space that follows an added token: nothing is generated after the stop token."""
        stripped = text[start:stop].rstrip()
        return start + len(stripped) if stripped.endswith(self._control_texts) else stop

    # --- the stop token ---

    def _ends_with_stop(self, ids: list[int], span: Span) -> bool:
        """Whether nothing but white space follows the last control token of a span."""
        tail = ids[max(span[0], span[1] - MAX_WHITE_TOKENS - 1) : span[1]]
        at = next((at for at in range(len(tail) - 1, -1, -1) if tail[at] in self._text.stop_ids), None)
        if at is None:
            return False
        after = tail[at + 1 :]
        return not after or not str(self.tokenizer.decode(after)).strip()

    def _check_stops(self, cut: _Cut, place: str) -> None:
        """Every trained turn ends with a stop token; of a part of a turn, the next stop token is supervised."""
        supervised = [span for span, trained in zip(cut.turns, cut.trained, strict=True) if trained]
        for span in supervised:
            if self._ends_with_stop(cut.ids, span):
                continue
            ends = [start for start, _ in cut.turns if start >= span[1]] if cut.by_turn else []
            until = ends[0] if ends else len(cut.ids)
            following = next((at for at in range(span[1], until) if cut.ids[at] in self._text.stop_ids), None)
            if following is None:
                fact = f"{place}: the stop token is lost: the chat template writes none after the assistant's turn"
            elif any(start <= following < stop for start, stop in supervised):
                continue
            else:
                token = self.tokenizer.convert_ids_to_tokens(cut.ids[following])
                fact = f"{place}: the stop token is lost: {token!r} after the assistant's turn is not supervised"
            raise LostStopToken(
                fact, "let the chat template write the stop token inside {% generation %}, after the assistant's text"
            )

    # --- the head ---

    def _head(self, cut: _Cut, talk: _Talk, limit: int) -> int:
        """Tokens of the pinned head, at most `limit`; encoded alone it must give the same ids."""
        end = self._pinned_characters(cut.text, talk) if talk.pinned else 0
        if not end:
            return 0
        text = cut.text[:end]
        head = self._heads.get(text)
        if head is None:
            if len(self._heads) >= CACHED_HEADS:
                self._heads.clear()
            head = self._heads[text] = list(self._text.encode(text, first=True))
        if cut.ids[: len(head)] == head:
            return min(len(head), limit)
        same = next(at for at, token in enumerate([*head, -1]) if at == len(cut.ids) or token != cut.ids[at])
        return min(same, limit)

    def _pinned_characters(self, text: str, talk: _Talk) -> int:
        """Where the pinned text ends, with the control token and white space that close its turn; 0 if not found."""
        pinned = talk.pinned.strip()
        contents = [message["content"].strip() for message in talk.messages]
        is_system = talk.messages[0]["role"] == "system"
        if is_system and contents[0] == pinned:
            index: int | None = 0
        else:
            later = range(int(is_system), len(contents))
            index = next((index for index in later if contents[index].startswith(pinned)), None)
        # The whole content that begins with it is in no other place; the text alone ("translate") might be.
        at = text.find(pinned) if index is None else text.find(contents[index])
        if not pinned or at < 0:
            return 0
        end = at + len(pinned)
        if talk.tools and is_system and index == 0:
            # Most templates describe the tools in the system turn, after its text.
            following = text.find(contents[1], end)
            closing = self._stops.search(text, end, following if following >= 0 else len(text))
            end = closing.start() if closing else end
        end = _after_space(text, end)
        control = self._text.pattern.match(text, end)
        return _after_space(text, control.end()) if control else end


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _both(one: bool, other: bool) -> bool:
    return one and other


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Rising spans, those that touch or overlap made one."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _split_thinking(message: Message) -> Message:
    found = None if "reasoning_content" in message else _THINKING.match(message["content"])
    if not found:
        return message
    return message | {"reasoning_content": found.group(1).strip("\n"), "content": found.group(2)}


def _put_before(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text (bos), so that plain text is trained on as it is prompted."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    at = next((start for start in starts if whole[start : start + len(bare)] == bare), 0)
    return whole[:at]
