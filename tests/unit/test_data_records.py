import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.records import FORMATS, Conversation, Layout, PlainText, Record, TokenIds, detect_layout, to_record
from trainer.data.sources import RawRow
from trainer.errors import DataError

WORDS = [
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "conversations",
    "messages",
    "from",
    "value",
    "role",
    "content",
    "tools",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "weight",
    "train",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
    "input_ids",
    "labels",
    "loss_mask",
    "type",
    "images",
]


def row(value: dict[str, Any], line: int = 4) -> RawRow:
    return RawRow(value, "data.jsonl", line)


def convert(value: dict[str, Any]) -> Conversation:
    record = to_record(row(value), detect_layout(row(value)))
    assert isinstance(record, Conversation)
    return record


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_alpaca() -> None:
    value = {
        "instruction": "translate",
        "input": "猫",
        "output": "cat",
        "system": "be brief",
        "history": [["hi", "hello"]],
    }
    assert said(convert(value)) == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "translate\n猫"),
        ("assistant", "cat"),
    ]
    bare = convert({"instruction": "say", "output": "x"})
    assert said(bare) == [("user", "say"), ("assistant", "x")]
    assert bare.place == "data.jsonl:4"
    assert said(convert({"instruction": "say", "input": None, "output": "x", "history": None, "id": 7})) == said(bare)


def test_messages_with_tools() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    value = {
        "messages": [
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
            {"role": "assistant", "content": "42!", "reasoning_content": "hm", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    conversation = convert(value)
    assert said(conversation) == [
        ("system", "rules"),
        ("user", "ab"),
        ("assistant", ""),
        ("tool", "42"),
        ("assistant", "42!"),
    ]
    assert conversation.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}, "id": "c1"}
    ]
    assert conversation.messages[1]["name"] == "eve"
    assert conversation.messages[3]["tool_call_id"] == "c1"
    assert conversation.messages[4]["reasoning_content"] == "hm"
    assert "tool_calls" not in conversation.messages[4]
    assert conversation.tools == value["tools"]
    same = {"messages": [{"role": "user", "content": "a"}, value["messages"][2]]}
    same["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"x": [1]}
    same["messages"][0] |= {"weight": 1, "refusal": None, "id": 9}
    assert convert(same).messages[1]["tool_calls"] == conversation.messages[2]["tool_calls"]


def test_sharegpt_with_tools() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "a"},
            {"from": "user", "value": "more"},
            {"from": "function_call", "value": '[{"name": "f"}, {"name": "g", "arguments": "{}"}]'},
        ],
        "system": "be brief",
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    conversation = convert(value)
    assert said(conversation) == [
        ("system", "be brief"),
        ("user", "q"),
        ("assistant", ""),
        ("tool", "42"),
        ("assistant", "a"),
        ("user", "more"),
        ("assistant", ""),
    ]
    assert [call["function"]["name"] for call in conversation.messages[6]["tool_calls"]] == ["f", "g"]
    assert conversation.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert convert({"conversations": value["conversations"][:1], "tools": ""}).tools is None
    assert convert({"conversations": value["conversations"][:1], "tools": "[]"}).tools is None


def layout_of(value: dict[str, Any], mapping: dict[str, str] | None = None, format: str | None = None) -> Layout:
    return detect_layout(row(value), mapping, format)


def read(value: dict[str, Any], mapping: dict[str, str] | None = None, format: str | None = None) -> Record:
    return to_record(row(value), layout_of(value, mapping, format))


