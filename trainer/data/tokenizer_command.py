"""Train a tokenizer on your files.

`train` reads the same files as `steadfast data build` (also plain .txt), trains a SentencePiece BPE model, converts it
to a Hugging Face tokenizer with a chat template, proves that both give the same ids, and saves it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `steadfast tokenizer train`."""
    commands = parser.add_subparsers(dest="action", required=True)
    train = commands.add_parser("train", help="train a SentencePiece tokenizer", description=__doc__)
    train.add_argument("--input", action="append", required=True, type=Path, metavar="FILE", help="may be repeated")
    train.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens in total, special ones included"
    )
    train.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="directory to make")
    train.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train, write, report."""
    from dataclasses import asdict

    from trainer.data.encode.tokenizer_training import train_tokenizer

    texts = [text for path in arguments.input for text in texts_of(path)]
    report = train_tokenizer(texts, arguments.vocab_size, arguments.out)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(f"trained on {report.texts:,} texts, {report.bytes / 1e6:.2f} MB")
    print(f"vocabulary {report.vocabulary_size:,}, {report.bytes_per_token:.2f} bytes a token on the training texts")
    print(f"ids equal to SentencePiece and text read back exactly on {report.texts_compared:,} texts")
    print(f"tokenizer  {report.path}")
    print(f"next: steadfast data build --input FILE --tokenizer {report.path} --sequence-length 1024 -o STORE")
    return 0


def texts_of(path: Path) -> Iterator[str]:
    """Every text a model would see of one input file: contents of its records, or lines of a .txt file."""
    from trainer.data.records import Layout, PlainText, TokenIds, detect_layout, to_record
    from trainer.data.sources import read_lines, read_rows
    from trainer.errors import DataError

    if path.suffix == ".txt":
        yield from read_lines(path)
        return
    layout: Layout | None = None
    for row in read_rows(path):
        layout = layout or detect_layout(row)
        record = to_record(row, layout)
        if isinstance(record, TokenIds):
            raise DataError(f"{record.place}: token ids, not text", "give the text they were made from")
        if isinstance(record, PlainText):
            yield from filter(None, (record.prompt, record.text))
            continue
        for message in record.messages:
            yield message["content"]
            if calls := message.get("tool_calls"):
                yield from _json_texts(calls)
        if record.tools:
            yield from _json_texts(record.tools)


def _json_texts(items: list[dict[str, Any]]) -> Iterator[str]:
    """Tool calls and descriptions as a chat template writes them."""
    for item in items:
        yield json.dumps(item["function"], ensure_ascii=False)
