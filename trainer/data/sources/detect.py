"""What container a file is: by its first bytes where they say it, by its extension where they cannot."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from trainer.data.sources.checks import JSON_SPACE
from trainer.data.sources.pieces import BYTE_ORDER_MARK
from trainer.data.sources.streams import GZIP_MAGIC, STREAM_ERRORS, ZSTD_MAGIC, cannot_read, open_blocks
from trainer.errors import DataError

CONTAINERS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".idx": "megatron",
}
COMPRESSIONS = (".gz", ".zst", ".zstd")
_BINARY_CONTAINERS = ("parquet", "arrow", "megatron")
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MAGIC = {b"PAR1": "parquet", ARROW_FILE_MAGIC: "arrow", ARROW_STREAM_MAGIC: "arrow", MEGATRON_MAGIC: "megatron"}
_REFUSED = {
    b"PK\x03\x04": ("a zip archive (or an Excel file)", "unpack it, or save the sheet as CSV"),
    b"BZh": ("compressed with bzip2", "decompress it first, or use gzip or zstd"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it first, or use gzip or zstd"),
    b"FEA1": ("a Feather file of version 1", "write it again as Parquet"),
    b"PARE": ("an encrypted Parquet file", "decrypt it first"),
}


def extension_of(name: str) -> str:
    """The extension that says the container, without that of the compression; lower case."""
    path = PurePosixPath((urlsplit(name).path if "://" in name else name).lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def container_of(path: Path, name: str) -> str:
    """The container of a file, a name of `InputFile.container`.

    Raises:
        MissingInputError: it cannot be opened.
        DataError: it is nothing that can be read, is not UTF-8 as a whole, or its compressed stream is damaged.
    """
    try:
        with open_blocks(path, name) as blocks:
            head, compression = blocks.read(), blocks.compression
    except STREAM_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(name, error) from error
        raise DataError(
            f"{name}: the compressed data is damaged at its start", "get a complete copy of the file"
        ) from error
    expected = CONTAINERS.get(extension_of(name))
    for magic, container in _MAGIC.items():
        if head.startswith(magic):
            if compression:
                raise DataError(f"{name} is {_NAMES[container]} inside {compression}", "decompress it first")
            return container
    _refuse_what_is_no_text(head, name)
    json_container = _json_container(head)
    if expected in _BINARY_CONTAINERS or not expected:
        if json_container:
            return json_container
        if expected and not head:
            raise DataError(f"{name} is empty, not {_NAMES[expected]}", "get a complete copy of the file")
        if expected:
            raise DataError(f"{name} is not {_NAMES[expected]}, as its name says", "check how it was made")
        known = " ".join(CONTAINERS)
        raise DataError(f"cannot tell what {name} holds", f"give it one of the extensions {known}")
    return json_container if expected == "jsonl" and json_container else expected


_NAMES = {"parquet": "a Parquet file", "arrow": "an Arrow file", "megatron": "a Megatron index"}


def _refuse_what_is_no_text(head: bytes, name: str) -> None:
    for magic, (what, remedy) in _REFUSED.items():
        if head.startswith(magic):
            raise DataError(f"{name} is {what}", remedy)
    if head[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive", "unpack it and give the files in it")
    if head.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
        raise DataError(f"{name} is compressed twice", "decompress it first")
    if encoding := _wide_encoding(head):
        raise DataError(f"{name} is {encoding} text", f"convert it: iconv -f {encoding} -t UTF-8")


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32, by its byte order mark or by where its NUL bytes are; empty for neither."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    sample = head[:4096]
    quarters = [sample[offset::4].count(0) / max(1, len(sample[offset::4])) for offset in range(4)]
    if len(sample) < 8 or max(quarters) < 0.3:
        return ""
    if min(quarters[0], quarters[1], quarters[2]) > 0.3 or min(quarters[1:]) > 0.3:
        return "UTF-32LE" if quarters[0] < quarters[3] else "UTF-32BE"
    if min(quarters[1], quarters[3]) > 0.3 and max(quarters[0], quarters[2]) < 0.1:
        return "UTF-16LE"
    if min(quarters[0], quarters[2]) > 0.3 and max(quarters[1], quarters[3]) < 0.1:
        return "UTF-16BE"
    return ""


def _json_container(head: bytes) -> str:
    """`json` for an array or an object over several lines, `jsonl` for an object a line, empty for no JSON."""
    text = head.removeprefix(BYTE_ORDER_MARK).decode("latin-1").lstrip(JSON_SPACE)
    if text.startswith("["):
        return "json"
    if not text.startswith("{"):
        return ""
    first, _, rest = text.partition("\n")
    first = first.rstrip()
    next_line = rest.lstrip("\r\n")[:1]
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(first) and not error.msg.startswith("Unterminated string")
        return "json" if goes_on and next_line in tuple(' \t"}]') else "jsonl"
    except (ValueError, RecursionError):
        return "jsonl"
    return "jsonl"
