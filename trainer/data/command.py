"""Build, inspect and verify a token store.

A token store holds tokenised conversations with their exact loss mask. `build` makes one from JSON, JSON Lines or
`datasets` directories, `inspect` shows what training will see, `verify` checks every byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `steadfast data build|inspect|verify`."""
    commands = parser.add_subparsers(dest="action", required=True)

    build = commands.add_parser("build", help="build a token store from local files")
    build.add_argument("--input", action="append", required=True, type=Path, metavar="FILE", help="may be repeated")
    build.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="tokenizer with a chat template")
    build.add_argument("--sequence-length", required=True, type=int, metavar="L", help="tokens in a row")
    build.add_argument("--overlap", type=int, metavar="O", help="tokens shared by windows of long rows (default: L/8)")
    build.add_argument(
        "--format", choices=("auto", "alpaca", "messages", "sharegpt"), default="auto", help="of the input"
    )
    build.add_argument("--overwrite", action="store_true", help="replace an existing store")
    build.add_argument("--json", action="store_true", help="print the report as JSON")
    build.add_argument("-o", "--out", required=True, type=Path, metavar="STORE", help="directory to make")

    inspect = commands.add_parser("inspect", help="show decoded rows with the supervised part marked")
    inspect.add_argument("store", type=Path, metavar="STORE")
    inspect.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show")
    inspect.add_argument("--first-row", type=int, default=0, metavar="R", help="row to begin with")
    inspect.add_argument("--json", action="store_true", help="print ids, text and spans as JSON")

    verify = commands.add_parser("verify", help="check every byte of a store")
    verify.add_argument("store", type=Path, metavar="STORE")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Dispatch."""
    actions = {"build": _build, "inspect": _inspect, "verify": _verify}
    return actions[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from trainer.data.store import build_store

    report = build_store(
        arguments.input,
        arguments.tokenizer,
        arguments.out,
        arguments.sequence_length,
        overlap=arguments.overlap,
        format=None if arguments.format == "auto" else arguments.format,
        progress=_progress if sys.stderr.isatty() else None,
        overwrite=arguments.overwrite,
    )
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    if arguments.json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return 0
    from trainer.data.inspect import source_lines

    for line in source_lines([asdict(source) for source in report.sources]):
        print(line)
    length = report.sequence_length
    print(
        f"rows       {report.rows:,} of {length:,} tokens from {report.samples:,} samples, "
        f"{report.padding_share:.1%} padding; windows overlap by {report.overlap} tokens, "
        f"{report.windows_dropped:,} without a target dropped"
    )
    print(f"store      {report.path}")
    print(f"next: steadfast data inspect {report.path} --rows 3")
    return 0


def _progress(file: str, rows: int) -> None:
    sys.stderr.write(f"\r{file}: {rows:,} rows\033[K")
    sys.stderr.flush()


def _inspect(arguments: argparse.Namespace) -> int:
    from trainer.data.inspect import inspect_rows, plain_row, show_rows, source_lines
    from trainer.data.store import open_store

    store = open_store(arguments.store)
    rows = inspect_rows(store, arguments.first_row, arguments.rows)
    manifest = store.manifest
    if arguments.json:
        summary: dict[str, Any] = {
            name: manifest[name]
            for name in ("documents", "tokens", "supervised_tokens", "rows", "samples", "sequence_length", "overlap")
        }
        print(json.dumps({**summary, "sources": manifest["sources"], "shown": rows}, ensure_ascii=False))
        return 0
    for line in source_lines(manifest["sources"]):
        print(line)
    print()
    if sys.stdout.isatty():
        show_rows(rows)
    else:
        for row in rows:
            print(plain_row(row))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from trainer.data.store import verify_store

    report = verify_store(arguments.store)
    if arguments.json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return 0
    print(f"{report.path}: {report.files} files, {report.bytes / 1e6:.1f} MB, every sha256 right")
    print(f"{report.documents:,} documents, {report.tokens:,} tokens, {report.supervised_tokens:,} supervised")
    print(f"fingerprint {report.fingerprint}")
    return 0
