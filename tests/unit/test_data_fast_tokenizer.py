import importlib.util
import json
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.corpora import alpaca_rows, tiny_tokenizer
from trainer.data.encode import fast_tokenizer
from trainer.data.encode.control_tokens import CHECKED_FIRST, CHECKED_SHARE, TextEncoder
from trainer.data.encode.fast_tokenizer import NoTwin, Twin, TwinMismatch, verified_twin
from trainer.data.encode.stress_texts import stress_texts
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE
from trainer.data.encode.tokenizer_training import train_tokenizer
from trainer.errors import DataError

needs_tiktoken = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None, reason="tiktoken is not installed: there is no twin to test"
)

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
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))


@pytest.fixture(scope="module")
def qwen() -> Any:
    return trained(split_by(QWEN_WORDS))


@pytest.fixture(scope="module")
def qwen_twin(qwen: Any) -> Twin:
    twin = verified_twin(qwen)
    assert isinstance(twin, Twin), str(twin)
    return twin


def reason(tokenizer: Any, directory: Path | None = None) -> str:
    found = verified_twin(tokenizer, directory)
    assert isinstance(found, NoTwin)
    return found.reason


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


# --- tiktoken ---


@needs_tiktoken
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
def test_usual_ways_to_cut_words_have_a_twin(pre_tokenizer: Any) -> None:
    tokenizer = trained(pre_tokenizer)
    twin = verified_twin(tokenizer)
    assert isinstance(twin, Twin), str(twin)
    for text in corpus():
        assert twin.encode(text) == ids(tokenizer, text)


anything = st.text(st.characters(codec="utf-8"), max_size=60)
runs = st.lists(
    st.sampled_from(
        ["a", "'s", "'S", "ab", " ", "  ", "\n", "\t", "7", "苹", "e\u0301", "\u0300", "<|im_end|>", "!", "\u3000"]
    ),
    max_size=40,
).map("".join)


@needs_tiktoken
@given(st.one_of(anything, runs))
@settings(max_examples=300, deadline=None)
def test_the_twin_gives_the_same_ids_on_anything(qwen: Any, qwen_twin: Twin, text: str) -> None:
    assert qwen_twin.encode(text) == ids(qwen, text)


@needs_tiktoken
def test_added_tokens_are_cut_out_alike() -> None:
    from tokenizers import AddedToken, normalizers

    added = [
        AddedToken("<t>", special=False, normalized=False, lstrip=True),
        AddedToken("<t>x", special=False, normalized=False, rstrip=True),
        AddedToken("\n\n", special=False, normalized=False),
        AddedToken("é", special=False, normalized=True),
        AddedToken("éa", special=False, normalized=True, lstrip=True, rstrip=True),
        AddedToken("molecule", special=False),
    ]
    for normalizer in (None, normalizers.NFC(), normalizers.NFKC()):
        tokenizer = trained(split_by(QWEN_WORDS), added, normalizer)
        twin = verified_twin(tokenizer)
        assert isinstance(twin, Twin), str(twin)
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
    assert reason(single) == "an added token counts only as a single word"


def test_characters_that_skip_normalisation_are_inert() -> None:
    """None of them changes alone, is reordered, or is the second half of a composition."""
    inert = [chr(code) for code in range(0x10000) if fast_tokenizer._NFC_INERT.fullmatch(chr(code))]
    assert not fast_tokenizer._NFC_INERT.fullmatch("\U0001d15e")
    canonical = [unicodedata.decomposition(chr(code)).split() for code in range(0x30000)]
    second = {chr(int(parts[1], 16)) for parts in canonical if len(parts) == 2 and not parts[0].startswith("<")}
    assert len(inert) > 20_000
    assert not [c for c in inert if unicodedata.combining(c) or unicodedata.normalize("NFC", c) != c or c in second]


@needs_tiktoken
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_token_that_no_merge_makes(qwen: Any, ignore_merges: bool) -> None:
    vocabulary = json.loads(qwen.backend_tokenizer.to_str())["model"]["vocab"]
    lost = with_model(qwen, vocab=vocabulary | {"zqj": 950}, ignore_merges=ignore_merges)
    assert (950 in ids(lost, "zqj")) == ignore_merges
    twin = verified_twin(lost)
    assert isinstance(twin, Twin), str(twin)
    for text in ("zqj", " zqj", "zqjz", "zqj zqj\nzqj"):
        assert twin.encode(text) == ids(lost, text)
    # "zqjx" could be made of "zqj" and "x", which is no merge: only tiktoken would do it.
    lost = with_model(qwen, vocab=vocabulary | {"zqj": 950, "zqjx": 951}, ignore_merges=ignore_merges)
    twin = verified_twin(lost)
    if ignore_merges:
        assert str(twin) == "tokenizing with transformers: the token 'zqjx' follows from no merge"
    else:
        assert isinstance(twin, Twin)
        assert twin.encode("zqjx") == ids(lost, "zqjx")


@needs_tiktoken
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


def test_without_tiktoken_transformers_does_it(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert str(verified_twin(qwen)) == "tokenizing with transformers: tiktoken is not installed"
    assert TextEncoder(qwen).encode("hi<|im_end|>", first=True) == ids(qwen, "hi<|im_end|>")


@needs_tiktoken
@pytest.mark.parametrize("unit", ["a", " ", " \t", "!", "汉", "7", "\x00"])
def test_a_megabyte_of_one_thing_ends_soon(qwen: Any, qwen_twin: Twin, unit: str, capfd: Any) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    encoder = TextEncoder(qwen, qwen_twin)
    encoder._unchecked = 0
    begin = time.process_time()
    found = encoder.encode(text, first=True)
    assert time.process_time() - begin < 5
    assert len(found) > 1000
    assert not capfd.readouterr().err, "tiktoken panicked"


# --- checks on the user's own texts ---


class Lying:
    """A twin that is wrong on texts with a word."""

    name = "liar"

    def __init__(self, tokenizer: Any, word: str) -> None:
        self.tokenizer, self.word = tokenizer, word

    def encode(self, text: str) -> list[int]:
        return [0] if self.word in text else ids(self.tokenizer, text)


def test_a_twin_that_is_none_is_found_out_the_same_in_every_process() -> None:
    tokenizer = tiny_tokenizer()
    encoder: Any = TextEncoder(tokenizer, Lying(tokenizer, "bad"))  # type: ignore[arg-type]
    with pytest.raises(TwinMismatch, match="liar gave other ids on 'bad'"):
        encoder.encode("bad", first=True)

    def found_after_the_first(texts: Sequence[str]) -> list[str]:
        encoder = TextEncoder(tokenizer, Lying(tokenizer, "bad"))  # type: ignore[arg-type]
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


@needs_tiktoken
def test_marked_text_and_pieces_are_encoded_alike(qwen: Any, qwen_twin: Twin) -> None:
    plain, fast = TextEncoder(qwen), TextEncoder(qwen, qwen_twin)
    for text in ("a<|im_end|>b", "<|im_start|>user\nhi <|im_end|>\n", "", " ", "é<|im_"):
        marked = plain.mark(text, [], "here")
        for first in (True, False):
            assert fast.encode(marked, first=first) == plain.encode(marked, first=first)
            assert fast.encode(text, first=first) == plain.encode(text, first=first)


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
