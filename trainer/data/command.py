"""Build, inspect, verify, compare and convert token stores.

A token store holds tokenised documents with their exact loss mask. `build` makes one, or one a split, from JSON,
JSON Lines, CSV, Parquet, Arrow, text, `datasets` directories, globs and URLs; `inspect` shows what training will see;
`card` describes the data; `leakage` looks for rows that two stores share; `verify` checks every byte.

steadfast data build --input chat.jsonl --tokenizer DIR --sequence-length 4096 -o out/store
steadfast data build recipe.yaml rows.long_text=truncate --workers 8 -o out/store
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.errors import DataError, UsageError

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "completion", "continuation", "text", "preference", "tokens")
EXPORTS = ("parquet", "megatron", "datasets")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = commands.add_parser("build", help="build a token store", description=_BUILD)
    build.add_argument(
        "overrides", nargs="*", metavar="RECIPE.yaml | section.key=value", help="recipe file, then changes to it"
    )
    build.add_argument("--input", action="append", metavar="PATH", help="file, directory, glob or URL; may be repeated")
    build.add_argument("--tokenizer", metavar="DIR", help="directory with tokenizer and chat template")
    build.add_argument("--sequence-length", type=int, metavar="L", help="tokens in a row")
    build.add_argument("--overlap", type=int, metavar="O", help="tokens shared by windows of long rows (default: L/8)")
    build.add_argument("--format", choices=FORMATS, default="auto", help="of the inputs (default: detected)")
    build.add_argument("--map", action="append", metavar="KEY=COLUMN", help="e.g. --map prompt=question")
    build.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: the cores)")
    build.add_argument("--overwrite", action="store_true", help="replace an existing store")
    build.add_argument("--json", action="store_true", help="print the report as JSON")
    build.add_argument("-o", "--out", required=True, type=Path, metavar="STORE", help="directory to make")

    recipe = commands.add_parser("recipe", help="explain every key of a recipe, or print its JSON schema")
    recipe.add_argument("key", nargs="?", help="e.g. windows.overlap or windows")
    recipe.add_argument("--json", action="store_true", help="print the JSON schema")

    inspect = commands.add_parser("inspect", help="show decoded rows with the supervised part marked")
    inspect.add_argument("store", metavar="STORE", help="directory or URL")
    inspect.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show")
    inspect.add_argument("--first-row", type=int, default=0, metavar="R", help="row to begin with")
    inspect.add_argument("--json", action="store_true", help="print ids, text and spans as JSON")

    verify = commands.add_parser("verify", help="check every byte of a store")
    verify.add_argument("store", metavar="STORE", help="directory or URL")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")

    card = commands.add_parser("card", help="describe a store: lengths, sources, what was left out, mask examples")
    card.add_argument("store", metavar="STORE", help="directory or URL")
    card.add_argument("-o", "--out", type=Path, metavar="FILE.html", help="write HTML instead of printing")

    leakage = commands.add_parser("leakage", help="rows that two or more stores share, exactly or nearly")
    leakage.add_argument("stores", nargs="+", metavar="STORE", help="directories or URLs")
    leakage.add_argument("--threshold", type=float, default=0.8, help="similarity from which rows are near duplicates")
    leakage.add_argument("--json", action="store_true", help="print the pairs as JSON")

    diff = commands.add_parser("diff", help="what differs between two stores")
    diff.add_argument("stores", nargs=2, metavar="STORE", help="directories or URLs")
    diff.add_argument("--json", action="store_true", help="print the difference as JSON")

    export = commands.add_parser("export", help="write a store in a format of other tools")
    export.add_argument("store", metavar="STORE", help="directory or URL")
    export.add_argument("out", type=Path, metavar="OUT", help="file or directory to make")
    export.add_argument("--to", choices=EXPORTS, required=True, help="format")
    export.add_argument("--json", action="store_true", help="print the report as JSON")


_BUILD = """Build a token store, or one a split.