def test_every_row_must_have_the_format_of_the_first() -> None:
    layout = layout_of({"instruction": "a", "output": "b"})
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: 'instruction' is missing \(there are: messages\); rows of one"
    ):
        to_record(row({"messages": []}, 2), layout)
    both = {"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "c"}]}
    with pytest.raises(DataError, match="could be messages or alpaca; say which: --format"):
        layout_of(both)
    told = read(both, format="messages")
    assert isinstance(told, Conversation)
    assert said(told) == [("user", "c")]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        (
            {"instruction": "a", "output": "b", "id": 3},
            Layout("alpaca", {"instruction": "instruction", "output": "output"}),
        ),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "x"},
            Layout("alpaca", {"instruction": "instruction", "output": "response", "input": "context"}),
        ),
        (
            {"conversations": [], "functions": "[]"},
            Layout("sharegpt", {"conversations": "conversations", "tools": "functions"}),
        ),
        (
            {"messages": CHAT, "text": "x", "system": ""},
            Layout("messages", {"messages": "messages", "system": "system"}),
        ),
        ({"prompt": "a", "completion": "b"}, Layout("completion", {"prompt": "prompt", "completion": "completion"})),
        (
            {"question": "a", "answer": "b", "id": "7"},
            Layout("completion", {"prompt": "question", "completion": "answer"}),
        ),
        ({"input": "a", "output": "b"}, Layout("completion", {"prompt": "input", "completion": "output"})),
        ({"query": "a", "response": "b", "text": None}, None),
        (
            {"question": "a", "chosen": "b", "rejected": "c", "system": "s"},
            Layout(
                "preference", {"chosen": "chosen", "prompt": "question", "rejected": "rejected", "system": "system"}
            ),
        ),
        (
            {"conversations": CHAT, "chosen": {}, "rejected": {}},
            Layout("preference", {"chosen": "chosen", "prompt": "conversations", "rejected": "rejected"}),
        ),
        ({"text": "a", "url": "b"}, Layout("text", {"text": "text"})),
        ({"document": "a", "id": 4}, Layout("text", {"text": "document"})),
        ({"document": "a", "title": "b"}, None),
        ({"input_ids": [1], "text": "a"}, Layout("tokens", {"input_ids": "input_ids"})),
        (
            {"input_ids": [1], "assistant_masks": [1]},
            Layout("tokens", {"input_ids": "input_ids", "loss_mask": "assistant_masks"}),
        ),
    ],
)
def test_what_is_detected_is_stated(value: dict[str, Any], layout: Layout | None) -> None:
    if layout is None:
        with pytest.raises(DataError):
            layout_of(value)
    else:
        assert layout_of(value) == layout


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"left": "a", "right": "b"}, "no known format (columns: left, right)"),
        ({}, "no known format (columns: none)"),
        ({"question": "a", "answer": "b", "response": "c"}, "more than one reading"),
        ({"question": "a", "context": "c", "answer": "b"}, "'context' would be left out"),
        ({"question": "a", "answer": "b", "text": "c"}, "could be completion or text"),
        ({"prompt": "a", "messages": CHAT, "chosen": CHAT, "rejected": CHAT}, "could be preference or messages"),
        ({"input_ids": [1], "messages": CHAT}, "could be tokens or messages"),
        ({"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"}, "'prompt' could be input or instruction"),
    ],
)
def test_two_readings_are_refused(value: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        layout_of(value)
    assert str(caught.value).startswith("data.jsonl:4: ")
    assert words in str(caught.value)


def test_columns_with_names_of_their_own_are_mapped() -> None:
    value = {"frage": "q", "antwort": "a", "kontext": "c"}
    mapping = {"instruction": "frage", "output": "antwort", "input": "kontext"}
    assert layout_of(value, mapping) == Layout("alpaca", mapping)
    record = read(value, mapping)
    assert isinstance(record, Conversation)
    assert said(record) == [("user", "q\nc"), ("assistant", "a")]
    record = read(value, {"prompt": "frage", "completion": "antwort"})
    assert isinstance(record, Conversation)
    assert said(record) == [("user", "q"), ("assistant", "a")]
    # A mapped column wins over one that has the key's own name.
    assert read({"text": "x", "body": "y"}, {"text": "body"}) == PlainText("", "y", "data.jsonl:4")
    with pytest.raises(DataError, match="'antwort' must be a string, this is number"):
        to_record(row(value | {"antwort": 3}), layout_of(value, mapping))


@pytest.mark.parametrize(
    ("mapping", "format", "words"),
    [
        ({"text": "boddy"}, None, "no column 'boddy' for 'text' (columns: body, title); did you mean 'body'?"),
        ({"txt": "body"}, "text", "'txt' is no key of format text; did you mean 'text'?"),
        ({"prompt": "body", "completion": "body"}, None, "column 'body' is mapped twice"),
        ({}, "alpaca", "'instruction' is missing for format alpaca (columns: body, title)"),
        ({}, "alpacca", "there is no format 'alpacca'; did you mean 'alpaca'?"),
    ],
)
def test_a_wrong_mapping_says_what_would_be_right(mapping: dict[str, str], format: str | None, words: str) -> None:
    with pytest.raises(DataError) as caught:
        layout_of({"title": "a", "body": "b"}, mapping, format)
    assert words in str(caught.value)


def test_an_optional_column_that_the_first_row_lacked_is_read() -> None:
    layout = layout_of({"messages": CHAT})
    record = to_record(row({"messages": CHAT, "functions": [{"name": "f"}], "system": "s"}), layout)
    assert isinstance(record, Conversation)
    assert record.tools == [{"type": "function", "function": {"name": "f"}}]
    assert record.messages[0] == {"role": "system", "content": "s"}
    late = to_record(
        row({"prompt": "a", "completion": "b", "system": "s"}), layout_of({"prompt": "a", "completion": "b"})
    )
    assert isinstance(late, Conversation)
    assert said(late) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_prompt_and_completion() -> None:
    record = read({"query": "q", "response": "r"})
    assert isinstance(record, Conversation)
    assert (said(record), record.trained) == ([("user", "q"), ("assistant", "r")], None)
    plain = Layout("continuation", {"prompt": "query", "completion": "response"})
    assert to_record(row({"query": "q", "response": "r"}), plain) == PlainText("q", "r", "data.jsonl:4")
    record = read({"prompt": [{"role": "system", "content": "s"}, *CHAT, CHAT[0]], "completion": [CHAT[1], *CHAT]})
    assert isinstance(record, Conversation)
    assert record.trained == (False, False, False, False, True, False, True)
    assert record.pinned == "s"
    flagged = read({"prompt": CHAT, "completion": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1]]})
    assert isinstance(flagged, Conversation)
    assert flagged.trained == (False, False, False, False, False, True)
    with pytest.raises(DataError, match="'prompt' is string and 'completion' array"):
        read({"prompt": "a", "completion": CHAT})
    with pytest.raises(DataError, match=r"completion\[0\] must be an object"):
        read({"prompt": CHAT, "completion": ["x"]})


