"""Small seeded corpora and a tiny tokenizer built in code: enough to make a token store in a fraction of a second."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.data.build.recipe import Recipe, load_recipe
from trainer.data.build.run import build_store
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE
from trainer.data.records import Conversation
from trainer.data.store import TokenStore, open_store

WORDS = [
    "red",
    "blue",
    "seven",
    "eight",
    "apple",
    "river",
    "stone",
    "run",
    "苹果",
    "河流",
    "七",
    "八",
    "跑",
    "走",
    "读",
]


def sentence(random_source: random.Random, words: int) -> str:
    return " ".join(random_source.choice(WORDS) for _ in range(words))


def alpaca_rows(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [
        {
            "instruction": f"say {index}: {sentence(source, source.randint(1, longest))}",
            "input": "" if index % 3 else sentence(source, 2),
            "output": sentence(source, source.randint(1, longest)),
        }
        for index in range(count)
    ]


def message_rows(count: int, seed: int = 0, turns: int = 3, longest: int = 12) -> list[dict[str, Any]]:
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": sentence(source, 3)}] if source.random() < 0.5 else []
        for _ in range(source.randint(1, turns)):
            messages.append({"role": "user", "content": sentence(source, source.randint(1, longest))})
            messages.append({"role": "assistant", "content": sentence(source, source.randint(1, longest))})
        rows.append({"messages": messages})
    return rows


def sharegpt_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    tools = [{"name": "look_up", "description": "find a word", "parameters": {"type": "object"}}]
    return [
        {
            "conversations": [
                {"from": "human", "value": sentence(source, 3)},
                {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": {"word": "apple"}})},
                {"from": "observation", "value": json.dumps({"found": sentence(source, 2)})},
                {"from": "gpt", "value": sentence(source, 4)},
            ],
            "tools": json.dumps(tools),
        }
        for _ in range(count)
    ]


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_tokenizer(template: str | None = DEFAULT_CHAT_TEMPLATE, extra_tokens: Sequence[Any] = ()) -> Any:
    """A byte-level tokenizer (a token a byte, 259 tokens) with ChatML control tokens; decodes everything exactly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.add_tokens(list(extra_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


@lru_cache(maxsize=1)
def default_tokenizer() -> Any:
    return tiny_tokenizer()


def save_tokenizer(path: Path, template: str | None = DEFAULT_CHAT_TEMPLATE) -> Path:
    tiny_tokenizer(template).save_pretrained(path)
    return path


def recipe_of(files: Sequence[Any], tokenizer: Path, sequence_length: int = 128, *words: str) -> Recipe:
    """A recipe over `files` (paths, or whole sources as mappings) with `section.key=value` words."""
    sources = [file if isinstance(file, dict) else {"path": str(file)} for file in files]
    given = [f"sources={json.dumps(sources)}", f"tokenizer={json.dumps(str(tokenizer))}"]
    return load_recipe(None, [*given, f"rows.sequence_length={sequence_length}", *words])


def tiny_store(
    directory: Path,
    rows: Sequence[dict[str, Any]] | None = None,
    sequence_length: int = 128,
    words: Sequence[str] = (),
    **options: Any,
) -> TokenStore:
    """A token store of `rows` (default: 40 alpaca rows, some longer than the sequence length) below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = alpaca_rows(40, longest=30) if rows is None else rows
    file = write_json_lines(directory / "rows.jsonl", rows)
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    build_store(recipe_of([file], tokenizer, sequence_length, *words), directory / "store", **options)
    return open_store(directory / "store")


def conversation(*turns: tuple[str, str], tools: list[dict[str, Any]] | None = None) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in turns), tools, "here.jsonl:1")
