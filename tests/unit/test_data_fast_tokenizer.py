import json
import random
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.corpora import alpaca_rows, conversation, tiny_tokenizer
from trainer.data.encode import fast_tokenizer
from trainer.data.encode.control_tokens import CHECKED_FIRST, CHECKED_SHARE, TextEncoder
from trainer.data.encode.fast_tokenizer import NoTwin, Twin, TwinMismatch, verified_twin
from trainer.data.encode.stress_texts import stress_texts
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE, Encoder
from trainer.data.encode.tokenizer_training import train_tokenizer
from trainer.data.records import Conversation
from trainer.errors import DataError

LIBRARIES = ("fastokens", "tiktoken")

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def byte_level(use_regex: bool = False, add_prefix_space: bool = False) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split_by(words: str, behavior: str = "isolated", invert: bool = False) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior, invert), byte_level()])


def digits_first() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)])


def corpus() -> list[str]:
    rows = [row[key] for row in alpaca_rows(200, seed=3, longest=20) for key in ("instruction", "output")]
    return [*rows, *filter(None, stress_texts()), "1234 12 123 2024", "  \n\n \t\n"]


def trained(pre_tokenizer: Any, added: Sequence[Any] = (), normalizer: Any = None) -> Any:
    """A byte-level BPE tokenizer of 900 tokens with ChatML control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def with_model(tokenizer: Any, **changes: Any) -> Any:
    """The tokenizer with other options, vocabulary or merges of its model."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"] |= changes
    for index, token in enumerate(definition["added_tokens"]):
        token["id"] = len(definition["model"]["vocab"]) + index
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))


@pytest.fixture(scope="module")
def qwen() -> Any:
    return trained(split_by(QWEN_WORDS))


def hide_all_but(library: str, patch: pytest.MonkeyPatch) -> None:
    """As if of the libraries of byte-level BPE only this one were installed."""
    pytest.importorskip(library)
    for other in LIBRARIES:
        if other != library:
            patch.setitem(sys.modules, other, None)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    hide_all_but(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def tiktoken_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_all_but("tiktoken", monkeypatch)


@pytest.fixture(scope="module", params=LIBRARIES)
def qwen_twin(qwen: Any, request: pytest.FixtureRequest) -> Twin:
    with pytest.MonkeyPatch.context() as patch:
        hide_all_but(request.param, patch)
        return twin_of(qwen, request.param)


def twin_of(tokenizer: Any, library: str) -> Twin:
    twin = verified_twin(tokenizer)
    assert isinstance(twin, Twin), str(twin)
    assert (twin.name, twin.passed_over) == (library, "")
    return twin


def reason(tokenizer: Any, directory: Path | None = None) -> str:
    found = verified_twin(tokenizer, directory)
    assert isinstance(found, NoTwin)
    return found.reason


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


# --- byte-level BPE ---


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        byte_level(use_regex=True),
        byte_level(use_regex=False),
        split_by(QWEN_WORDS),
        split_by(LLAMA_WORDS, "removed", invert=True),
        digits_first(),
    ],
    ids=["gpt2", "no words", "qwen", "llama", "digits"],
)
def test_usual_ways_to_cut_words_have_a_twin(pre_tokenizer: Any, library: str) -> None:
    tokenizer = trained(pre_tokenizer)
    twin = twin_of(tokenizer, library)
    for text in corpus():
        assert twin.encode(text) == ids(tokenizer, text)


anything = st.text(st.characters(codec="utf-8"), max_size=60)
runs = st.lists(
    st.sampled_from(
        ["a", "'s", "'S", "ab", " ", "  ", "\n", "\t", "7", "苹", "e\u0301", "\u0300", "<|im_end|>", "!", "\u3000"]
    ),
    max_size=40,
).map("".join)


@given(st.one_of(anything, runs))
@settings(max_examples=300, deadline=None)
def test_the_twin_gives_the_same_ids_on_anything(qwen: Any, qwen_twin: Twin, text: str) -> None:
    assert qwen_twin.encode(text) == ids(qwen, text)


