"""Chat templates are rendered as transformers renders them, within bounds of time, size and memory."""

import re
import signal
import threading
import time
from typing import Any

import pytest

from tests.support.corpora import conversation, tiny_tokenizer
from tests.unit.test_data_templates import WEATHER
from trainer.data.encode import rendering
from trainer.data.encode.rendering import ChatTemplate
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE, Encoder
from trainer.errors import DataError

# What chat templates use of the sandbox that transformers gives them.
BUSY = """\
{#- a comment with {% generation %} -#}
{%- set ns = namespace(last=-1, system='') -%}
{%- macro named(message) -%}{{ '<' ~ message.role ~ '>' }}{%- endmacro -%}
{{ bos_token }}{{ strftime_now('%Y') }}
    {% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
  {{ named(message) }}{{ message['content'] | trim }}{{ ' ' * 2 }}
{% set ns.last = loop.index0 %}
{%- if message.thinking is defined %}({{ message.thinking }}/{{ message.reasoning_content }}){% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson(indent=2) }}{% endfor %}
    {% endfor %}
{{ ns.last }}{{ tools | tojson if tools }}{{ documents is none }}{{ eos_token }}{{ unknown_name }}
{%- if add_generation_prompt %}{{ dict(a=1).a ** 2 }}{% endif %}

"""


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, BUSY])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(template: str, prompt: bool) -> None:
    tokenizer = tiny_tokenizer(template)
    thoughtful = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "é", "reasoning_content": "hm"}]
    for messages, tools in ((list(WEATHER.messages), WEATHER.tools), (thoughtful, None)):
        expected = tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=prompt)
        rendered = ChatTemplate(template, "the chat template", tokenizer.special_tokens_map)
        aliased = [item | ({"thinking": "hm"} if "reasoning_content" in item else {}) for item in messages]
        assert rendered.render(aliased, tools, "here:1", prompt=prompt)[0] == expected
        assert rendered.has_markers("here:1") == (template == DEFAULT_CHAT_TEMPLATE)


# Every kind of scope that a generation block can be in, or have in it.
SCOPES = """\
{%- set outer = 'outer' -%}
{%- macro shout(text) -%}{{ text | upper }}{%- endmacro -%}
{%- for message in messages -%}
{%- set before = message.role -%}
{{ '<' + before + '>' }}
{%- if message.role == 'assistant' -%}
{% generation %}
{%- set inner = before ~ loop.index ~ outer -%}
{%- set outer = 'changed' -%}
{%- for word in message.content.split(' ') -%}
{%- if word == 'skip' %}{% continue %}{% endif -%}
{{ shout(word) }}{{ loop.last }},
{%- endfor -%}
{{ inner }}{{ outer }}{{ unknown_name }}
{%- endgeneration -%}
{{ inner }}{{ outer }}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{%- endfor -%}
"""


