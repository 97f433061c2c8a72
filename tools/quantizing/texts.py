"""Token ids to calibrate on and to compare models on: token stores, JSONL rows, plain text, the probes of an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import DataError, MissingInputError

MAX_PROMPTS = 64
# Used when the model brings no probes and the user no data: enough to see a broken model, not to judge a good one.
BUILT_IN_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody is surprised any more.",
    "What is 17 plus 25? The sum is 42, because 7 plus 5 is 12: write 2, carry 1.",
    "北京是中国的首都。今天天气很好，我们去公园散步吧。",
)
Text = str | Sequence[dict[str, Any]]


def ids_of(path: Path, tokenizer: Any, most: int = MAX_PROMPTS) -> list[list[int]]:
    """Token ids of the first `most` rows of a token store, a .jsonl file or a plain text file.

    Raises MissingInputError when there is nothing, DataError for a row that is not understood or a store that was
    built with another tokenizer.
    """
    if path.is_dir():
        return _of_store(path, tokenizer, most)
    return [encoded(text, tokenizer) for text in read_texts(path, most)]


def read_texts(path: Path, most: int = MAX_PROMPTS) -> list[Text]:
    """The `messages` or `text` of the rows of a .jsonl file, the paragraphs of any other."""
    from tools.model_directory.chat import read_rows

    texts: list[Text] = []
    if path.suffix != ".jsonl":
        if not path.is_file():
            raise MissingInputError(f"{path} is not a file", "give a token store, a .jsonl or a plain text file")
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8", "convert it, e.g. with iconv") from error
        paragraphs = [part.strip() for part in content.split("\n\n")]
        texts += [part for part in paragraphs if part][:most]
        return texts
    for number, row in enumerate(read_rows(path, most), 1):
        if isinstance(row.get("messages"), list):
            texts.append(row["messages"])
        elif isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            raise DataError(f"{path}, row {number}: neither messages nor text", "give one of both in every row")
    return texts


def encoded(text: Text, tokenizer: Any) -> list[int]:
    """Token ids of a text, or of a conversation in the tokenizer's chat template."""
    from tools.model_directory.chat import Prompts

    if isinstance(text, str):
        return [int(token) for token in tokenizer.encode(text)]
    rendered = Prompts(tokenizer).text(text)
    return [int(token) for token in tokenizer(rendered, add_special_tokens=False)["input_ids"]]


def probes_of(model: Path) -> list[list[int]]:
    """The prompts on which an export was proved; none when it brings no proof."""
    proof = model / "proof.json"
    if not proof.is_file():
        return []
    try:
        return [[int(token) for token in row] for row in json.loads(proof.read_bytes())["prompts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{proof} is not readable", "export the model again") from error


def _of_store(path: Path, tokenizer: Any, most: int) -> list[list[int]]:
    from trainer.data.encode.tokenizer import load_tokenizer
    from trainer.data.store import open_store

    store = open_store(str(path))
    if load_tokenizer(store.tokenizer_path).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"{path} was built with another tokenizer than the model's", "build a store with the model's")
    count = min(store.n_documents, most)
    # Spread over the store: its documents lie in the order of its sources.
    chosen = [number * store.n_documents // count for number in range(count)]
    return [[int(token) for token in store.document(number)[0]] for number in chosen]