def test_added_tokens_are_cut_out_alike(library: str) -> None:
    from tokenizers import AddedToken, normalizers

    added = [
        AddedToken("<t>", special=False, normalized=False, lstrip=True),
        AddedToken("<t>x", special=False, normalized=False, rstrip=True),
        AddedToken("\n\n", special=False, normalized=False),
        AddedToken("é", special=False, normalized=True),
        AddedToken("éa", special=False, normalized=True, lstrip=True, rstrip=True),
        AddedToken("molecule", special=False),
    ]
    for normalizer in (None, normalizers.NFC(), *[normalizers.NFKC()] * (library == "tiktoken")):
        tokenizer = trained(split_by(QWEN_WORDS), added, normalizer)
        twin = twin_of(tokenizer, library)
        for text in (
            "a <t> b",
            "a \u3000<t>x \n\n\n b",
            "<t>x \n\n<t>",
            "e\u0301 e\u0301a",
            " e\u0301a x\x1f<t>",
            "ﬁ<t>ﬁ",
        ):
            assert twin.encode(text) == ids(tokenizer, text), (normalizer, text)
    single = trained(split_by(QWEN_WORDS), [AddedToken("word", single_word=True)])
    if library == "tiktoken":
        assert reason(single) == "an added token counts only as a single word"
    else:
        twin = twin_of(single, library)
        for text in ("word", "words", "a word, aword", "wordword word"):
            assert twin.encode(text) == ids(single, text)


def test_characters_that_skip_normalisation_are_inert() -> None:
    """None of them changes alone, is reordered, or is the second half of a composition."""
    inert = [chr(code) for code in range(0x10000) if fast_tokenizer._NFC_INERT.fullmatch(chr(code))]
    assert not fast_tokenizer._NFC_INERT.fullmatch("\U0001d15e")
    canonical = [unicodedata.decomposition(chr(code)).split() for code in range(0x30000)]
    second = {chr(int(parts[1], 16)) for parts in canonical if len(parts) == 2 and not parts[0].startswith("<")}
    assert len(inert) > 20_000
    assert not [c for c in inert if unicodedata.combining(c) or unicodedata.normalize("NFC", c) != c or c in second]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_token_that_no_merge_makes(qwen: Any, ignore_merges: bool, library: str) -> None:
    vocabulary = json.loads(qwen.backend_tokenizer.to_str())["model"]["vocab"]
    lost = with_model(qwen, vocab=vocabulary | {"zqj": 900}, ignore_merges=ignore_merges)
    assert (900 in ids(lost, "zqj")) == ignore_merges
    twin = twin_of(lost, library)
    for text in ("zqj", " zqj", "zqjz", "zqj zqj\nzqj"):
        assert twin.encode(text) == ids(lost, text)
    # "zqjx" could be made of "zqj" and "x", which is no merge: only tiktoken would do it.
    lost = with_model(qwen, vocab=vocabulary | {"zqj": 900, "zqjx": 901}, ignore_merges=ignore_merges)
    if ignore_merges and library == "tiktoken":
        assert str(verified_twin(lost)) == "tokenizing with transformers: the token 'zqjx' follows from no merge"
    else:
        twin = twin_of(lost, library)
        for text in ("zqjx", "zqjxz", " zqj zqjx"):
            assert twin.encode(text) == ids(lost, text)


