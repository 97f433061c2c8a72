"""The same small rows in every container that can be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

ROWS = [
    {"instruction": f'say "{number}", please', "output": f"第{number}行\nand a second one" + "," * (number % 3)}
    for number in range(12)
]


def write_containers(directory: Path, rows: Sequence[dict[str, str]] = ROWS) -> dict[str, Path]:
    """Write `rows` (string cells only) once in each container that can hold them; the paths by what they are."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(list(rows))
    contents = {
        "rows.jsonl": lines,
        "escaped.jsonl": "\r\n".join(json.dumps(row) for row in rows).encode(),
        "array.json": json.dumps(list(rows), indent=1, ensure_ascii=False).encode(),
        "flat.json": json.dumps(list(rows)).encode(),
        "objects.json": "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
        "rows.jsonl.gz": gzip.compress(lines, mtime=0),
        "rows.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "rows.csv": delimited(rows, ","),
        "rows.tsv": b"\xef\xbb\xbf" + delimited(rows, "\t"),
        "rows.parquet": parquet(table),
        "rows.arrow": arrow(table, pa.ipc.new_file),
        "stream.arrow": arrow(table, pa.ipc.new_stream),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    Dataset.from_list(list(rows)).save_to_disk(str(directory / "saved"), num_shards=2)
    return {name: directory / name for name in (*contents, "saved")}


def delimited(rows: Sequence[dict[str, Any]], delimiter: str) -> bytes:
    """CSV or TSV with a header; line ends in cells are kept."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(table: pa.Table, rows_a_group: int = 5, **options: Any) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows_a_group, **options)
    return sink.getvalue()


def arrow(table: pa.Table, kind: Any, rows_a_batch: int = 5) -> bytes:
    """An Arrow IPC file or stream (`kind`: pyarrow.ipc.new_file or new_stream)."""
    sink = io.BytesIO()
    with kind(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows_a_batch):
            writer.write_batch(batch)
    return sink.getvalue()


def megatron(documents: Sequence[Sequence[Sequence[int]]], code: int = 8, dtype: str = "<u2") -> tuple[bytes, bytes]:
    """The .idx and .bin content of documents, each made of sequences of token ids."""
    sequences = [np.array(sequence, dtype=dtype) for document in documents for sequence in document]
    offsets = np.cumsum([0, *(sequence.nbytes for sequence in sequences)])
    table = np.cumsum([0, *(len(document) for document in documents)])
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sequences), len(table))
    index += np.array([len(sequence) for sequence in sequences], dtype="<i4").tobytes()
    index += offsets[:-1].astype("<i8").tobytes() + table.astype("<i8").tobytes()
    return index, b"".join(sequence.tobytes() for sequence in sequences)