ANSWER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("value", "trained"),
    [
        ({"prompt": "q", "chosen": [CHAT[0], ANSWER], "rejected": [CHAT[0], WORSE]}, (False, True)),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": [WORSE]}, (False, True)),
        ({"prompt": "q", "chosen": ANSWER, "rejected": WORSE}, (False, True)),
        ({"prompt": [CHAT[0]], "chosen": "good", "rejected": "bad"}, (False, True)),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {},
            },
            (False, True),
        ),
        ({"chosen": [*CHAT, CHAT[0], ANSWER], "rejected": [*CHAT, CHAT[0], WORSE]}, (False, False, False, True)),
        ({"prompt": "q", "chosen": [*CHAT, CHAT[0], ANSWER], "rejected": []}, (False, False, False, True)),
        ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, None),
    ],
)
def test_the_chosen_answer_is_the_target(value: dict[str, Any], trained: tuple[bool, ...] | None) -> None:
    record = read(value)
    assert isinstance(record, Conversation)
    assert said(record)[-2:] == [("user", "q"), ("assistant", "good")]
    assert record.trained == trained


def test_preference_texts() -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    record = read(pair)
    assert isinstance(record, Conversation)
    assert said(record) == [("user", "q"), ("assistant", "good")]
    with pytest.raises(DataError, match="'chosen' has no prompt"):
        read({"chosen": "Human: q Assistant: good", "rejected": "bad"})
    with pytest.raises(DataError, match="'chosen' does not begin with 'prompt'"):
        read({"prompt": "other", "chosen": [CHAT[0], ANSWER], "rejected": []})


def test_token_ids() -> None:
    def spans(**columns: Any) -> tuple[tuple[int, int], ...]:
        record = read({"input_ids": [5, 6, 7, 8], **columns})
        assert isinstance(record, TokenIds)
        assert record.ids.tolist() == [5, 6, 7, 8]
        return record.spans

    assert spans() == ((0, 4),)
    assert spans(labels=[-100, 6, -100, 8]) == ((1, 2), (3, 4))
    assert spans(loss_mask=[0, True, 1, False], attention_mask=[1, 1, 1, 1]) == ((1, 3),)
    assert spans(labels=[-100] * 4) == ()
    assert spans(assistant_masks=[0, 0, 1, 1], labels=[-100, -100, 7, 8]) == ((2, 4),)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"labels": [-100, 6]}, "'labels' has 2 entries for 3 tokens"),
        ({"labels": [6, 7, -100]}, "labels[0] is 6 where input_ids[0] is 5"),
        ({"loss_mask": [0, 2, 1]}, "other values than 0 and 1"),
        ({"loss_mask": [0, 0.5, 1]}, "loss_mask[1] must be a whole number"),
        ({"labels": [5, 6, 7], "loss_mask": [0, 1, 1]}, "'labels' and 'loss_mask' disagree"),
        ({"loss_mask": [1, 1, 1], "assistant_masks": None, "attention_mask": [1, 1, 0]}, "attention_mask has zeros"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [1, -1]}, "negative"),
        ({"input_ids": [1, "2"]}, "input_ids[1] must be a whole number, this is string"),
        ({"input_ids": [1, True]}, "input_ids[1] must be a whole number, this is boolean"),
        ({"input_ids": [1 << 70]}, "beyond 64 bits"),
        ({"input_ids": [[1, 2]]}, "input_ids[0] must be a whole number, this is array"),
        ({"input_ids": "1 2"}, "'input_ids' must be an array"),
        ({"completion_mask": [1, 1, 1], "assistant_masks": [1, 1, 1]}, "'loss_mask' could be"),
    ],
)
def test_bad_token_rows_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"input_ids": [5, 6, 7], **columns})
    assert str(caught.value).startswith("data.jsonl:4: ")
    assert words in str(caught.value)


