"""Build a token store: read, template, tokenise, window, pack, write. The layout is described in `store`.

Everything is written into a directory beside OUT that is renamed when complete: whoever sees OUT sees a whole store,
and a build that is killed leaves none. Equal input gives an equal store, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cli import VERSION
from trainer.data.packing import RowPlan
from trainer.data.reader import (
    MANIFEST,
    PLAN_ARRAYS,
    SCHEMA_VERSION,
    body_hash,
    content_fingerprint,
    default_overlap,
    plan_name,
)
from trainer.data.records import Conversation, Layout, Record, detect_layout, to_record
from trainer.data.shard_writer import ShardWriter
from trainer.data.shards import write_arrays
from trainer.data.sources import read_rows
from trainer.data.templates import Encoder
from trainer.data.tokenize import TOKENIZER_FILES, fingerprint, load_tokenizer, padding_id, template_hash
from trainer.data.windows import check_window
from trainer.durable import file_chunks, sha256_of_file, sync_directory, write_errors, write_file, xxh3_of_file
from trainer.errors import CannotWriteError, DataError

SHARD_TOKENS = 32 << 20
PROGRESS_ROWS = 500


@dataclass
class SourceReport:
    """Counts of one input: what was read, what was kept, and what was not and where it first happened."""

    file: str
    bytes: int
    sha256: str
    format: str = ""
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    methods: dict[str, int] = field(default_factory=dict)
    neutralised: dict[str, int] = field(default_factory=dict)
    unknown_tokens: int = 0
    rows_without_answer: int = 0
    first_without_answer: str = ""
    rows_with_empty_answer: int = 0
    first_empty_answer: str = ""
    windows_dropped: int = 0


@dataclass(frozen=True)
class BuildReport:
    """What `build_store` made."""

    path: str
    fingerprint: str
    documents: int
    tokens: int
    supervised_tokens: int
    samples: int
    rows: int
    windows_dropped: int
    padding_share: float
    sequence_length: int
    overlap: int
    sources: tuple[SourceReport, ...]


def build_store(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    out: Path,
    sequence_length: int,
    overlap: int | None = None,
    format: str | None = None,
    progress: Callable[[str, int], None] | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> BuildReport:
    """Build the token store `out` from local files.

    Args:
        inputs: JSON, JSON Lines or `datasets` directories; documents keep their order.
        tokenizer_path: local directory with tokenizer and chat template; it is copied into the store.
        out: directory to make.
        sequence_length: tokens in a row.
        overlap: tokens neighbouring windows of a long document share; default an eighth of the length.
        format: alpaca, messages or sharegpt for all inputs; None detects it for each.
        progress: called with (file, rows read so far) now and then.
        overwrite: replace an existing store.
        shard_tokens: tokens after which a new shard file begins.

    Raises:
        UsageError, MissingInputError, DataError, CannotWriteError: with file and line where there is one.
    """
    overlap = default_overlap(sequence_length) if overlap is None else overlap
    check_window(sequence_length, overlap)
    inputs, tokenizer_path, out = [Path(item) for item in inputs], Path(tokenizer_path), Path(out)
    _check_target(out, overwrite)
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer)
    with _building(out, overwrite) as temporary:
        _copy_tokenizer(tokenizer_path, tokenizer, temporary / "tokenizer")
        writer = ShardWriter(temporary / "tokens", len(tokenizer), shard_tokens)
        sources = [
            _encode_source(number, path, format, encoder, writer, tokenizer.unk_token_id, progress)
            for number, path in enumerate(inputs)
        ]
        writer.flush()
        plan = writer.plan(sequence_length, overlap)
        _count_dropped(plan, writer, sources)
        if plan.n_rows == 0:
            raise DataError(f"no supervised token in {sources[0].file}", "no row would train anything")
        (temporary / "plans").mkdir()
        write_arrays(
            temporary / "plans" / plan_name(sequence_length, overlap, True),
            {name: getattr(plan, name) for name in PLAN_ARRAYS},
            {"schema": str(SCHEMA_VERSION)},
        )
        manifest: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "steadfast": VERSION,
            "documents": sum(source.documents for source in sources),
            "tokens": sum(source.tokens for source in sources),
            "supervised_tokens": sum(source.supervised_tokens for source in sources),
            "sequence_length": sequence_length,
            "overlap": overlap,
            "rows": plan.n_rows,
            "samples": plan.n_samples,
            "windows_dropped": int(plan.dropped.sum()),
            "padding_share": round(plan.padding_share, 6),
            "tokenizer_fingerprint": fingerprint(tokenizer),
            "template_sha256": template_hash(tokenizer),
            "vocabulary_size": len(tokenizer),
            "padding_id": padding_id(tokenizer),
            "sources": [asdict(source) for source in sources],
            "files": _file_entries(temporary),
        }
        manifest["body_sha256"] = body_hash(manifest)
        write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return BuildReport(
        path=str(out),
        fingerprint=content_fingerprint(manifest),
        sources=tuple(sources),
        **{name: manifest[name] for name in BuildReport.__dataclass_fields__ if name in manifest and name != "sources"},
    )


def _encode_source(
    number: int,
    path: Path,
    format: str | None,
    encoder: Encoder,
    writer: ShardWriter,
    unknown_id: int | None,
    progress: Callable[[str, int], None] | None,
) -> SourceReport:
    """Read one input into the writer.

    Raises:
        DataError: a bad row, or an input in which nothing is supervised.
    """
    report: SourceReport | None = None
    layout = Layout("", {})
    first_place = ""
    for row in read_rows(path):
        if report is None:
            size, digest = _measure(path)
            layout = detect_layout(row, None, format)
            report = SourceReport(file=str(path), bytes=size, sha256=digest, format=layout.format)
            first_place = row.place
        record = to_record(row, layout)
        report.rows += 1
        if progress and report.rows % PROGRESS_ROWS == 0:
            progress(report.file, report.rows)
        if not _has_answer(record, report):
            continue
        for document in encoder.encode(record):
            if not document.spans:
                continue
            writer.add(document, number, row.line)
            report.documents += 1
            report.tokens += len(document.ids)
            report.supervised_tokens += document.supervised
            report.methods[document.method] = report.methods.get(document.method, 0) + 1
            for text in document.neutralised:
                report.neutralised[text] = report.neutralised.get(text, 0) + 1
            if unknown_id is not None:
                report.unknown_tokens += int(np.count_nonzero(document.ids == unknown_id))
    if report is None:
        raise DataError(f"{path} has no rows", "give a file with at least one row, or leave it out")
    if report.supervised_tokens == 0:
        raise DataError(
            f"{first_place}: no supervised token in {report.rows} rows of {path}",
            "no row has a non-empty assistant turn: check the roles, or say the format with --format",
        )
    return report


def _has_answer(record: Record, report: SourceReport) -> bool:
    """Count rows that would teach nothing, or teach silence."""
    answers = not isinstance(record, Conversation) or any(item["role"] == "assistant" for item in record.messages)
    if not answers:
        report.rows_without_answer += 1
        report.first_without_answer = report.first_without_answer or record.place
        return False
    if record.empty_answer:
        report.rows_with_empty_answer += 1
        report.first_empty_answer = report.first_empty_answer or record.place
        return False
    return True


def _count_dropped(plan: RowPlan, writer: ShardWriter, sources: Sequence[SourceReport]) -> None:
    per_source = np.bincount(np.array(writer.sources, dtype=np.int64), weights=plan.dropped, minlength=len(sources))
    for source, dropped in zip(sources, per_source, strict=True):
        source.windows_dropped = int(dropped)


def _measure(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of an input; of a directory, over the names and bytes of its files in order."""
    if path.is_file():
        return path.stat().st_size, sha256_of_file(path)
    digest, size = hashlib.sha256(), 0
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        size += file.stat().st_size
        for chunk in file_chunks(file):
            digest.update(chunk)
    return size, digest.hexdigest()


