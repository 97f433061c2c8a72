"""Build a token store: locate inputs, encode chunks in worker processes, decide over all rows, write shards and plan.

The layout of a store is described in `store`. Everything is written into a directory beside OUT that is renamed when
complete: whoever sees OUT sees a whole store. Finished parts wait in a working directory (see `work`), so a build that
was killed continues. Equal input gives an equal store, to the byte, with any number of workers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from trainer.data.build.decide import decide, row_table
from trainer.data.build.gather import Build, plan_spec, write_stores
from trainer.data.build.parts import REFUSED, Task, read_part
from trainer.data.build.pool import Settings, encode_all
from trainer.data.build.recipe import Recipe
from trainer.data.build.work import Work
from trainer.data.encode.fast_tokenizer import NoTwin, Twin, TwinMismatch, verified_twin
from trainer.data.encode.tokenizer import fingerprint, load_tokenizer, template_hash
from trainer.data.quality.decontaminate import EvalIndex, build_index
from trainer.data.quality.text import text_of
from trainer.data.records import Layout, Record, detect_layout, to_record
from trainer.data.sources import Chunk, InputFile, RawRow, chunks, locate, read_rows
from trainer.data.store.reader import MANIFEST
from trainer.data.store.report import SourceReport
from trainer.durable import file_chunks, sha256_of_file, sync_directory, write_errors
from trainer.errors import CannotWriteError, DataError

SHARD_TOKENS = 32 << 20
CHUNK_BYTES = 4 << 20
ROWS_BEFORE_SHARE = 10_000


@dataclass(frozen=True)
class Progress:
    """How far a build is: bytes of input encoded, of how many, and the rows so far."""

    bytes: int
    total: int
    rows: int


@dataclass(frozen=True)
class Input:
    """One file of one source; `written` is when its content last changed, to see whether it does while it is read."""

    source: int
    file: InputFile
    written: int


def build_store(
    recipe: Recipe,
    out: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Build the token store `out`, or one store a split below `out`, and return its report (see `gather`).

    Args:
        recipe: what is built; decides the content together with the inputs.
        out: directory to make.
        workers: processes that encode; default: the cores of this machine, fewer for small inputs.
        overwrite: replace an existing store.
        progress: called after every chunk.
        shard_tokens: tokens after which a new shard file begins.
        chunk_bytes: input that is encoded at a time.

    Raises:
        UsageError, MissingInputError, DataError, CannotWriteError, RunLockedError: with file and line where there is
            one.
    """
    check_target(out, overwrite)
    plan_spec(recipe).check()
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    evaluation = _evaluation(recipe)
    identity = {
        "code": _code_hash(),
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "recipe": recipe.model_dump(mode="json", exclude={"rows", "windows", "limits", "balance"}),
        "evaluation": None if evaluation is None else xxhash.xxh3_128_hexdigest(evaluation.hashes.tobytes()),
        "chunk_bytes": chunk_bytes,
    }
    work = Work(out, identity)
    if found := len(work.finished()):
        sys.stderr.write(f"note: continuing an earlier build: {found} parts are finished\n")
    try:
        inputs = _located(recipe, work.spool)
        with ThreadPoolExecutor(1) as hasher:
            digests = [hasher.submit(_measure, entry.file.path) for entry in inputs]
            try:
                names, sources = _encode(recipe, evaluation, tokenizer, inputs, work, workers, chunk_bytes, progress)
                measured = [_described(entry, digest) for entry, digest in zip(inputs, digests, strict=True)]
            except BaseException:
                hasher.shutdown(wait=False, cancel_futures=True)
                raise
        _check_rows(recipe, sources)
        parts = [read_part(work.parts / name) for name in names]
        table = row_table(parts)
        decision = decide(table, parts, recipe, work.path)
        with _building(out, overwrite) as temporary:
            build = Build(recipe, tokenizer, measured, sources, parts, table, decision, shard_tokens)
            report = write_stores(temporary, build)
    except BaseException:
        if kept := work.leave():
            sys.stderr.write(
                f"note: {kept} finished parts are kept in {work.path}: the same build continues from them\n"
            )
        raise
    work.remove()
    return {**report, "path": str(out)}


