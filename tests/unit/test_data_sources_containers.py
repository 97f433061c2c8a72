"""Every container gives the same rows, wherever it is cut, and says what is wrong with it."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from tests.support.containers import ROWS, arrow, delimited, megatron, parquet, write_containers
from trainer.data.sources import MAX_ROW_BYTES, BadRow, RawRow, chunks, locate, read_rows
from trainer.errors import DataError, MissingInputError, UsageError


def all_rows(path: Path, chunk_bytes: int = 4 << 20, documents: str = "file") -> list[RawRow | BadRow]:
    (file,) = locate([str(path)], path.parent)
    return [row for chunk in chunks(file, chunk_bytes, documents) for row in chunk.rows()]


def short(rows: list[RawRow | BadRow]) -> list[Any]:
    """(line, value) of rows, and facts of bad ones without the file."""
    return [
        (row.line, row.value) if isinstance(row, RawRow) else row.fact.removeprefix(row.file)
        for row in rows
    ]  # fmt: skip


def problem(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_and_failure(path: Path, chunk_bytes: int = 4 << 20) -> tuple[list[RawRow | BadRow], str]:
    """What is given out before the DataError, and that."""
    rows: list[RawRow | BadRow] = []
    (file,) = locate([str(path)], path.parent)
    try:
        for chunk in chunks(file, chunk_bytes):
            rows.extend(chunk.rows())
    except DataError as error:
        return rows, str(error)
    pytest.fail("nothing was said")


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_containers(tmp_path_factory.mktemp("containers"))


def test_every_container_holds_the_same_rows_wherever_it_is_cut(containers: dict[str, Path]) -> None:
    stated = {}
    for name, path in containers.items():
        (file,) = locate([str(path)], path.parent)
        stated[name] = file.container
        once = all_rows(path)
        assert [row.value for row in once if isinstance(row, RawRow)] == ROWS, name
        assert all(row.file == str(path) for row in once)
        for chunk_bytes in (1, 100):
            assert all_rows(path, chunk_bytes) == once, name
        cut = [chunk.key() for chunk in chunks(file, 1)]
        assert len(set(cut)) == len(cut) >= 2, name
    assert stated == {
        "rows.jsonl": "jsonl",
        "escaped.jsonl": "jsonl",
        "array.json": "json",
        "flat.json": "json",
        "objects.json": "json",
        "rows.jsonl.gz": "jsonl",
        "rows.jsonl.zst": "jsonl",
        "rows.csv": "csv",
        "rows.tsv": "tsv",
        "rows.parquet": "parquet",
        "rows.arrow": "arrow",
        "stream.arrow": "arrow",
        "saved": "dataset",
    }


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_compressed_data_that_is_cut_off_is_said_after_the_rows_before(
    containers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    plain = "".join(json.dumps({"a": f"{number}" * 40}) + "\n" for number in range(20_000)).encode()
    packed = gzip.compress(plain) if name.endswith("gz") else pa.compress(plain, codec="zstd", asbytes=True)
    path = tmp_path / name
    path.write_bytes(packed[: len(packed) - 10])
    rows, failure = rows_and_failure(path, 1 << 16)
    assert re.search(rf"{name}:\d\d+: the (gzip|zstd) data is damaged or cut off after", failure)
    assert 15_000 < len(rows) < 20_000
    assert rows == rows_and_failure(path)[0]
    assert all(isinstance(row, RawRow) for row in rows)
    path.write_bytes(packed + packed)
    assert len(all_rows(path)) == 40_000


def test_the_first_bytes_decide_not_the_name(containers: dict[str, Path], tmp_path: Path) -> None:
    for source, name, container in [
        ("rows.parquet", "a.jsonl", "parquet"),
        ("rows.jsonl.gz", "b.jsonl", "jsonl"),
        ("flat.json", "c.jsonl", "json"),
        ("rows.jsonl", "d.parquet", "jsonl"),
        ("rows.jsonl", "e", "jsonl"),
        ("stream.arrow", "f.csv", "arrow"),
    ]:
        path = tmp_path / name
        path.write_bytes(containers[source].read_bytes())
        assert locate([str(path)], tmp_path)[0].container == container
        assert [row.value for row in read_rows(path)] == ROWS
    assert "is a Parquet file inside gzip" in problem(
        tmp_path / "a.parquet.gz", gzip.compress(containers["rows.parquet"].read_bytes())
    )
    assert "is not an Arrow file, as its name says" in problem(tmp_path / "a.arrow", b"hello")
    assert "cannot tell what" in problem(tmp_path / "a.conll", b"hello B-PER\n")
    assert "is empty" in problem(tmp_path / "a.pq", b"")
    assert "is a tar archive" in problem(tmp_path / "a.txt", b"x" * 257 + b"ustar" + b"\0" * 100)


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 9, 4 << 20])
def test_csv_records_that_are_wrong_do_not_take_others_with_them(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\n"label","text"\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2\n3,a,b\n4,"never closed\n5,"junk"x\n6,5" disk\n'
        b'7,\xff\n8,"nul\0"\n9,a\rb\n10,""\n11,"last'
    )
    assert short(all_rows(path, chunk_bytes)) == [
        (3, {"label": "1", "text": 'two\r\nlines, "quoted"'}),
        ":6: 1 cell where the header has 2 cells",
        ":7: 3 cells where the header has 2 cells",
        ":8: a quoted field is not closed within 16 MiB, or text follows its closing quote",
        ":9: a quoted field is not closed within 16 MiB, or text follows its closing quote",
        (10, {"label": "6", "text": '5" disk'}),
        ":11: byte 0xff is not UTF-8",
        ":12: a NUL byte",
        ":13: a carriage return outside quotes",
        (14, {"label": "10", "text": ""}),
        ":15: a quoted field is not closed within 16 MiB, or text follows its closing quote",
    ]


def test_a_csv_cell_may_be_long_and_a_record_not_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f'a,b\n1,"{long}"\n2,{"y" * (MAX_ROW_BYTES + (3 << 20))}\n3,4\n')
    assert short(all_rows(path)) == [
        (2, {"a": "1", "b": long}),
        ":3: the row is longer than 16 MiB",
        (4, {"a": "3", "b": "4"}),
    ]


def test_csv_headers_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert ":1: the header names column 'a' twice" in problem(path, b"a,b,a\n1,2,3\n")
    assert "the delimiter seems to be ';'" in problem(path, b"label;text\n1;2\n").replace("its d", "the d")
    assert ":1: in the header, byte 0xff is not UTF-8" in problem(path, b"a,\xff\n1,2\n")
    assert ":2: in the header, a quoted field is not closed" in problem(path, b'\n"a,b\n1,2\n')
    assert "has no rows" in problem(path, b"a,b\n")
    assert "has no rows" in problem(path, b"\n\n")
    assert "has no rows" in problem(path, b"")


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 10, 4 << 20])
def test_text_is_a_document_a_file_a_line_or_a_paragraph(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "a.txt"
    content = "\n one\r\ntwo\r\n \t\r\n\n\nthree\n\nfour"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert short(all_rows(path, chunk_bytes)) == [(1, {"text": content})]
    assert short(all_rows(path, chunk_bytes, "line")) == [
        (2, {"text": " one"}),
        (3, {"text": "two"}),
        (7, {"text": "three"}),
        (9, {"text": "four"}),
    ]
    assert short(all_rows(path, chunk_bytes, "paragraph")) == [
        (2, {"text": " one\r\ntwo"}),
        (7, {"text": "three"}),
        (9, {"text": "four"}),
    ]
    for documents in ("file", "line", "paragraph"):
        for row in all_rows(path, chunk_bytes, documents):
            assert isinstance(row, RawRow)
            assert path.read_bytes()[row.byte :].startswith(row.value["text"].encode())
    with pytest.raises(UsageError, match="'page' is not one of file, line, paragraph"):
        all_rows(path, chunk_bytes, "page")


def test_text_that_is_too_long_or_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"one\n\xff\n\n" + (b"x" * 1000 + b"\n") * 20_000 + b"\n\nlast")
    assert short(all_rows(path)) == [":1: the row is longer than 16 MiB"]
    assert short(all_rows(path, 1 << 20, "paragraph")) == [
        ":2: byte 0xff is not UTF-8",
        ":4: the row is longer than 16 MiB",
        (20_006, {"text": "last"}),
    ]
    assert len(all_rows(path, 1 << 20, "line")) == 20_003
    assert "UTF-16" in problem(path, "text".encode("utf-16"))


# --- tables ----------------------------------------------------------------------------------------------------------


NESTED = [{"messages": [{"role": "user", "name": None}, {"role": "user", "name": "n"}], "x": None, "ids": [1, None]}]


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_nested_nulls_are_absent_keys(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"a.{container}"
    table = pa.Table.from_pylist(NESTED)
    path.write_bytes(parquet(table) if container == "parquet" else arrow(table, pa.ipc.new_file))
    assert short(all_rows(path)) == [
        (1, {"messages": [{"role": "user"}, {"role": "user", "name": "n"}], "x": None, "ids": [1, None]})
    ]


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_a_table_row_that_is_bad_is_one_bad_row(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"a.{container}"
    not_utf8 = pa.array([b"a", b"\xff", b"c", b"\0", b"e"], pa.binary()).view(pa.string())
    table = pa.table({"text": not_utf8, "n": range(5)})
    path.write_bytes(parquet(table) if container == "parquet" else arrow(table, pa.ipc.new_stream))
    rows = all_rows(path)
    assert [row.line for row in rows if isinstance(row, RawRow)] == [1, 3, 5]
    bad = [row.fact.removeprefix(str(path)) for row in rows if isinstance(row, BadRow)]
    assert bad[0].startswith(":2: the row cannot be read: ")
    assert bad[1] == ":4: a NUL character (\\u0000)"


def test_dictionary_columns_are_read_as_their_values(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"label": pa.array(["x", "y", "x", "x", None, "y"]).dictionary_encode()})
    path.write_bytes(arrow(table, pa.ipc.new_file, rows_a_batch=2))
    for chunk_bytes in (1, 4 << 20):
        assert [row.value["label"] for row in all_rows(path, chunk_bytes) if isinstance(row, RawRow)] == [
            *("x", "y", "x", "x", None, "y")
        ]


def test_damaged_tables_are_said(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number} " * 50 for number in range(40)]})
    whole = parquet(table, rows_a_group=10, compression="zstd", write_page_checksum=True, use_dictionary=False)
    path = tmp_path / "a.parquet"
    assert "a.parquet: the Parquet data is damaged" in problem(path, whole[:-30])
    flipped = bytearray(whole)
    second_group = whole.index(b"\x28\xb5\x2f\xfd", whole.index(b"\x28\xb5\x2f\xfd") + 4)
    flipped[second_group + 30] ^= 0xFF
    path.write_bytes(flipped)
    rows, failure = rows_and_failure(path)
    assert len(rows) == 10
    assert "a.parquet:11: the Parquet data is damaged" in failure
    path.write_bytes(parquet(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])))
    assert "two columns named 'a'" in problem(path)
    path = tmp_path / "a.arrow"
    assert "has no end (cut off?)" in problem(path, arrow(table, pa.ipc.new_file)[:-100])
    stream = arrow(table, pa.ipc.new_stream, rows_a_batch=10)
    path.write_bytes(stream[: len(stream) * 3 // 5])
    rows, failure = rows_and_failure(path)
    assert len(rows) == 20
    assert "a.arrow:21: the Arrow data is damaged" in failure


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    dataset = Dataset.from_list(NESTED * 4)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert [row.line for row in read_rows(tmp_path / "saved")] == [1, 2, 3, 4]
    DatasetDict(train=dataset).save_to_disk(str(tmp_path / "one"))
    (file,) = locate([str(tmp_path / "one")], tmp_path)
    assert (file.name, file.container) == (str(tmp_path / "one" / "train"), "dataset")
    assert len(list(read_rows(tmp_path / "one"))) == 4
    DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "two"))
    assert r"holds several splits (train, test)" in problem(tmp_path / "two")
    assert len(list(read_rows(tmp_path / "two" / "test"))) == 4
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(MissingInputError, match="data-00001-of-00002"):
        list(read_rows(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("[]")
    assert "state.json is not one of" in problem(tmp_path / "saved")


def test_a_column_of_token_ids_is_read_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"input_ids": [[1, 2, 3], [], [4]]})))
    assert [row.value for row in read_rows(path)] == [{"input_ids": [1, 2, 3]}, {"input_ids": []}, {"input_ids": [4]}]


# --- Megatron --------------------------------------------------------------------------------------------------------


DOCUMENTS = [[[1, 2, 3]], [[4], [], [5, 65_535]], [[]], [[7, 8]]]


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_documents_are_rows(tmp_path: Path, code: int, dtype: str) -> None:
    index, data = megatron(DOCUMENTS, code, dtype)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(data)
    expected = [[number for sequence in document for number in sequence] for document in DOCUMENTS]
    for name in ("a.idx", "a.bin", "a"):
        (file,) = locate([str(tmp_path / name)], tmp_path)
        assert (file.container, file.bytes) == ("megatron", len(index) + len(data))
        for chunk_bytes in (1, 4 << 20):
            rows = [row for chunk in chunks(file, chunk_bytes) for row in chunk.rows()]
            assert [(row.line, row.value["input_ids"].tolist()) for row in rows if isinstance(row, RawRow)] == list(
                enumerate(expected, start=1)
            )
            assert all(row.value["input_ids"].dtype == np.dtype(dtype) for row in rows if isinstance(row, RawRow))


def test_megatron_files_that_do_not_fit_together(tmp_path: Path) -> None:
    index, data = megatron(DOCUMENTS)
    path = tmp_path / "a.idx"
    path.write_bytes(index)
    with pytest.raises(MissingInputError, match=r"a\.bin"):
        list(read_rows(path))
    (tmp_path / "a.bin").write_bytes(data)
    for broken, words in [
        (index[:20], "no header"),
        (index[:-1], "bytes where"),
        (index + bytes(6), "several modalities"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "not a Megatron index of version 1"),
        (index[:17] + b"\x07" + index[18:], "type code 7"),
        (index[:34] + struct.pack("<i", 100) + index[38:], "sequence 1 is not inside"),
        (index[:34] + struct.pack("<i", -1) + index[38:], "sequence 1 is not inside"),
        (index[:-8] + struct.pack("<q", 5), "does not cover the 6 sequences"),
    ]:
        assert words in problem(path, broken)
    path.write_bytes(index)
    (tmp_path / "a.bin").write_bytes(data + b"xx")
    assert "the .bin file has 18 bytes, its sequences 16" in problem(path)


def test_delimited_and_text_need_no_extension_case(tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_bytes(delimited(ROWS, ","))
    assert [row.value for row in read_rows(tmp_path / "A.CSV")] == ROWS
