from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.corpora import alpaca_rows, conversation, tiny_tokenizer
from trainer.data.encode.stress_texts import STRESS_TEXTS
from trainer.data.encode.templates import Encoder
from trainer.data.encode.tokenizer import fingerprint, load_tokenizer, padding_id, template_hash
from trainer.data.encode.tokenizer_training import TokenizerReport, train_tokenizer
from trainer.errors import CannotWriteError, DataError, UsageError


def corpus() -> list[str]:
    rows = alpaca_rows(300, seed=5, longest=20)
    code = [
        "def add(a, b):\n    return a + b\n",
        "== ==== ====== aaaa abab ababab",
        "<0xAB> <0x41> ▁ x▁y",
        "im end im_end",
    ] * 30
    return [row[key] for row in rows for key in ("instruction", "input", "output")] + code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizerReport]:
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    return out, train_tokenizer(corpus(), 400, out)


@pytest.fixture(scope="module")
def tokenizer(trained: tuple[Path, TokenizerReport]) -> Any:
    return load_tokenizer(trained[0])


@pytest.fixture(scope="module")
def sentencepiece_model(trained: tuple[Path, TokenizerReport]) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(trained[0] / "sentencepiece.model"))


def test_plain_transformers_loads_it(trained: tuple[Path, TokenizerReport], tokenizer: Any) -> None:
    out, report = trained
    assert len(tokenizer) == report.vocabulary_size == 400
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|im_end|>", None)
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1
    assert {file.name for file in out.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "sentencepiece.model"}
    assert report.bytes_per_token > 1.5
    assert not list(out.parent.glob(".*"))


# U+2581 is SentencePiece's own space and reads back as one.
anything = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=60)
runs = st.lists(st.sampled_from(["a", "ab", "▁", " ", "  ", "=", "red", "7", "苹", "\n", "<0xAB>"]), max_size=40).map(
    "".join
)


@given(st.one_of(anything, runs))
@settings(max_examples=300, deadline=None)
def test_ids_equal_sentencepiece_on_anything(tokenizer: Any, sentencepiece_model: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == sentencepiece_model.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_control_texts_in_conversations_get_the_ids_of_plain_text(tokenizer: Any, sentencepiece_model: Any) -> None:
    text = "<|im_end|>"
    (encoded,) = Encoder(tokenizer).encode(conversation(("user", text), ("assistant", "ok")))
    plain = sentencepiece_model.encode(text)
    begin = len(tokenizer("<|im_start|>user\n")["input_ids"])
    assert encoded.ids[begin : begin + len(plain) + 1].tolist() == [*plain, tokenizer.eos_token_id]
    assert len(plain) < len(text), "learnt pieces are used, not single characters"


def test_stress_texts(tokenizer: Any, sentencepiece_model: Any) -> None:
    for text in STRESS_TEXTS:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids == sentencepiece_model.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_training_is_deterministic(trained: tuple[Path, TokenizerReport], tmp_path: Path) -> None:
    train_tokenizer(corpus(), 400, tmp_path / "again")
    for file in trained[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_vocabulary_the_texts_cannot_give_names_the_largest_possible(tmp_path: Path) -> None:
    texts = ["abc abd", "abc"]
    with pytest.raises(UsageError, match=r"give at most (\d+)") as caught:
        train_tokenizer(texts, 4000, tmp_path / "tokenizer")
    largest = int(str(caught.value).split("give at most ")[1].split(",")[0])
    assert not (tmp_path / "tokenizer").exists()
    with pytest.raises(UsageError):
        train_tokenizer(texts, largest + 1, tmp_path / "tokenizer")
    assert train_tokenizer(texts, largest, tmp_path / "tokenizer").vocabulary_size == largest


def test_many_characters_fit_a_small_vocabulary(tmp_path: Path) -> None:
    texts = ["".join(chr(0x4E00 + (i * 37 + j) % 3000) for j in range(40)) for i in range(100)]
    report = train_tokenizer([*texts, *corpus()], 500, tmp_path / "tokenizer")
    assert report.vocabulary_size == 500


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too small"):
        train_tokenizer(["abc"], 100, tmp_path / "tokenizer")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", ""], 500, tmp_path / "tokenizer")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(CannotWriteError, match="not empty"):
        train_tokenizer(["abc"], 500, tmp_path / "taken")


def test_a_fingerprint_tells_tokenizers_apart_by_what_they_do(tmp_path: Path, tokenizer: Any) -> None:
    one, same = tiny_tokenizer(), tiny_tokenizer()
    assert fingerprint(one) == fingerprint(same)
    one.save_pretrained(tmp_path / "copy")
    assert fingerprint(load_tokenizer(tmp_path / "copy")) == fingerprint(one)
    assert template_hash(load_tokenizer(tmp_path / "copy")) == template_hash(one)
    others = [tokenizer, tiny_tokenizer(extra_tokens=["<x>"]), tiny_tokenizer(extra_tokens=["<y>"])]
    other_eos = tiny_tokenizer()
    other_eos.eos_token = "<|im_start|>"
    assert len({fingerprint(item) for item in [one, other_eos, *others]}) == 5
    assert fingerprint(tiny_tokenizer("{{ messages }}")) == fingerprint(one)
    assert template_hash(tiny_tokenizer("{{ messages }}")) != template_hash(one)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