@pytest.mark.usefixtures("tiktoken_only")
def test_what_has_no_twin_says_why(qwen: Any) -> None:
    from tokenizers import pre_tokenizers

    model = json.loads(qwen.backend_tokenizer.to_str())["model"]
    swapped = [*model["merges"][1::-1], *model["merges"][2:]]
    assert "does not follow the order of ids" in reason(with_model(qwen, merges=swapped))
    assert reason(with_model(qwen, dropout=0.1)) == "its BPE has dropout"
    fewer = {token: index for token, index in model["vocab"].items() if token != "ÿ"}
    assert reason(with_model(qwen, vocab=fewer)) == "its vocabulary has not all 256 bytes"
    assert reason(trained(byte_level(add_prefix_space=True))) == "it puts a space before every text"
    steps = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(), byte_level()])
    assert reason(trained(steps)) == "it cuts words in steps (Punctuation, Digits, ByteLevel)"
    assert "keeps them all" in reason(trained(split_by(QWEN_WORDS, "removed")))
    # Words that leave text out: `tokenizers` keeps it, tiktoken does not.
    assert "tiktoken gave other ids on" in reason(trained(split_by(r"\p{L}+")))


def test_without_a_library_transformers_does_it(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    assert str(verified_twin(qwen)) == "tokenizing with transformers: tiktoken is not installed"
    assert TextEncoder(qwen).encode("hi<|im_end|>", first=True) == ids(qwen, "hi<|im_end|>")


@pytest.mark.parametrize("unit", ["a", " ", " \t", "!", "汉", "7", "\x00"])
def test_a_megabyte_of_one_thing_ends_soon(qwen: Any, qwen_twin: Twin, unit: str, capfd: Any) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    encoder = TextEncoder(qwen, qwen_twin)
    encoder._unchecked = 0
    begin = time.process_time()
    found = encoder.encode(text, first=True)
    assert time.process_time() - begin < 5
    assert len(found) > 1000
    assert not capfd.readouterr().err, "it panicked"


def test_a_word_beyond_the_limits_of_fastokens_is_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_all_but("fastokens", monkeypatch)
    tokenizer = trained(split_by(r"(?:[^\n]|\n(?!\n))+|\n+"))
    twin = twin_of(tokenizer, "fastokens")
    paragraph = "a b\n" * 100_000
    assert twin.encode(paragraph) is None
    assert TextEncoder(tokenizer, twin).encode(paragraph, first=True) == ids(tokenizer, paragraph)


def test_fastokens_is_passed_over_where_it_gives_other_ids(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        pytest.importorskip(library)
    other = trained(digits_first()).backend_tokenizer.to_str()
    original = fast_tokenizer._fastokens
    monkeypatch.setattr(fast_tokenizer, "_fastokens", lambda _: original(json.loads(other)))
    twin = verified_twin(qwen)
    assert isinstance(twin, Twin), str(twin)
    assert twin.name == "tiktoken"
    assert twin.passed_over.startswith("fastokens gave other ids on ")


def test_fastokens_is_passed_over_where_it_cannot_read_the_tokenizer(library: str) -> None:
    from tokenizers import normalizers

    twin = verified_twin(trained(split_by(QWEN_WORDS), normalizer=normalizers.NFKC()))
    if library == "tiktoken":
        assert isinstance(twin, Twin)
        assert twin.passed_over == ""
    else:
        assert isinstance(twin, NoTwin)
        assert "fastokens cannot read the tokenizer: " in str(twin)
        assert str(twin).endswith("; tiktoken is not installed")


# --- checks on the user's own texts ---


def liar(tokenizer: Any, word: str) -> Twin:
    """A twin that is wrong on texts with a word."""
    return Twin("liar", lambda text: [0] if word in text else ids(tokenizer, text))


def test_a_twin_that_is_none_is_found_out_the_same_in_every_process() -> None:
    tokenizer = tiny_tokenizer()
    encoder = TextEncoder(tokenizer, liar(tokenizer, "bad"))
    with pytest.raises(TwinMismatch, match="liar gave other ids on 'bad'"):
        encoder.encode("bad", first=True)

    def found_after_the_first(texts: Sequence[str]) -> list[str]:
        encoder = TextEncoder(tokenizer, liar(tokenizer, "bad"))
        for _ in range(CHECKED_FIRST):
            encoder.encode("good", first=True)
        found = []
        for text in texts:
            try:
                encoder.encode(text, first=True)
            except TwinMismatch as error:
                found.append(error.text)
        encoder.check_again()
        with pytest.raises(TwinMismatch):
            encoder.encode(texts[0], first=True)
        return found

    texts = [f"bad {number}" for number in range(2000)]
    found = found_after_the_first(texts)
    assert 2000 / CHECKED_SHARE / 2 < len(found) < 2000 / CHECKED_SHARE * 2
    assert sorted(found_after_the_first(texts[::-1])) == sorted(found)


def test_marked_text_and_pieces_are_encoded_alike(qwen: Any, qwen_twin: Twin) -> None:
    plain, fast = TextEncoder(qwen), TextEncoder(qwen, qwen_twin)
    for text in ("a<|im_end|>b", "<|im_start|>user\nhi <|im_end|>\n", "", " ", "é<|im_"):
        marked = plain.mark(text, [], "here")
        for first in (True, False):
            assert fast.encode(marked, first=first) == plain.encode(marked, first=first)
            assert fast.encode(text, first=first) == plain.encode(text, first=first)


def odd_text(source: random.Random) -> str:
    """Pieces of control tokens, Unicode and words; seldom what is refused."""
    pieces = ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<tool_call>", "</tool_call>", "\n", "  ", "hello", " w"]
    refused = ["\U000f8ad0", "\ud83d"] if source.random() < 0.02 else []
    stress = source.choice(stress_texts()) if source.random() < 0.3 else ""
    return stress + "".join(source.choices(pieces + refused, k=source.randint(0, 8)))


def test_odd_conversations_become_the_same_documents_with_a_twin(qwen: Any, qwen_twin: Twin) -> None:
    """The same errors, too."""
    source = random.Random(11)

    def outcome(encoder: Encoder, talk: Conversation) -> Any:
        try:
            return [replace(document, ids=document.ids.tolist()) for document in encoder.encode(talk)]
        except DataError as error:
            return str(error)

    plain, fast = Encoder(qwen), Encoder(qwen, twin=qwen_twin)
    fast._text._unchecked = 0
    refused = 0
    for _ in range(200):
        roles = [*("system",) * source.randint(0, 1), *("user", "assistant") * source.randint(1, 3)]
        talk = conversation(*((role, odd_text(source)) for role in roles))
        if source.random() < 0.3:
            function = {"name": odd_text(source), "parameters": {odd_text(source): odd_text(source)}}
            talk = replace(talk, tools=[{"type": "function", "function": function}])
        expected = outcome(plain, talk)
        assert outcome(fast, talk) == expected
        refused += isinstance(expected, str)
    assert 0 < refused < 100


def test_half_a_surrogate_pair_is_refused() -> None:
    encoder = TextEncoder(tiny_tokenizer())
    with pytest.raises(DataError, match=r"here.jsonl:3: half a surrogate pair, U\+D83D"):
        encoder.mark({"content": "x\ud83d"}, [], "here.jsonl:3")
    with pytest.raises(DataError, match=r"half a surrogate pair"):
        encoder.encode("x\udc00", first=True)


# --- SentencePiece ---


def test_our_own_tokenizers_are_encoded_by_sentencepiece(tmp_path: Path) -> None:
    from trainer.data.encode.tokenizer import load_tokenizer

    texts = [row["output"] for row in alpaca_rows(100, longest=20)]
    train_tokenizer(texts, 350, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    twin = verified_twin(tokenizer, tmp_path / "tokenizer")
    assert isinstance(twin, Twin), str(twin)
    assert twin.name == "sentencepiece"
    for text in [*corpus(), "<|im_start|>user\nhi <|im_end|> x<|pad|>"]:
        assert twin.encode(text) == ids(tokenizer, text)
    assert reason(tokenizer) == "it is neither byte-level BPE nor a SentencePiece model"
    # A model that is not this tokenizer's is no twin.
    train_tokenizer(texts[:50], 320, tmp_path / "other")
    assert "sentencepiece gave other ids" in reason(tokenizer, tmp_path / "other")