def test_flags_say_which_turns_are_trained_on() -> None:
    def trained(*flags: dict[str, Any]) -> tuple[bool, ...] | None:
        return convert(
            {"messages": [turn | flag for flag in flags for turn in (CHAT[0], CHAT[1])][: 2 * len(flags)]}
        ).trained

    def answers(*flags: dict[str, Any]) -> tuple[bool, ...] | None:
        messages = [item for flag in flags for item in (CHAT[0], CHAT[1] | flag)]
        return convert({"messages": messages}).trained

    assert answers({}, {}) is None
    assert answers({"weight": None}, {"id": 1}) is None
    assert answers({"weight": 0}, {"weight": 1}) == (False, False, False, True)
    assert answers({"train": False}, {}) == (False, False, False, True)
    assert answers({"weight": 1.0, "train": True}, {"loss": 0}) == (False, True, False, False)
    assert trained({"weight": 1}) == (False, True)
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]}
    assert convert(shared).trained == (False, False)
    assert not convert({"messages": [CHAT[0], {"role": "assistant", "content": "", "weight": 0}, *CHAT]}).empty_answer


def test_what_is_pinned() -> None:
    assert convert({"instruction": "sum up", "input": "long", "output": "b", "system": "s"}).pinned == "sum up"
    assert convert({"instruction": "sum up", "input": " ", "output": "b", "system": "s"}).pinned == "s"
    assert convert({"instruction": "sum up", "output": "b"}).pinned == ""
    assert convert({"instruction": "i", "input": "x", "output": "b", "history": [["a", "b"]]}).pinned == ""
    assert convert({"messages": [{"role": "developer", "content": "s"}, *CHAT]}).pinned == "s"
    assert convert({"conversations": CHAT, "system": "t"}).pinned == "t"
    assert convert({"messages": CHAT}).pinned == ""


def test_sharegpt_with_role_and_content() -> None:
    value = {
        "conversations": [
            {"role": "human", "content": "q"},
            {"role": "gpt", "content": [{"type": "text", "text": "a"}]},
        ]
    }
    assert said(convert(value)) == [("user", "q"), ("assistant", "a")]
    # Rows from Arrow have every key of every turn; absent ones are null.
    mixed = {"conversations": [{"from": "human", "value": "q", "role": None, "content": None}]}
    assert said(convert(mixed)) == [("user", "q")]


