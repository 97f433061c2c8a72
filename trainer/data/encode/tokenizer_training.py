"""Train a SentencePiece BPE tokenizer, turn it into a Hugging Face one, and prove that both give the same ids.

SentencePiece learns the pieces (identity normalisation, digits one by one, bytes as a fallback, so every text can be
written and read back). `tokenizers` gets the same pieces and the merges that follow from their ranks. Because such
conversions go wrong silently (a lost newline, an added space), the result is compared with SentencePiece on training
texts and on a stress list before anything is published.

One thing cannot be kept: U+2581, which SentencePiece uses for the space, reads back as a space.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.encode.sentencepiece_model import SPACE, backend_of
from trainer.data.encode.stress_texts import STRESS_TEXTS
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE
from trainer.durable import sync_directory, sync_file, write_errors, write_file
from trainer.errors import CannotWriteError, DataError, UsageError

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
RESERVED = 4 + 256  # <unk>, three control tokens, one piece for each byte
SAMPLE_TEXTS = 2000
SENTENCE_BYTES = 16384


@dataclass(frozen=True)
class TokenizerReport:
    """What `train_tokenizer` made: where, how large, how well it compresses, and what was compared."""

    path: str
    vocabulary_size: int
    texts: int
    bytes: int
    tokens_in_sample: int
    bytes_per_token: float
    texts_compared: int


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> TokenizerReport:
    """Train on `texts` and write a directory that `transformers.AutoTokenizer.from_pretrained(out)` loads.

    Args:
        texts: training texts, in the order that matters for ties (the result is deterministic).
        vocab_size: final number of tokens, the special ones included.
        out: directory to make; it must not exist or be empty. It appears complete or not at all.

    Raises:
        UsageError: `vocab_size` is too small or larger than the texts can give; the message says the bounds.
        DataError: no text, or the Hugging Face tokenizer differs from SentencePiece.
        CannotWriteError: `out` is taken or cannot be written.
    """
    kept = [text for text in texts if text]
    if not kept:
        raise DataError("there is no text to train a tokenizer on", "give files with text")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotWriteError(f"{out} exists and is not empty", "choose another -o, or remove it first")
    model = _train_sentencepiece(kept, vocab_size)
    tokenizer = _to_transformers(model)
    sample = kept[:: max(1, len(kept) // SAMPLE_TEXTS)][:SAMPLE_TEXTS]
    tokens = _prove_equal(model, tokenizer, sample)
    _publish(model, tokenizer, out)
    size = sum(len(text.encode()) for text in sample)
    return TokenizerReport(
        path=str(out),
        vocabulary_size=len(tokenizer),
        texts=len(kept),
        bytes=sum(len(text.encode()) for text in kept),
        tokens_in_sample=tokens,
        bytes_per_token=round(size / max(tokens, 1), 3),
        texts_compared=len(sample) + len(STRESS_TEXTS),
    )


def _train_sentencepiece(texts: Sequence[str], vocab_size: int) -> Any:
    """A SentencePieceProcessor with exactly `vocab_size` pieces."""
    import sentencepiece

    smallest = RESERVED + 4
    if vocab_size < smallest:
        raise UsageError(f"--vocab-size {vocab_size} is too small", f"give at least {smallest} (bytes and specials)")
    sentences = list(_sentences(texts, (vocab_size - RESERVED) // 2))
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentence_length=4 * SENTENCE_BYTES,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # Control symbols are never found in text: the ids exist, text cannot produce them.
            control_symbols=[PAD, TURN_START, TURN_END],
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        found = re.search(r"<= (\d+)", str(error))
        if "too high" in str(error).lower() and found:
            raise UsageError(
                f"--vocab-size {vocab_size} is more than these texts can give",
                f"give at most {found.group(1)}, or more text",
            ) from error
        raise DataError(f"SentencePiece refused: {str(error).splitlines()[0]}", "check the texts") from error
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def _sentences(texts: Iterable[str], characters: int) -> Iterable[str]:
    """Lines of all texts, cut where a character is too rare to get a piece of its own (bytes write it).

    The most frequent `characters` are kept, so a small vocabulary is not eaten up by single characters.
    """
    texts = [text.replace(SPACE, " ") for text in texts]
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    rare = {character for character in ranked[characters:] if character != " "}
    rare |= {character for character in counts if ord(character) < 32 or ord(character) == 127}
    cut = re.compile("[" + re.escape("".join(sorted(rare))) + "]+") if rare else None
    for text in texts:
        for line in cut.split(text) if cut else [text]:
            for start in range(0, len(line), SENTENCE_BYTES // 4):
                yield line[start : start + SENTENCE_BYTES // 4]


def _to_transformers(model: Any) -> Any:
    """The same tokenizer as a transformers one, with the default chat template."""
    from transformers import PreTrainedTokenizerFast

    backend = backend_of(model.serialized_model_proto())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=DEFAULT_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _prove_equal(model: Any, tokenizer: Any, sample: Sequence[str]) -> int:
    """Compare ids with SentencePiece and decoded text with the original; returns the tokens of `sample`."""
    from tokenizers import Tokenizer

    # Special-token texts are plain text for SentencePiece: compare without the added tokens.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    texts = [*STRESS_TEXTS, *sample]
    expected = model.encode(texts)
    total = 0
    for text, right, encoding in zip(
        texts, expected, backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if encoding.ids != right:
            raise DataError(
                f"the Hugging Face tokenizer differs from SentencePiece on {text[:60]!r}",
                "this is a bug of ours: report it",
            )
        if backend.decode(right, skip_special_tokens=False) != text.replace(SPACE, " "):
            raise DataError(f"the tokenizer does not give back {text[:60]!r}", "this is a bug of ours: report it")
        total += len(right)
    return total - sum(map(len, expected[: len(STRESS_TEXTS)]))


def _publish(model: Any, tokenizer: Any, out: Path) -> None:
    """Write beside `out`, load it back the way a user does, compare, rename."""
    from transformers import AutoTokenizer

    temporary = out.parent / f".{out.name}.{os.getpid()}.building"
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            tokenizer.save_pretrained(temporary)
            write_file(temporary / "sentencepiece.model", model.serialized_model_proto())
            loaded = AutoTokenizer.from_pretrained(temporary, local_files_only=True, trust_remote_code=False)
            texts = [*STRESS_TEXTS, tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)]
            if loaded(texts)["input_ids"] != tokenizer(texts)["input_ids"]:
                raise DataError("the saved tokenizer loads as a different one", "this is a bug of ours: report it")
            for file in temporary.iterdir():
                sync_file(file)
            temporary.rename(out)
            sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
