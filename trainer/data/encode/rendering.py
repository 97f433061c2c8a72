"""A tokenizer's chat template as a function from messages to text, exactly as transformers renders it, but bounded.

A chat template is a program from the internet. transformers runs it in a sandbox without limits of time and size; here
it is compiled by transformers' own environment (same filters, same rules) with these limits added, and the character
spans inside `{% generation %}` blocks are recorded on the way.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from trainer.data.records import Message
from trainer.errors import DataError

SECONDS = 1.5
TICK_SECONDS = 0.05
MAX_CHARACTERS = 64 << 20
MAX_GROWTH_BYTES = 1 << 30
MAX_BITS = 1 << 16

# The sandbox looks for these before it looks for keys.
_NAMES_OF_DICT = frozenset(dir(dict))

# No template can name this filter.
_RECORD = "{% generation %}"

_ENVIRONMENT = "{# the environment of chat templates #}"


class _TooMuch(Exception):
    """The template went beyond a limit."""


class _GenerationBlocks(Extension):
    """Records which characters `{% generation %}` blocks wrote.

    Like transformers' own extension, whose place it takes, but in time linear in the text: that one joins everything
    rendered so far at each block. Here a block is text that goes through a filter. `rendered` counts the characters
    before the block that is being rendered.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set)
    priority = 200  # parsed instead of transformers' extension, which has the same tag and priority 100

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.rendered = 0
        self.spans: list[tuple[int, int]] = []
        self.present = False

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.present = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if _leaves_a_loop(body):
            parser.fail("a loop is left inside a generation block", line)
        return nodes.FilterBlock(body, nodes.Filter(None, _RECORD, [], [], None, None)).set_lineno(line)

    def record(self, text: str) -> str:
        """The filter that every block becomes."""
        self.spans.append((self.rendered, self.rendered + len(text)))
        return text


def _leaves_a_loop(body: Iterable[nodes.Node]) -> bool:
    """Whether there is a `break` or `continue` of a loop outside: the text of the block would be lost."""
    return any(
        isinstance(node, (nodes.Break, nodes.Continue))
        or (not isinstance(node, nodes.For) and _leaves_a_loop(node.iter_child_nodes()))
        for node in body
    )


