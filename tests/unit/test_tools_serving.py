"""The parts of the server: requests, text pieces, sampling."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_tokenizer
from tools.serve import is_loopback
from tools.serving.protocol import ChatRequest, Defaults, RequestError, Sampling, parse_chat_request
from tools.serving.sampling import sample_scores
from tools.serving.text import TextStream

TOKENIZER = tiny_tokenizer()
ASK = [{"role": "user", "content": "hi"}]


def parse(defaults: Defaults = Defaults(), **fields: Any) -> ChatRequest:  # noqa: B008 - frozen
    return parse_chat_request(json.dumps({"messages": ASK, **fields}).encode(), "m", defaults)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=30),
    st.lists(st.text(min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
)
def test_pieces_joined_are_the_answer_cut_at_the_first_stop_text(text: str, stops: list[str], sizes: list[int]) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    stream = TextStream(TOKENIZER, stops)
    pieces, position = [], 0
    while position < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.feed(tokens[position : position + size]))
        position += size
    pieces.append(stream.finish())
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    # Tokens arrive one by one, so the stop text that ends first wins; among those the one that begins first.
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert stream.stopped == bool(ends)
    if ends:
        assert whole.startswith("".join(pieces))
        assert not any(stop in "".join(pieces) for stop in stops)
        assert any(whole[len("".join(pieces)) :].startswith(stop) for stop in stops)
    else:
        assert "".join(pieces) == whole


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(2, 259), max_size=40))
def test_pieces_of_any_tokens_joined_are_their_text(tokens: list[int]) -> None:
    """Also bytes that are no characters, as untrained models write them."""
    stream = TextStream(TOKENIZER)
    pieces = [stream.feed([token]) for token in tokens]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.feed([token]) for token in TOKENIZER.encode("a好b", add_special_tokens=False)]
    assert pieces == ["a", "", "", "好", "b"]
    assert stream.finish() == ""
    cut = TextStream(TOKENIZER)
    cut.feed(TOKENIZER.encode("好", add_special_tokens=False)[:2])
    assert cut.finish() == "�"


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.feed([TOKENIZER.eos_token_id, *TOKENIZER.encode("x", add_special_tokens=False)]) == "x"


def test_samples_follow_the_distribution() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    sampling = Sampling(temperature=0.7, top_p=1.0, seed=5)
    draws = torch.tensor([int(sample_scores(scores, sampling, position).argmax()) for position in range(4000)])
    found = torch.bincount(draws, minlength=5) / 4000
    assert (found - torch.softmax(scores / 0.7, 0)).abs().max() < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    scores = torch.tensor([0.2, 0.5, 0.3]).log()
    for top_p, kept in ((0.0, {1}), (0.49, {1}), (0.51, {1, 2}), (0.79, {1, 2}), (0.9, {0, 1, 2})):
        sampling = Sampling(temperature=1.0, top_p=top_p, seed=1)
        assert {int(sample_scores(scores, sampling, position).argmax()) for position in range(300)} == kept


def test_noise_depends_on_seed_and_position_only() -> None:
    scores = torch.zeros(50)
    first = sample_scores(scores, Sampling(1.0, 1.0, 7), 3)
    assert torch.equal(first, sample_scores(scores.clone(), Sampling(1.0, 1.0, 7), 3))
    assert not torch.equal(first, sample_scores(scores, Sampling(1.0, 1.0, 8), 3))
    assert not torch.equal(first, sample_scores(scores, Sampling(1.0, 1.0, 7), 4))


def test_a_request_without_wishes_is_greedy_or_as_the_model_asks() -> None:
    assert parse().sampling.greedy
    assert parse(Defaults(0.6, 0.9)).sampling.temperature == 0.6
    assert parse(Defaults(0.6, 0.9), temperature=0).sampling.greedy
    assert parse(temperature=None, stop=None, tools=None).sampling.greedy
    assert parse(temperature=1, seed=-4).sampling.seed == -4


def test_both_names_of_the_token_limit_are_honoured() -> None:
    assert parse().max_new_tokens is None
    assert parse(max_tokens=5).max_new_tokens == 5
    assert parse(max_completion_tokens=6).max_new_tokens == 6
    assert parse(max_tokens=5, max_completion_tokens=3).max_new_tokens == 3


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(messages=[{"role": "developer", "content": parts}, *ASK])
    assert request.messages[0] == {"role": "system", "content": "ab"}
    assert parse(tools=[{"type": "function"}], tool_choice="none").tools is None


def test_arguments_of_earlier_tool_calls_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    request = parse(messages=[*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert request.messages[1]["content"] == ""
    assert request.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    for bad in ([{"function": {"name": "add", "arguments": "{"}}], [{"function": 1}], "x", {"a": 1}):
        with pytest.raises(RequestError, match=r"messages\[1\]"):
            parse(messages=[*ASK, {"role": "assistant", "tool_calls": bad}])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"tools": ["x"]}, "tools"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found() -> None:
    with pytest.raises(RequestError) as caught:
        parse(model="gpt")
    assert caught.value.status == 404
    assert parse(model="m").messages == ASK


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda child: st.lists(child) | st.dictionaries(st.sampled_from(["messages", "role", "content", "stop", "tools", "stream_options", "temperature", "n", "logit_bias", "seed"]) | st.text(), child), max_leaves=12))  # fmt: skip  # noqa: E501
def test_no_json_makes_the_parser_fall_over(body: Any) -> None:
    with suppress(RequestError):  # anything else is a bug
        parse_chat_request(json.dumps(body).encode(), "m", Defaults())


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_no_bytes_make_the_parser_fall_over(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat_request(body, "m", Defaults())


def test_loopback_is_recognised() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))