def _file_entries(directory: Path) -> list[dict[str, Any]]:
    files = sorted(item for item in directory.rglob("*") if item.is_file())
    return [
        {
            "name": file.relative_to(directory).as_posix(),
            "bytes": file.stat().st_size,
            "xxh3": xxh3_of_file(file),
            "sha256": sha256_of_file(file),
        }
        for file in files
    ]


def _copy_tokenizer(source: Path, tokenizer: Any, target: Path) -> None:
    """Copy the tokenizer's files and check that the copy behaves like the original."""
    with write_errors(target):
        target.mkdir()
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                write_file(target / name, (source / name).read_bytes())
    copy = load_tokenizer(target)
    if fingerprint(copy) != fingerprint(tokenizer) or template_hash(copy) != template_hash(tokenizer):
        raise DataError(
            f"the tokenizer in {source} needs files beyond {', '.join(TOKENIZER_FILES[:4])}, ...",
            "save it again with tokenizer.save_pretrained(...)",
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise CannotWriteError(f"{out} exists and is no token store", "choose another -o")
    if not overwrite:
        raise CannotWriteError(f"{out} is already a token store", "choose another -o, or replace it with --overwrite")


@contextmanager
def _building(out: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh directory beside `out` that becomes `out` when the block ends well, and goes away when it does not."""
    host = socket.gethostname()
    temporary = out.parent / f".{out.name}.{host}.{os.getpid()}.building"
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out, host)
        temporary.mkdir()
    try:
        yield temporary
        with write_errors(out):
            _check_target(out, overwrite)
            for directory in (temporary / "tokens", temporary / "plans", temporary / "tokenizer", temporary):
                sync_directory(directory)
            old = out.parent / f".{out.name}.{host}.{os.getpid()}.old"
            if out.exists() and any(out.iterdir()):
                out.rename(old)
            temporary.rename(out)
            sync_directory(out.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_abandoned(out: Path, host: str) -> None:
    """Remove what killed builds of this host left beside `out`."""
    for left in out.parent.glob(f".{out.name}.{host}.*.building"):
        process = left.name.rsplit(".", 2)[1]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)