class ChatTemplate:
    """One chat template, compiled once.

    Args:
        source: the template.
        name: what messages call it, e.g. "the chat template of /models/x".
        special_tokens: names and texts that templates may use (`eos_token`, ...).
    """

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self.name = name
        self._constants = {**special_tokens, "documents": None}
        self._compiled: Any = None
        self._blocks: Any = None

    def has_markers(self, place: str) -> bool:
        """Whether it has `{% generation %}` blocks."""
        self._compile(place)
        return bool(self._blocks.present)

    def render(
        self, messages: Sequence[Message], tools: Any, place: str, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans inside generation blocks, as they were written.

        Args:
            messages: in canonical form, without null values.
            tools: descriptions of tools, or None.
            place: `file:line` for messages.
            prompt: end with the beginning of the assistant's next turn.

        Raises:
            DataError: the template refuses the conversation, or runs for too long, or writes too much.
        """
        compiled = self._compile(place)
        blocks = self._blocks
        blocks.rendered, blocks.spans = 0, []
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": prompt, **self._constants}
        parts = []
        try:
            with _Bounds():
                for part in compiled.generate(variables):
                    parts.append(part)
                    blocks.rendered += len(part)
                    if blocks.rendered > MAX_CHARACTERS:
                        raise _TooMuch(f"writes more than {MAX_CHARACTERS >> 20} Mi characters")
        except Exception as error:
            raise self._refusal(error, place) from error
        return "".join(parts), blocks.spans

    def _compile(self, place: str) -> Any:
        if self._compiled is None:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            environment = _compile_jinja_template(_ENVIRONMENT).environment.overlay(extensions=[_GenerationBlocks])
            # A single operation cannot be interrupted; these two are the ones that can take for ever.
            environment.intercepted_binops = frozenset({"*", "**"})
            environment.binop_table = {**environment.binop_table, "*": _product, "**": _power}
            environment.getattr = _sooner_for_keys(environment)
            self._blocks = environment.extensions[_GenerationBlocks.identifier]
            environment.filters = {**environment.filters, _RECORD: self._blocks.record}
            try:
                with _Bounds():
                    self._compiled = environment.from_string(self.source)
            except Exception as error:
                raise self._refusal(error, place) from error
            # A render copies the globals; a plain dict is copied ten times as fast as jinja2's chained one.
            self._compiled.globals = dict(self._compiled.globals)
        return self._compiled

    def _refusal(self, error: Exception, place: str) -> DataError:
        if isinstance(error, _TooMuch):
            return DataError(f"{place}: {self.name} {error}", "repair it, or use another tokenizer")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return DataError(
            f"{place}: {self.name} refuses this conversation: {reason}",
            "change the row, or use a tokenizer whose template takes such conversations",
        )


def _sooner_for_keys(environment: Any) -> Callable[[Any, str], Any]:
    """The sandbox's own `getattr`, without its detours for the keys of messages."""
    of_sandbox, undefined = environment.getattr, environment.undefined

    def getattr_or_key(value: Any, name: str) -> Any:
        if type(value) is not dict or name in _NAMES_OF_DICT:
            return of_sandbox(value, name)
        return value[name] if name in value else undefined(obj=value, name=name)

    return getattr_or_key


def _product(left: Any, right: Any) -> Any:
    for one, times in ((left, right), (right, left)):
        if not isinstance(times, int):
            continue
        if isinstance(one, (str, bytes, list, tuple)) and len(one) * times > MAX_CHARACTERS:
            raise _TooMuch(f"writes more than {MAX_CHARACTERS >> 20} Mi characters")
        if isinstance(one, int) and one.bit_length() + times.bit_length() > MAX_BITS:
            raise _TooMuch("multiplies beyond reason")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise _TooMuch("raises to a power beyond reason")
    return base**exponent


class _Bounds:
    """Raises `_TooMuch` in the block when it computes for SECONDS or takes MAX_GROWTH_BYTES of memory.

    A timer of processor time interrupts it, so a machine that is busy with other things refuses nothing. Timers belong
    to the main thread: elsewhere, and where a profiler has this timer, there is no limit. A block that ends before the
    first tick costs a microsecond or two; for this the handler of the ticks, once set, stays.
    """

    _entered: _Bounds | None = None
    _handles_ticks = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread() or not _Bounds._can_handle_ticks():
            return
        # It ticks again, should something in between swallow the exception.
        others = signal.setitimer(signal.ITIMER_PROF, TICK_SECONDS, TICK_SECONDS)
        if others != (0.0, 0.0):
            signal.setitimer(signal.ITIMER_PROF, *others)
            return
        self._began = self._peak = -1.0
        _Bounds._entered = self

    def __exit__(self, *error: object) -> None:
        if _Bounds._entered is self:
            _Bounds._entered = None
            signal.setitimer(signal.ITIMER_PROF, 0)

    @classmethod
    def _can_handle_ticks(cls) -> bool:
        if not cls._handles_ticks and signal.getsignal(signal.SIGPROF) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGPROF, cls._tick)
            cls._handles_ticks = True
        return cls._handles_ticks

    @classmethod
    def _tick(cls, number: int, frame: FrameType | None) -> None:
        if cls._entered is not None:
            cls._entered._check()

    def _check(self) -> None:
        if self._began < 0:
            self._began, self._peak = time.thread_time(), _peak_bytes()
        elif time.thread_time() - self._began > SECONDS:
            raise _TooMuch(f"runs for more than {SECONDS} s: it may loop for ever")
        elif _peak_bytes() - self._peak > MAX_GROWTH_BYTES:
            raise _TooMuch(f"takes more than {MAX_GROWTH_BYTES >> 30} GiB of memory")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
