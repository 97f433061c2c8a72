"""Whatever is in a file: rows, named bad rows or one error line, in bounded time, never a traceback."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.containers import ROWS, megatron, parquet, write_containers
from tests.support.nasty import write_nasty
from trainer.data.sources import BadRow, RawRow, chunks, locate, read_rows
from trainer.errors import SteadfastError


def test_nasty_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for nasty in write_nasty(tmp_path):
        if nasty.readable:
            assert list(read_rows(nasty.path)), nasty.path.name
            continue
        with pytest.raises(SteadfastError) as caught:
            list(read_rows(nasty.path))
        assert caught.value.exit_code == nasty.exit_code, nasty.path.name
        assert nasty.words in str(caught.value)
        assert nasty.path.name.removesuffix(".idx") in str(caught.value)
        assert "\n" not in str(caught.value)
        if nasty.bad_rows:
            (file,) = locate([str(nasty.path)], tmp_path)
            rows = [row for chunk in chunks(file) for row in chunk.rows()]
            assert sum(isinstance(row, BadRow) for row in rows) == nasty.bad_rows, nasty.path.name


def mutated(content: bytes, source: random.Random) -> bytes:
    """Some bytes flipped, cut out, put in or written twice."""
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 5))):
        at = source.randrange(len(changed) + 1)
        length = source.choice((1, 2, 8, 100))
        match source.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([source.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << source.randrange(8)]) if at < len(changed) else b""
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = source.choice(
                    (b'"', b"\\", b"{", b"]", b",", b"\n", b"\0", b"\xff" * 4, b"\r\n", b"9" * 30)
                )
            case 4:
                changed[at:at] = changed[at : at + length]
        changed = changed or bytearray(b"x")
    return bytes(changed[: source.randrange(len(changed) + 1)] if source.random() < 0.1 else changed)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("seeds")
    paths = write_containers(directory, ROWS[:5])
    found = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    nested = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "n": [1.5, 2]}]
    found["nested.jsonl"] = json.dumps(nested[0]).encode() * 2
    found["nested.parquet"] = parquet(pa.Table.from_pylist(nested * 3), 2, compression="zstd")
    found["text.txt"] = b"one\n\ntwo\r\nthree\n \nfour"
    found["text.md.gz"] = gzip.compress(b"one\n\ntwo\r\nthree\n \nfour", mtime=0)
    found["tokens.idx"], found["tokens.bin"] = megatron([[[1, 2, 3]], [[4], [5, 6]]])
    return found


def rows_within(path: Path, chunk_bytes: int, documents: str) -> Iterator[RawRow | BadRow]:
    for file in locate([str(path)], path.parent):
        for chunk in chunks(file, chunk_bytes, documents):
            assert len(chunk.key()) == 32
            yield from chunk.rows()


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(0)])])
def test_mutated_files_give_rows_or_an_error(count: int, seed: int, seeds: dict[str, bytes], tmp_path: Path) -> None:
    source = random.Random(seed)
    names = [name for name in seeds if name != "tokens.bin"]
    (tmp_path / "tokens.bin").write_bytes(seeds["tokens.bin"])
    outcomes: Counter[str] = Counter()
    for number in range(count):
        name = names[number % len(names)]
        content = mutated(seeds[name], source)
        path = tmp_path / name
        path.write_bytes(content)
        start = time.process_time()
        try:
            for row in rows_within(
                path, source.choice((1, 100, 4 << 20)), source.choice(("file", "line", "paragraph"))
            ):
                outcomes["bad row" if isinstance(row, BadRow) else "row"] += 1
        except SteadfastError as error:
            outcomes["error" if str(error).count("\n") == 0 else "error of several lines"] += 1
        except Exception as error:
            pytest.fail(f"{name}, input {number} of seed {seed}, gave {error!r}: {content!r}")
        assert time.process_time() - start < 1, (name, content)
    assert outcomes["error of several lines"] == 0
    # Mutations must reach all three, or the test shows nothing.
    assert min(outcomes["row"], outcomes["bad row"], outcomes["error"]) > count / 10, outcomes


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "objects.json", "rows.csv", "text.txt"])
def test_where_it_is_cut_changes_nothing_even_in_damaged_files(
    seeds: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    source = random.Random(7)
    path = tmp_path / name
    for _ in range(120):
        path.write_bytes(mutated(seeds[name], source))
        for documents in ("file", "line", "paragraph") if name == "text.txt" else ("file",):
            results = []
            for chunk_bytes in (1, 100, 4 << 20):
                rows: list[object] = []
                try:
                    rows.extend(rows_within(path, chunk_bytes, documents))
                except SteadfastError as error:
                    rows.append(str(error))
                results.append(rows)
            assert results[0] == results[1] == results[2], path.read_bytes()