def test_generation_blocks_have_the_scope_and_the_spans_of_transformers() -> None:
    tokenizer = tiny_tokenizer(SCOPES)
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "hi"), ("assistant", "a skip é"), ("user", "汉"), ("assistant", ""))
    ]
    text, spans = ChatTemplate(SCOPES, "the chat template", {}).render(messages, None, "here:1")
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [text[start:stop] for start, stop in spans] == [
        "AFalse,ÉTrue,assistant2outerchanged",
        "True,assistant4outerchanged",
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    supervised = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(supervised) == "".join(text[start:stop] for start, stop in spans)


def test_two_templates_with_markers_keep_their_spans_apart() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    first = ChatTemplate(DEFAULT_CHAT_TEMPLATE, "the chat template", {})
    other = ChatTemplate(DEFAULT_CHAT_TEMPLATE.replace("<|im_end|>", "!"), "the other", {})
    assert first.has_markers("here:1")
    assert other.has_markers("here:1")
    for template, answer in ((first, "yes<|im_end|>"), (other, "yes!"), (first, "yes<|im_end|>")):
        text, spans = template.render(messages, None, "here:1")
        assert [text[start:stop] for start, stop in spans] == [answer]


@pytest.mark.parametrize("left", ["{% if x %}{% continue %}{% endif %}", "{% break %}"])
def test_a_generation_block_that_leaves_its_loop_is_refused(left: str) -> None:
    source = "{% for x in messages %}{% generation %}lost" + left + "{% endgeneration %}{% endfor %}"
    with pytest.raises(DataError, match="a loop is left inside a generation block"):
        ChatTemplate(source, "the chat template", {}).render([], None, "here:1")


@pytest.mark.parametrize(
    "expression",
    [
        "m.role",
        "m['role']",
        "m.items() | list",
        "m.keys",
        "m.get('role')",
        "m.missing is defined",
        "m.missing",
        "m.missing.more",
        "m.update",
        "m.pop('role')",
        "m.__class__",
        "m.__class__.__mro__",
        "m.copy",
        "m.items",
        "m.nested.values() | list",
        "m.nested.clear()",
        "m.role.upper()",
        "m.role.format(1)",
        "m.values",
        "loop.index",
    ],
)
def test_attributes_are_those_of_the_sandbox(expression: str) -> None:
    """Names, keys and both; what is refused is refused alike."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    messages: Any = [{"role": "us{}r", "values": 3, "__class__": 4, "nested": {"a": 1, "clear": 2}}, {"role": "b"}]
    try:
        expected = _compile_jinja_template(source).render(messages=messages)
    except Exception as error:
        with pytest.raises(DataError, match=re.escape(str(error))):
            ChatTemplate(source, "the chat template", {}).render(messages, None, "here:1")
    else:
        assert _without_addresses(ChatTemplate(source, "t", {}).render(messages, None, "here:1")[0]) == (
            _without_addresses(expected)
        )


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
WRITE = "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
SQUARE = "{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "runs for more than"),
        (TWICE, "runs for more than"),
        (GROW, "more than"),
        (WRITE, "writes more than"),
        ("{{ 'x' * 10 ** 12 }}", "writes more than"),
        ("{{ 9 ** (9 ** 9) }}", "raises to a power"),
        (SQUARE, "multiplies"),
    ],
)
def test_a_template_without_end_is_refused(monkeypatch: pytest.MonkeyPatch, template: str, words: str) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.setattr(rendering, "MAX_GROWTH_BYTES", 128 << 20)
    monkeypatch.setattr(rendering, "MAX_CHARACTERS", 1 << 20)
    tokenizer = tiny_tokenizer(template)
    tokenizer.name_or_path = "/models/odd"
    ChatTemplate("", "the chat template", {}).render([], None, "here:1")
    handlers = signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)
    alarm = signal.getitimer(signal.ITIMER_REAL)
    began = time.thread_time()
    with pytest.raises(DataError) as caught:
        Encoder(tokenizer).encode(conversation(("user", "a"), ("assistant", "b")))
    assert time.thread_time() - began < 2
    assert str(caught.value).startswith("here.jsonl:1: the chat template of /models/odd ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)) == handlers
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (alarm[0] > 0), "other timers go on"


def test_templates_render_in_other_threads_and_under_a_profiler() -> None:
    template = ChatTemplate(DEFAULT_CHAT_TEMPLATE, "the chat template", {})
    messages = [{"role": "user", "content": "hi"}]
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(template.render(messages, None, "here:1")[0]))
    thread.start()
    thread.join()

    def profiler(number: int, frame: Any) -> None:
        """Owns the timer."""

    before = signal.signal(signal.SIGPROF, profiler)
    try:
        texts.append(template.render(messages, None, "here:1")[0])
        assert signal.getsignal(signal.SIGPROF) is profiler
    finally:
        signal.signal(signal.SIGPROF, before)
    assert texts == ["<|im_start|>user\nhi<|im_end|>\n"] * 2


def test_the_timer_of_others_goes_on() -> None:
    template = ChatTemplate(LOOP.replace("99999", "300"), "the chat template", {})
    signal.setitimer(signal.ITIMER_PROF, 1000, 50)
    try:
        template.render([], None, "here:1")
        left, interval = signal.getitimer(signal.ITIMER_PROF)
        assert 900 < left < 1001
        assert interval == 50
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def test_long_conversations_take_linear_time() -> None:
    messages = [{"role": role, "content": "x" * 2000} for _ in range(2000) for role in ("user", "assistant")]
    template = ChatTemplate(DEFAULT_CHAT_TEMPLATE, "the chat template", {})
    template.render(messages[:4], None, "here:1")
    began = time.thread_time()
    text, spans = template.render(messages, None, "here:1")
    assert time.thread_time() - began < 1
    assert len(spans) == 2000
    assert all(text[start:stop] == "x" * 2000 + "<|im_end|>" for start, stop in spans)