def check_target(out: Path, overwrite: bool) -> None:
    """CannotWriteError when `out` is taken, by a store that is not to be replaced or by something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not any(out.rglob(MANIFEST)):
        raise CannotWriteError(f"{out} exists and is no token store", "choose another -o")
    if not overwrite:
        raise CannotWriteError(f"{out} is already a token store", "choose another -o, or replace it with --overwrite")


def _located(recipe: Recipe, spool: Path) -> list[Input]:
    return [
        Input(number, file, _last_change(file.path))
        for number, source in enumerate(recipe.sources)
        for file in locate(source.patterns, spool)
    ]


def _last_change(path: Path) -> int:
    """When the content of a file, or of the newest file of a directory, last changed, in nanoseconds."""
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _code_hash() -> str:
    """xxh3 of the source of this room: parts of another version of the code are never mixed in."""
    digest = xxhash.xxh3_128()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _evaluation(recipe: Recipe) -> EvalIndex | None:
    """The n-grams of the evaluation files, if any are given."""
    if not recipe.decontaminate.against:
        return None
    return build_index(text_of(record) for path in recipe.decontaminate.against for record in _records(Path(path)))


def _records(path: Path) -> Iterator[Record]:
    layout: Layout | None = None
    for row in read_rows(path):
        layout = layout or detect_layout(row)
        yield to_record(row, layout)


def _encode(
    recipe: Recipe,
    evaluation: EvalIndex | None,
    tokenizer: Any,
    inputs: Sequence[Input],
    work: Work,
    workers: int | None,
    chunk_bytes: int,
    progress: Callable[[Progress], None] | None,
) -> tuple[list[str], list[SourceReport]]:
    """Make all parts; returns their names in order and the counts of every source."""
    total = sum(entry.file.bytes for entry in inputs)
    if workers is None:
        workers = max(1, min(len(os.sched_getaffinity(0)), total // (2 * chunk_bytes)))
    sources = [
        SourceReport(name=name, files=[entry.file.name for entry in inputs if entry.source == number])
        for number, name in enumerate(source_names(recipe))
    ]
    names: list[str] = []
    done = 0

    def tasks() -> Iterator[Task]:
        number = 0
        for index, entry in enumerate(inputs):
            source, report = recipe.sources[entry.source], sources[entry.source]
            layout, pieces = _with_layout(entry.file, chunks(entry.file, chunk_bytes, source.documents), source)
            known = {layout.format, *filter(None, report.format.split(" + "))}
            report.format, report.mapping = " + ".join(sorted(known)), report.mapping | layout.mapping
            report.bytes += entry.file.bytes
            for chunk in pieces:
                yield Task(number, entry.source, index, entry.file.name, layout, chunk)
                number += 1

    twin = verified_twin(tokenizer, Path(recipe.tokenizer))
    if isinstance(twin, NoTwin):
        sys.stderr.write(f"note: {twin}\n")
    elif twin.passed_over:
        sys.stderr.write(f"note: tokenizing with {twin.name}: {twin.passed_over}\n")
    for fast in (True, False) if isinstance(twin, Twin) else (False,):
        try:
            for task, counts in encode_all(tasks(), Settings(recipe, evaluation, fast), tokenizer, work, workers):
                sources[task.source].merge(counts)
                _check_budget(recipe, sources, at_end=False)
                names.append(task.name)
                done += task.chunk.size
                if progress:
                    progress(Progress(min(done, total), total, sum(source.rows for source in sources)))
            break
        except TwinMismatch as mismatch:
            sys.stderr.write(f"note: {mismatch}; starting again with transformers\n")
            work.forget_parts()
            names.clear()
            done = 0
            sources[:] = [SourceReport(name=source.name, files=source.files) for source in sources]
    _check_budget(recipe, sources, at_end=True)
    work.keep_only(names)
    return names, sources


def _with_layout(file: InputFile, pieces: Iterator[Chunk], source: Any) -> tuple[Layout, Iterator[Chunk]]:
    """The layout of a file by its first readable row, and its chunks from the beginning."""
    seen: list[Chunk] = []
    for chunk in pieces:
        seen.append(chunk)
        for row in chunk.rows():
            if isinstance(row, RawRow):
                return detect_layout(row, source.map, source.format), chain(seen, pieces)
    bad = next((row for chunk in seen for row in chunk.rows()), None)
    if bad is None:
        raise DataError(f"{file.name} has no rows", "give a file with at least one row, or leave it out")
    raise bad.error()  # type: ignore[union-attr]


def source_names(recipe: Recipe) -> list[str]:
    """A name for every source: its own, else that of its first file without endings; made unique by a number."""
    names: list[str] = []
    for source in recipe.sources:
        stem = source.name or Path(source.patterns[0].rstrip("/")).name.split(".")[0].strip("*?[]") or "source"
        count = sum(name == stem or name.startswith(f"{stem}-") for name in names)
        names.append(f"{stem}-{count + 1}" if count else stem)
    return names


def _check_budget(recipe: Recipe, sources: Sequence[SourceReport], *, at_end: bool) -> None:
    """DataError when more rows were refused than the recipe allows."""
    budget = recipe.bad_rows.budget
    bad = sum(source.left_out.counts.get(reason, 0) for source in sources for reason in REFUSED)
    rows = sum(source.rows for source in sources)
    allowed = budget if budget >= 1 else budget * rows
    if bad > allowed and (at_end or budget >= 1 or rows >= ROWS_BEFORE_SHARE):
        first = next(
            source.left_out.first[reason] for source in sources for reason in REFUSED if reason in source.left_out.first
        )
        raise DataError(
            f"{bad:,} of {rows:,} rows are bad, more than bad_rows.budget={budget:g} allows; the first is {first}",
            "repair the input, or raise the budget",
        )


def _check_rows(recipe: Recipe, sources: Sequence[SourceReport]) -> None:
    """DataError when too many rows of a source teach nothing."""
    for source in sources:
        without = {name: count for name, count in source.left_out.counts.items() if name.startswith("rows ")}
        share = sum(without.values()) / max(source.rows, 1)
        if share > recipe.limits.max_without_answer:
            place = next(source.left_out.first[name] for name in without)
            raise DataError(
                f"source {source.name}: {share:.1%} of the rows train nothing, more than limits.max_without_answer="
                f"{recipe.limits.max_without_answer:g}; the first is {place}",
                "repair the input, or raise the limit",
            )


def _described(entry: Input, digest: Future[tuple[int, str]]) -> dict[str, Any]:
    """What the manifest says of an input; DataError when it changed while it was read."""
    size, sha256 = digest.result()
    if _last_change(entry.file.path) != entry.written:
        raise DataError(f"{entry.file.name} changed while it was read", "build again when it is complete")
    return {
        "name": entry.file.name,
        "source": entry.source,
        "container": entry.file.container,
        "bytes": size,
        "sha256": sha256,
    }


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
            check_target(out, overwrite)
            for directory in [item for item in temporary.rglob("*") if item.is_dir()]:
                sync_directory(directory)
            sync_directory(temporary)
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