def test_the_older_function_call() -> None:
    value = {
        "messages": [
            CHAT[0],
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "42"},
        ],
        "functions": [{"name": "f", "parameters": {}}],
    }
    conversation = convert(value)
    assert conversation.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert conversation.messages[2] == {"role": "tool", "content": "42", "name": "f"}
    assert conversation.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def turn(role: str = "user", content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content, **more}]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"instruction": None, "output": "b"}, "'instruction' must be a string, this is null"),
        ({"instruction": "a", "output": 3}, "'output' must be a string, this is number"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "'input' must be a string, this is array"),
        ({"instruction": " ", "output": "b"}, "instruction and input are empty"),
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' must be an array, this is string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] must be a pair"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' must be an array, this is string"),
        ({"messages": ["hi"]}, "messages[0] must be an object, this is string"),
        (turn("robot"), "messages[1]: unknown role 'robot'; known roles: system, user, assistant, tool"),
        (turn(None), "messages[1]: 'role' must be a string, this is null"),
        (turn("assistant", None), "messages[1]: 'content' must be a string, this is null"),
        ({"messages": [{"role": "user"}]}, "messages[0]: 'content' is missing"),
        (turn("user", [{"type": "image_url"}]), "content part of type 'image_url'"),
        (turn("user", ["x"]), "content part of type 'string'"),
        (turn("system"), "a system message after the first turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nothing but a system message"),
        (turn("user", tool_calls=[{"name": "f"}]), "tool_calls on role 'user'"),
        (turn("assistant", tool_calls=[{"arguments": {}}]), "a tool call without a name"),
        (turn("assistant", tool_calls=["f"]), "a tool call without a name"),
        (turn("assistant", tool_calls=[{"name": "f", "arguments": "{x"}]), "arguments of a tool call is not JSON"),
        (turn("assistant", tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments of 'f' are array"),
        ({**turn(), "tools": [{"description": "x"}]}, "a tool without a name"),
        ({**turn(), "tools": "{nonsense"}, "tools is not JSON"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown speaker 'alien'; known: human"),
        ({"conversations": [{"from": "human", "value": None}]}, "'value' must be a string, this is null"),
        ({"conversations": [{"value": "x"}]}, "conversations[0]: 'from' is missing"),
        (turn("assistant", weight=0.5), "messages[1]: 'weight': 0.5 is not supported; write 0 or 1"),
        (turn("assistant", train="yes"), "messages[1]: 'train': string is not supported"),
        (turn("assistant", train=False, weight=1), "messages[1]: 'weight' and 'train' disagree"),
        (turn("user", train=True), "messages[1]: role 'user' is not trained on"),
        (turn("user", thinking="hm"), "messages[1]: reasoning on role 'user'"),
        (turn("assistant", thinking="hm", reasoning="so"), "disagree"),
        (turn("assistant", refusal="no"), "messages[1]: 'refusal' cannot be trained on"),
        (turn("assistant", function_call={"arguments": "{}"}), "messages[1]: a tool call without a name"),
        (
            turn("assistant", function_call={"name": "f"}, tool_calls=[{"name": "f"}]),
            "both tool_calls and function_call",
        ),
        (turn("assistant", tool_calls={}), "'tool_calls' must be an array, this is object"),
        (turn("assistant", tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}]), "is not JSON"),
        (turn("assistant", tool_calls=[{"name": "f", "arguments": '{"x": "\\ud800"}'}]), "half of a surrogate pair"),
        (
            turn("assistant", tool_calls=[{"name": "f", "arguments": '{"x": ' + "[" * 70 + "]" * 70 + "}"}]),
            "nested deeper",
        ),
        ({**turn(), "weight": 0.5}, "'weight' of a whole row"),
        ({**turn(), "system": 3}, "'system' must be a string, this is number"),
        ({**turn(), "images": ["cat.png"]}, "'images' cannot be trained on"),
        (turn("user", audio="x"), "messages[1]: 'audio' cannot be trained on"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "function_call is not JSON"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(value: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(value)
    message = str(caught.value)
    assert message.startswith("data.jsonl:4: ")
    assert words in message
    assert "; " in message, "the remedy"


def test_empty_answers_are_noticed() -> None:
    assert convert({"instruction": "a", "output": " \n"}).empty_answer
    assert not convert({"instruction": "a", "output": "b"}).empty_answer
    assert not convert(turn("assistant", None, tool_calls=[{"name": "f", "arguments": {}}])).empty_answer


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SAMPLES: list[dict[str, Any]] = [
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}], "tools": "[]"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "b"},
            {"role": "assistant", "content": "c", "reasoning_content": "d", "weight": 1, "tool_calls": [CALL]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"prompt": CHAT, "completion": CHAT},
    {"prompt": "a", "completion": "b", "system": "s", "tools": []},
    {"prompt": "q", "chosen": CHAT, "rejected": CHAT},
    {"text": "a"},
    {"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [0, 1], "attention_mask": [1, 1]},
]


def places_of(value: Any) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(key,), *((key, *rest) for rest in places_of(item))]]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_place_gives_a_record_or_a_refusal(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(SAMPLES))
    layout = layout_of(sample)
    value = copy.deepcopy(sample)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places_of(value) or [()]))
        if not path:
            break
        at: Any = value
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = data.draw(json_values)
    for detected in (None, layout):
        try:
            record = to_record(row(value), detected or layout_of(value))
            said = record.place + ": "
        except DataError as error:
            said = str(error)
        assert said.startswith("data.jsonl:4: ")
        assert "\n" not in said
        assert len(said) < 600


@given(st.dictionaries(st.sampled_from(WORDS), json_values, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_object_is_a_record_or_refused(value: dict[str, Any]) -> None:
    for format in (None, *FORMATS):
        with contextlib.suppress(DataError):
            to_record(row(value), layout_of(value, format=format))
        if format is not None:
            with contextlib.suppress(DataError):
                to_record(row(value), Layout(format, {}))
