"""Tokenizers on the way into a store: load from a local directory, fingerprint, encode.

A tokenizer is known by what it does, not by the name of its files: the fingerprint hashes the ids of fixed probe
texts and the ids of its special tokens. Two directories with the same fingerprint may share a token store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trainer.data.encode.sentencepiece_model import MODEL_NAMES, find_model, is_sentencepiece, tokenizer_from_model
from trainer.errors import DataError, MissingInputError

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog. 0123456789 3.14",
    "敏捷的棕色狐狸跳过了懒狗。漢字かなカナ한글",
    " leading space\n\n  two newlines\tand a tab \r\n",
    "def f(x):\n    return {'a': [1, 2, x ** 2]}  # comment",
    "emoji 😀👩‍👩‍👧‍👦 zero\u200bwidth e\u0301 \u00a0 ﬁ Ａ",
    "<|im_start|>user\nhi<|im_end|></s><s>[INST]<|endoftext|>",
    "",
)

# What a tokenizer directory may hold; everything else there (weights, code) is not copied into a store.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    *MODEL_NAMES,
    "config.json",
)
SETTINGS_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)


def load_tokenizer(path: Path) -> Any:
    """A transformers tokenizer from a local directory; nothing is downloaded and no code of the directory runs.

    A SentencePiece model without tokenizer.json gives exactly the ids that SentencePiece gives, or is refused.

    Raises:
        MissingInputError: no directory at `path`.
        DataError: it holds no tokenizer that can be loaded, or one that cannot encode.
    """
    if not path.is_dir():
        raise MissingInputError(
            f"there is no tokenizer directory {path}", "train one: steadfast tokenizer train --help"
        )
    _check_settings(path)
    from transformers import AutoTokenizer

    model = find_model(path)
    try:
        if model is not None and not (path / "tokenizer.json").is_file() and is_sentencepiece(model):
            tokenizer = tokenizer_from_model(model)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        probes = tokenizer(list(PROBE_TEXTS), add_special_tokens=False)["input_ids"]
    except DataError:
        raise
    except BaseException as error:
        # A panic of the Rust parts is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"cannot load a tokenizer from {path}: {_first_line(error)}", "the directory needs a whole tokenizer.json"
        ) from error
    lost = [text for text, ids in zip(PROBE_TEXTS, probes, strict=True) if text and not ids]
    if lost:
        raise DataError(f"the tokenizer in {path} makes no token of {lost[0]!r}", "its vocabulary is damaged")
    return tokenizer


def _check_settings(path: Path) -> None:
    """Refuse files that are no JSON objects by their own name: transformers does not say which."""
    for name in SETTINGS_FILES:
        if not (path / name).is_file():
            continue
        try:
            value = json.loads((path / name).read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path / name} is damaged: {_first_line(error)}", "copy it again") from error
        if not isinstance(value, dict):
            raise DataError(f"{path / name} is no JSON object", "copy it again")


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def fingerprint(tokenizer: Any) -> str:
    """sha256 of the ids of PROBE_TEXTS, the special tokens' ids and the vocabulary size, hexadecimal."""
    facts = {
        "probes": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBE_TEXTS],
        "special": {name: tokenizer.convert_tokens_to_ids(text) for name, text in _special_tokens(tokenizer).items()},
        "added": sorted((text, int(token)) for text, token in tokenizer.get_added_vocab().items()),
        "size": len(tokenizer),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template, hexadecimal; of an empty text when there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def padding_id(tokenizer: Any) -> int:
    """The id that fills rows: pad, else eos, else 0. It is never a target and never seen by a sample."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    return {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
