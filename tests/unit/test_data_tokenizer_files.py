"""Tokenizer directories as they come: SentencePiece models alone, and damaged files."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.corpora import alpaca_rows, save_tokenizer
from trainer.data.encode.fast_tokenizer import Twin, verified_twin
from trainer.data.encode.stress_texts import stress_texts
from trainer.data.encode.tokenizer import load_tokenizer
from trainer.errors import DataError

TURNS = ["<|im_start|>", "<|im_end|>"]
EXACT = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


def sentencepiece_model(directory: Path, rich: bool = True, **options: Any) -> Any:
    """A directory with nothing but tokenizer.model, `rich` in markup; returns SentencePiece's own tokenizer."""
    import sentencepiece

    texts = [row[key] for row in alpaca_rows(200, seed=7, longest=20) for key in ("instruction", "output")]
    if rich:
        texts += ["<html> </p> <a> A1B2C3D4E5F6 0x10 </ul> s/k/x/ un_im_start|end|user"] * 20
    buffer = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 400, "byte_fallback": True, "character_coverage": 1.0}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=buffer,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
        **settings | options,
    )
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        EXACT,
        EXACT | {"byte_fallback": False},
        EXACT | {"user_defined_symbols": TURNS},
        EXACT | {"add_dummy_prefix": True},
        EXACT | {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "identity"},
        EXACT | {"rich": False},
    ],
    ids=["exact", "no bytes", "symbols", "prefix", "spaces removed", "both", "poor"],
)
def test_a_model_alone_gives_sentencepieces_own_ids(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path, model_type=model_type, **options)
    tokenizer = load_tokenizer(tmp_path)
    for text in stress_texts(["</s>", "<0x41>", *TURNS]):
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not any(turn in text for turn in TURNS):
            assert found == model.encode(text), text
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens == model.encode(text) or "</s>" in text or "<s>" in text or "<unk>" in text, text
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    if not options.get("remove_extra_whitespaces", True):
        assert tokenizer.decode(model.encode("red  apple ")) == "red  apple "
    twin = verified_twin(tokenizer, tmp_path)
    assert isinstance(twin, Twin), str(twin)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "they differ on"),
        (EXACT | {"add_dummy_prefix": True, "user_defined_symbols": TURNS}, "symbols together with a space before"),
        (EXACT | {"remove_extra_whitespaces": True, "user_defined_symbols": TURNS}, "together with spaces removed"),
        (EXACT | {"model_type": "char"}, "neither a BPE nor a unigram model"),
        (EXACT | {"treat_whitespace_as_suffix": True}, "does not put the space before the word"),
    ],
    ids=["nmt_nfkc", "prefix", "spaces", "characters", "suffix"],
)
def test_a_model_whose_ids_cannot_be_had_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, **options)
    with pytest.raises(DataError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.model'}: ")
    assert len(caught.value.lines()) == 1


def test_settings_beside_a_model_are_kept(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, **EXACT, user_defined_symbols=TURNS)
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizer", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.model_max_length) == ("<|im_end|>", "<s>", 77)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    # The newline after a turn's beginning is not lost.
    assert tokenizer.decode(tokenizer("<|im_start|>user\nhi")["input_ids"]) == "<|im_start|>user\nhi"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("whole") / "tokenizer")


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        value = json.loads(raw)
        change(value)
        return json.dumps(value).encode()

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("tokenizer.json", lambda raw: raw[: len(raw) // 2], r"tokenizer\.json is damaged"),
        ("tokenizer.json", lambda raw: b"", r"tokenizer\.json is damaged"),
        ("tokenizer.json", lambda raw: b"\x00\xff" * 50, r"tokenizer\.json is damaged"),
        ("tokenizer.json", lambda raw: b"[1]", r"tokenizer\.json is no JSON object"),
        ("tokenizer.json", lambda raw: b"{}", "cannot load a tokenizer"),
        ("tokenizer.json", edited(lambda value: value["model"].pop("merges")), "cannot load a tokenizer.*merges"),
        ("tokenizer.json", edited(lambda value: value["model"].update(merges=[["a", "zz"]])), "out of vocabulary"),
        ("tokenizer.json", edited(lambda value: value["model"].update(vocab={})), "makes no token of"),
        ("tokenizer.json", edited(lambda value: value["model"].update(type="Odd")), "cannot load a tokenizer"),
        ("tokenizer_config.json", lambda raw: raw[:-9], r"tokenizer_config\.json is damaged"),
        ("tokenizer_config.json", lambda raw: b"[" * 100_000, r"tokenizer_config\.json is damaged"),
    ],
)
def test_a_damaged_directory_is_one_line(
    name: str, damage: Callable[[bytes], bytes], words: str, whole: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "tokenizer"))
    (directory / name).write_bytes(damage((directory / name).read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        load_tokenizer(directory)
    assert len(str(caught.value).splitlines()) == 1
    assert str(directory) in str(caught.value)


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, **EXACT)
    raw = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="cannot load a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_huge_configuration_beside_it_is_fine(whole: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "tokenizer"))
    huge = {"model_type": "llama"} | {f"key{number}": list(range(20)) for number in range(2_000)}
    (directory / "config.json").write_text(json.dumps(huge))
    assert len(load_tokenizer(directory)) == len(load_tokenizer(whole))
