import numpy as np

from trainer.data.quality.text import answer_of, identity_of, map_text, map_turns, text_of, words_of
from trainer.data.records import Conversation, PlainText, TokenIds


def conversation(**changes: object) -> Conversation:
    call = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": {"q": "tea", "n": [1, "x"]}}}
    messages = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "where is tea"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "look"},
        {"role": "tool", "content": "shelf 3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "on the shelf"},
    )
    return Conversation(**({"messages": messages, "tools": None, "place": "a:1"} | changes))


def test_the_text_is_what_user_and_assistant_said() -> None:
    assert text_of(conversation()) == "where is tea\n\non the shelf"
    assert text_of(PlainText("q: ", "a", "a:1")) == "q: a"
    assert text_of(TokenIds(np.array([1, 2]), ((0, 2),), "a:1")) == ""
    assert answer_of(conversation()).strip() == "on the shelf"
    assert answer_of(PlainText("q: ", "a", "a:1")) == "a"


def test_every_text_is_changed_and_nothing_else() -> None:
    before = conversation(pinned="be kind", trained=(False, False, True, False, True))
    after = map_text(before, str.upper)
    assert isinstance(after, Conversation)
    call = after.messages[2]["tool_calls"][0]
    assert [m["content"] for m in after.messages] == ["BE KIND", "WHERE IS TEA", "", "SHELF 3", "ON THE SHELF"]
    assert call["function"] == {"name": "find", "arguments": {"q": "TEA", "n": [1, "X"]}}
    assert (call["id"], after.messages[2]["reasoning_content"], after.messages[3]["tool_call_id"]) == (
        "c1",
        "LOOK",
        "c1",
    )
    assert (after.pinned, after.trained, after.place) == ("BE KIND", before.trained, "a:1")
    assert before.messages[1]["content"] == "where is tea", "the record that was given is left alone"
    assert map_text(PlainText("q", "a", "p:1"), str.upper) == PlainText("Q", "A", "p:1")
    ids = TokenIds(np.array([1]), (), "p:1")
    assert map_text(ids, str.upper) is ids


def test_a_pinned_instruction_stays_the_head_of_its_message() -> None:
    record = Conversation(({"role": "user", "content": "sum up\nsum up this"},), None, "a:1", pinned="sum up")
    after = map_text(record, lambda text: f"<{text}>")
    assert isinstance(after, Conversation)
    assert after.messages[0]["content"] == "<sum up><\nsum up this>"
    assert after.messages[0]["content"].startswith(after.pinned)


def test_a_change_may_depend_on_the_role() -> None:
    after = map_turns(conversation(), lambda role, text: text.upper() if role == "user" else text)
    assert text_of(after) == "WHERE IS TEA\n\non the shelf"


def test_calls_with_other_arguments_are_not_the_same() -> None:
    changed = map_turns(conversation(), lambda role, text: "coffee" if text == "tea" else text)
    assert text_of(changed) == text_of(conversation())
    assert identity_of(changed) != identity_of(conversation())


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words_of("我爱 GPU卡 x") == ["我", "爱", "GPU", "卡", "x"]
    assert words_of(" a  b\n") == ["a", "b"]