Everything about a build can stand in a recipe (YAML): steadfast data recipe explains its keys. The options below are
short for the keys that most builds need; words like rows.long_text=truncate change any key. A build that is killed
continues when the same command is given again."""


def run(arguments: argparse.Namespace) -> int:
    """Dispatch."""
    actions = {
        "build": _build,
        "recipe": _recipe,
        "inspect": _inspect,
        "verify": _verify,
        "card": _card,
        "leakage": _leakage,
        "diff": _diff,
        "export": _export,
    }
    return actions[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from trainer.data.build.progress import shown_progress
    from trainer.data.build.recipe import load_recipe
    from trainer.data.build.run import build_store
    from trainer.data.store.report import report_lines

    words: list[str] = arguments.overrides
    recipe_file = Path(words.pop(0)) if words and "=" not in words[0] else None
    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers} is too few", "give 1 or more")
    recipe = load_recipe(recipe_file, [*_words_of(arguments), *words])
    with shown_progress() as progress:
        report = build_store(
            recipe, arguments.out, workers=arguments.workers, overwrite=arguments.overwrite, progress=progress
        )
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    for line in report_lines(report):
        print(line)
    first = report["stores"][0]["name"]
    print(f"next: steadfast data inspect {arguments.out / first if first else arguments.out} --rows 3")
    return 0


def _words_of(arguments: argparse.Namespace) -> list[str]:
    """The options as recipe words."""
    words = []
    if arguments.input:
        columns = dict(_pair(word) for word in arguments.map or ())
        told = ({} if arguments.format == "auto" else {"format": arguments.format}) | (
            {"map": columns} if columns else {}
        )
        words.append(f"sources={json.dumps([{'path': path, **told} for path in arguments.input], ensure_ascii=False)}")
    elif arguments.map or arguments.format != "auto":
        raise UsageError("--map and --format go with --input", "write them into the sources of the recipe")
    for key, value in (
        ("tokenizer", arguments.tokenizer),
        ("rows.sequence_length", arguments.sequence_length),
        ("windows.overlap", arguments.overlap),
    ):
        if value is not None:
            words.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return words


def _pair(word: str) -> tuple[str, str]:
    key, equals, column = word.partition("=")
    if not (key and equals and column):
        raise UsageError(f"--map {word} names no column", "write --map prompt=question")
    return key, column


def _recipe(arguments: argparse.Namespace) -> int:
    from trainer.config.explain import explain, json_schema
    from trainer.data.build.recipe import Recipe

    if arguments.json:
        print(json.dumps(json_schema(Recipe, "Steadfast recipe of a token store"), indent=2, ensure_ascii=False))
    else:
        print(explain(arguments.key, Recipe))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from trainer.data.store import reading
    from trainer.data.store.inspect import inspect_rows, plain_row, show_rows
    from trainer.data.store.report import source_lines

    with reading(arguments.store) as store:
        rows = inspect_rows(store, arguments.first_row, arguments.rows)
        manifest = store.manifest
    if arguments.json:
        summary: dict[str, Any] = {
            name: manifest[name] for name in ("documents", "tokens", "supervised_tokens", "rows", "samples", "plan")
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


def _card(arguments: argparse.Namespace) -> int:
    from trainer.data.quality.card import card_html, show_card
    from trainer.data.store import reading
    from trainer.data.store.describe import data_card
    from trainer.durable import write_file

    with reading(arguments.store) as store:
        card = data_card(store)
    if arguments.out is None:
        show_card(card)
        return 0
    write_file(arguments.out, card_html(card))
    print(f"card       {arguments.out}")
    return 0


def _leakage(arguments: argparse.Namespace) -> int:
    from trainer.data.quality.leakage import find_leaks
    from trainer.data.store import reading
    from trainer.data.store.describe import leak_lines, store_texts

    if len(arguments.stores) < 2:
        raise UsageError("one store leaks nowhere", "give two or more")
    with ExitStack() as stack:
        stores = {place: store_texts(stack.enter_context(reading(place))) for place in arguments.stores}
        report = find_leaks(stores, arguments.threshold)
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps({"texts": report.texts, "leaks": [asdict(leak) for leak in report.leaks]}, ensure_ascii=False))
    else:
        for line in leak_lines(report):
            print(line)
    return DataError.exit_code if report.leaks else 0


def _diff(arguments: argparse.Namespace) -> int:
    from trainer.data.store import reading
    from trainer.data.store.diff import diff_stores

    with reading(arguments.stores[0]) as first, reading(arguments.stores[1]) as second:
        found = diff_stores(first, second)
    if arguments.json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        for line in found.lines():
            print(line)
    return 0 if found.equal else 1


def _export(arguments: argparse.Namespace) -> int:
    from trainer.data.store import reading
    from trainer.data.store.interop import export_store

    with reading(arguments.store) as store:
        report = export_store(store, arguments.out, arguments.to)
    print(
        json.dumps(report)
        if arguments.json
        else f"{report['format']:<10} {report['path']}: {report['documents']:,} documents, {report['tokens']:,} tokens"
    )
    return 0
