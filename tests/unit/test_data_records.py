from typing import Any

import pytest

from trainer.data.records import Conversation, detect_format, read_conversations, to_conversation
from trainer.data.sources import RawRow
from trainer.errors import DataError


def row(value: dict[str, Any], line: int = 4) -> RawRow:
    return RawRow(value, "data.jsonl", line)


def convert(value: dict[str, Any]) -> Conversation:
    return to_conversation(row(value), detect_format(row(value)))


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


def test_the_format_is_that_of_the_first_row_or_told() -> None:
    rows = [row({"instruction": "a", "output": "b"}, 1), row({"messages": []}, 2)]
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: 'instruction' is missing; rows of one file must have one format"
    ):
        list(read_conversations(rows))
    both = {"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "c"}]}
    with pytest.raises(DataError, match="could be messages or alpaca; say which: --format"):
        detect_format(row(both))
    assert said(next(read_conversations([row(both)], "messages"))) == [("user", "c")]
    with pytest.raises(DataError, match=r"data\.jsonl:4: no known format \(keys: answer, question\)"):
        detect_format(row({"question": "a", "answer": "b"}))


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
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[1] must be a pair"),
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
        (turn("assistant", weight=0), "messages[1]: 'weight': 0 asks for another loss mask"),
        (turn("assistant", function_call={"name": "f"}), "messages[1]: 'function_call' cannot be trained on"),
        ({**turn(), "images": ["cat.png"]}, "'images' cannot be trained on"),
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
