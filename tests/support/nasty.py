"""Files as users really have them: damaged, mislabelled, hostile; each with the exit code a build must end with."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tests.support.containers import arrow, delimited, megatron, parquet

GOOD = {"instruction": "say one", "output": "one"}


@dataclass(frozen=True)
class Nasty:
    """A file, the exit code of a build over it, and what its error line says.

    `readable`: its rows can all be read; it is their meaning that is wrong (they are no conversations). `bad_rows`: so
    many rows cannot be read while the others can; 0 when the file as a whole is refused or it is readable.
    """

    path: Path
    exit_code: int
    words: str
    readable: bool = False
    bad_rows: int = 0


def write_nasty(directory: Path) -> list[Nasty]:
    """Write them all into a directory."""
    found = []
    for name, content, words, bad_rows in _unreadable():
        (directory / name).write_bytes(content)
        found.append(Nasty(directory / name, 65, words, bad_rows=bad_rows))
    for name, content, words in _meaningless():
        (directory / name).write_bytes(content)
        found.append(Nasty(directory / name, 65, words, readable=True))
    index, data = megatron([[[1, 2, 3]], [[4]]])
    (directory / "short.idx").write_bytes(index)
    (directory / "short.bin").write_bytes(data[:-2])
    found.append(Nasty(directory / "short.idx", 65, "sequence 2 is not inside the .bin file"))
    (directory / "lonely.idx").write_bytes(index)
    found.append(Nasty(directory / "lonely.idx", 66, "there is no input"))
    (directory / "empty directory").mkdir()
    found.append(Nasty(directory / "empty directory", 66, "has no files to read"))
    found.append(Nasty(directory / "not there.jsonl", 66, "there is no input"))
    return found


def line(**changes: object) -> bytes:
    """A JSON line of a good row with some keys changed."""
    return json.dumps(GOOD | changes, ensure_ascii=False).encode() + b"\n"


def _unreadable() -> list[tuple[str, bytes, str, int]]:
    good = line()
    lines = good * 50
    table = pa.Table.from_pylist([GOOD] * 50)
    whole = parquet(table, compression="zstd", write_page_checksum=True)
    deep = b"[" * 10_000 + b"]" * 10_000
    return [
        ("bad line.jsonl", good + b'{"instruction": "x", "output": }\n' + good, ":2: not JSON", 1),
        ("cut.jsonl", good + good[:-9], ":2: the file ends in the middle of a row", 1),
        ("nul.jsonl", good + good.replace(b"one", b"o\0e") + good, ":2: a NUL byte", 1),
        ("escaped nul.jsonl", good + line(output="\0") + good, ":2: a NUL character", 1),
        ("half pairs.jsonl", good + b'{"instruction": "\\ud83d", "output": "\\ude00"}\n', ":2: half of a surr", 1),
        ("gb18030.jsonl", (good.decode() + '{"output": "汉字汉字"}\n').encode("gb18030"), "GB18030", 1),
        ("latin-1.jsonl", good + b'{"output": "caf\xe9"}\n', "Latin-1", 1),
        ("utf-16.jsonl", lines.decode().encode("utf-16"), "is UTF-16 text", 0),
        ("utf-16 without mark.jsonl", lines.decode().encode("utf-16-le"), "is UTF-16LE text", 0),
        ("long line.jsonl", good + line(output="x" * 20_000_000) + good, ":2: the row is longer than 16 MiB", 1),
        ("deep.jsonl", good + b'{"output": ' + deep + b"}\n" + good, ":2: nested deeper than 64 levels", 1),
        ("list.jsonl", good + b'["say", "one"]\n' + good, ":2: a row must be a JSON object, this is array", 1),
        ("nan.jsonl", good + b'{"output": NaN}\n', ":2: not JSON: NaN", 1),
        ("digits.jsonl", good + b'{"output": ' + b"9" * 100_000 + b"}\n", ":2: an integer of more than", 1),
        ("exponent.jsonl", good + b'{"output": 1e999999999}\n', ":2: the number 1e999999999 is out of range", 1),
        ("single quotes.jsonl", b"{'instruction': 'say one', 'output': 'one'}\n" + good, ":1: not JSON", 1),
        ("empty.jsonl", b"", "has no rows", 0),
        ("blank.jsonl", b"\n \n\r\n", "has no rows", 0),
        ("empty array.json", b"[]", "has no rows", 0),
        ("cut array.json", b"[" + good + b"," + good[:-9], "the file ends in the middle of a row", 0),
        ("no comma.json", b"[" + good + good + b"]", ":2: expected ',' or ']'", 0),
        ("two arrays.json", b"[" + good + b"]\n[" + good + b"]", "text after the end of the array", 0),
        ("cut.jsonl.gz", gzip.compress(lines, mtime=0)[:-12], "the gzip data is damaged or cut off", 0),
        ("flipped.jsonl.gz", _flipped(gzip.compress(lines, mtime=0), -6), "the gzip data is damaged or cut off", 0),
        ("cut.jsonl.zst", pa.compress(lines, codec="zstd", asbytes=True)[:-5], "data is damaged", 0),
        ("flipped.parquet", _flipped(whole, whole.index(b"\x28\xb5\x2f\xfd") + 20), "the Parquet data is damaged", 0),
        ("cut.parquet", whole[:-20], "the Parquet data is damaged", 0),
        ("empty.parquet", b"", "is empty, not a Parquet file", 0),
        ("cut.arrow", arrow(table, pa.ipc.new_file)[:-20], "the Arrow file has no end", 0),
        ("not utf-8.parquet", parquet(pa.table({"output": pa.array([b"\xff"]).view(pa.string())})), ":1: the row", 1),
        ("quote.csv", delimited([GOOD], ",") + b'say two,"two\nsay three,three\n', ":3: a quoted field", 1),
        ("width.csv", delimited([GOOD], ",") + b"say two\n", ":3: 1 cell where the header has 2 cells", 1),
        ("semicolons.csv", b"instruction;output\nsay one;one\n", "delimiter seems to be ';'", 0),
        ("table.xlsx", b"PK\x03\x04" + bytes(100), "is a zip archive (or an Excel file)", 0),
        ("corpus", b"B-PER\n", "cannot tell what", 0),
    ]  # fmt: skip


def _meaningless() -> list[tuple[str, bytes, str]]:
    return [
        ("wrong type.jsonl", line() + line(output=["one"]), ":2"),
        ("null.jsonl", line() + line(output=None), ":2"),
        ("missing.jsonl", line() + b'{"instruction": "say one"}\n', ":2"),
        ("null content.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n', ":1"),
        ("unknown.jsonl", b'{"question": "one?", "reply": "one"}\n', ":1"),
        ("missing column.parquet", parquet(pa.table({"instruction": ["say one"]})), ":1"),
        ("missing column.csv", b"instruction,note\nsay one,x\n", ":2"),
    ]


def _flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0xFF
    return bytes(changed)
