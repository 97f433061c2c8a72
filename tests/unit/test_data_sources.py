import json
import os
import pickle
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sources import MAX_ROW_BYTES, BadRow, chunks, locate, read_lines, read_rows
from trainer.errors import DataError, MissingInputError


def rows_of(path: Path, content: bytes | str) -> list[tuple[int, dict[str, object]]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(row.line, row.value) for row in read_rows(path)]


def problem(path: Path, content: bytes | str) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


def test_lines_and_arrays_know_their_line(file: Path) -> None:
    lines = '{"a": 1}\n\n  {"a": "二"}\r\n{"a": 3}'
    assert rows_of(file, lines) == [(1, {"a": 1}), (3, {"a": "二"}), (4, {"a": 3})]
    array = '\n[\n {"a": 1},\n {"a":\n  "二"}\n\n , {"a": 3} ]\n'
    assert rows_of(file, array) == [(3, {"a": 1}), (4, {"a": "二"}), (7, {"a": 3})]
    assert rows_of(file, b'\xef\xbb\xbf{"a": 1}\n') == [(1, {"a": 1})]
    assert rows_of(file, b'\xef\xbb\xbf [{"a": 1}]') == [(1, {"a": 1})]
    assert next(read_rows(file)).place == f"{file}:1"


@given(
    st.lists(st.dictionaries(st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.integers())),
    st.sampled_from([None, 1]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, int]], indent: int | None
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    array = json.dumps(rows, ensure_ascii=False, indent=indent)
    lines = "\n".join(json.dumps(row) for row in rows)
    for text in (array, lines):
        if not rows:
            assert "has no rows" in problem(file, text)
            continue
        found = rows_of(file, text)
        assert [value for _, value in found] == rows
        assert [line for line, _ in found] == sorted(line for line, _ in found)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        (" \n\n", "has no rows"),
        ("[]", "has no rows"),
        ('{"a": 1}\n{"a": \n', ":2: not JSON"),
        ('{"a": 1}\n{"a": 2', ":2: the file ends in the middle of a row"),
        ('{"a": 1}\n{"a": "x', ":2: the file ends in the middle of a row"),
        ('[{"a": 1},\n {"a": 2', ":2: the file ends in the middle of a row"),
        ('[{"a": 1},\n', ":2: the file ends inside the array"),
        ('[{"a": 1}', ":1: the file ends inside the array"),
        ('[{"a": 1},\n]', ":2: not JSON"),
        ('[{"a": 1}\n {"a": 2}]', ":2: expected ',' or ']'"),
        ('[{"a": 1}]\n{"a": 2}', ":2: text after the end of the array"),
        ('{"a": 1} {"a": 2}\n', ":1: not JSON: more text"),
        ('{\n "a": 1\n}\nx', ":4: not JSON: expected a row, found 'x'"),
        ('{\n "a": 1\n}\n{\n "a": ', ":5: the file ends in the middle of a row"),
        ('[{"a": 1},\n {"a": "x,\n {"a": 2}]', ":2: not JSON: Invalid control character"),
        ('[{"a": 1},\n {"a": [1},\n {"a": 2}]', ":2: not JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n 1e5 2]', ":2: a row must be a JSON object, this is number"),
        ('{"a": 1}\n[1]\n', ":2: a row must be a JSON object, this is array"),
        ('[{"a": 1},\n null]', ":2: a row must be a JSON object, this is null"),
        ('{"a": 1}\n{"a": NaN}\n', ":2: not JSON: NaN is not JSON"),
        ("{'a': 1}\n", ":1: not JSON"),
        ('{"a": 1}\n{"a": "x\\ud800y"}\n', ":2: half of a surrogate pair (\\ud800)"),
        ('{"a": 1}\n{"\\udc00": 2}\n', ":2: half of a surrogate pair"),
        ('{"a": 1}\n{"a": "\\u0000"}\n', ":2: a NUL character"),
        (b'{"a": 1}\n{"a": "\0"}\n', ":2: a NUL byte"),
        (b'[{"a": 1},\n{"a": "\0"}]', ":2: a NUL byte"),
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        ('{"a": 1}\n{"a": "汉字汉字"}\n'.encode("gb18030"), ":2: byte 0xba is not UTF-8; it may be GB18030"),
        ('[{"a": 1},\n{"a": "汉字"}]'.encode("gb18030"), ":2: byte 0xba is not UTF-8; it may be GB18030"),
        (b'{"a": "caf\xe9"}\n', ":1: byte 0xe9 is not UTF-8; it may be Latin-1"),
        (b"\x1f\x8b\x08\x00", "the compressed data is damaged at its start"),
        (b"PAR1xxxx", "the Parquet data is damaged"),
        ('{"a": 1}\n'.encode("utf-16-le"), "is UTF-16LE text"),
        ('{"a": 1}\n'.encode("utf-16-be"), "is UTF-16BE text"),
        ('{"a": 1}\n'.encode("utf-32"), "is UTF-32 text"),
        (b"PK\x03\x04....", "is a zip archive"),
        ('{"a": 1}\n{"a": ' + "[" * 10_000 + "]" * 10_000 + "}\n", ":2: nested deeper than 64 levels"),
        ('{"a": 1}\n{"a": ' + "[" * 100 + "]" * 100 + "}\n", ":2: nested deeper than 64 levels"),
        ("[" * 100_000, ":1: nested deeper than 64 levels"),
        ('[{"a": 1},\n{"a": ' + "[" * 10_000 + "]" * 10_000 + "}]", ":2: nested deeper than 64 levels"),
        ('{"a": ' + "9" * 5000 + "}\n", ":1: an integer of more than 4,300 digits"),
        ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", ":2: an integer of more than 4,300 digits"),
        ('{"a": -1e999999999}\n', ":1: the number -1e999999999 is out of range"),
        ('[{"a": 1},\n' + "9" * (MAX_ROW_BYTES + (2 << 20)), ":2: a number or a word of more than 16 MiB"),
        ('{"a": 1}\n{"a": "' + "x" * (MAX_ROW_BYTES + 5) + '"}\n', ":2: the row is longer than 16 MiB"),
        ('[{"a": 1},\n{"a": "' + "x" * (MAX_ROW_BYTES + 5) + '"}]', ":2: the row is longer than 16 MiB"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(file: Path, content: bytes | str, words: str) -> None:
    assert words in problem(file, content)


def test_depth_below_the_limit_is_fine(file: Path) -> None:
    value = json.loads("[" * 60 + "]" * 60)
    assert rows_of(file, json.dumps({"a": value, "b": [[]] * 100})) == [(1, {"a": value, "b": [[]] * 100})]


def test_a_whole_surrogate_pair_is_text(file: Path) -> None:
    assert rows_of(file, '{"a": "\\ud83d\\ude00"}') == [(1, {"a": "😀"})]


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "rows.json"
    file.write_bytes(content)
    # (The bytes may be a Megatron index, whose other file is not there.)
    with suppress(DataError, MissingInputError):
        assert list(read_rows(file))


def both(file: Path, content: bytes | str, chunk_bytes: int = 4 << 20) -> list[int | str]:
    """Lines of rows that can be read, and facts of the others without the name of the file."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    found: list[int | str] = []
    for chunk in chunks(locate([str(file)], file.parent)[0], chunk_bytes):
        for row in chunk.rows():
            if isinstance(row, BadRow):
                assert row.error().fact == row.fact
                assert len(row.raw) <= 4096
                assert file.read_bytes()[row.byte :].startswith(row.raw)
                found.append(row.fact.removeprefix(str(file)))
            else:
                assert row.byte is not None
                assert file.read_bytes()[row.byte : row.byte + 1] == b"{"
                found.append(row.line)
    return found


TOO_LONG = '{"a": "' + "x" * (MAX_ROW_BYTES + (3 << 20)) + '"}'


@pytest.mark.parametrize("chunk_bytes", [1, 100, 4 << 20])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b'{"a": 1}\nx\n{"a": "\xff"}\n\n[]\n{"a": NaN}\n{"a": "\\ud800"}\n{"a": 2}\n{"a": "cut',
            [
                1,
                ":2: not JSON: Expecting value (column 1)",
                ":3: byte 0xff is not UTF-8",
                ":5: a row must be a JSON object, this is array",
                ":6: not JSON: NaN is not JSON",
                ":7: half of a surrogate pair (\\ud800)",
                8,
                ":9: the file ends in the middle of a row (cut off?)",
            ],
        ),
        (
            b'[{"a": 1},\n null, {"a":\n tru},\n{"a": "a\nb]"}, {"a": [1}},\n{"a": "\xff"}, [{"b": 2}], {"a": 2}]',
            [
                1,
                ":2: a row must be a JSON object, this is null",
                ":3: not JSON: Expecting value (column 2)",
                ":4: not JSON: Invalid control character at (column 9)",
                ":5: not JSON: Expecting ',' delimiter (column 9)",
                ":6: byte 0xff is not UTF-8",
                ":6: a row must be a JSON object, this is array",
                6,
            ],
        ),
        (b'\xef\xbb\xbf{\n"a": 1\n}\n{"a":\n tru}\n\n{"a": 2}\n', [1, ":5: not JSON: Expecting value (column 2)", 7]),
        (f'{{"a": 1}}\n{TOO_LONG}\n{{"a": 2}}\n', [1, ":2: the row is longer than 16 MiB", 3]),
        (f'[{{"a": 1}},\n{TOO_LONG}\n,{{"a": 2}}]', [1, ":2: the row is longer than 16 MiB", 3]),
    ],
    ids=["lines", "array", "objects", "long line", "long element"],
)
def test_reading_goes_on_after_a_bad_row(
    file: Path, content: bytes | str, expected: list[int | str], chunk_bytes: int
) -> None:
    assert both(file, content, chunk_bytes) == expected


def test_rows_before_the_break_are_given_out(file: Path) -> None:
    for content, count in [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 2),
        ('[{"a": 1}, {"a": 2}] x', 2),
        ('[{"a": 1}, {"a', 1),
    ]:
        file.write_text(content)
        found = []
        with suppress(DataError):
            for chunk in chunks(locate([str(file)], file.parent)[0]):
                found += list(chunk.rows())
            pytest.fail("the break was not said")
        assert len(found) == count


def test_a_chunk_is_its_content(file: Path, tmp_path: Path) -> None:
    """Chunks travel to other processes, and their keys say whether work done before can be used again."""
    other = tmp_path / "other.jsonl"
    text = "".join(json.dumps({"a": "x" * number}) + "\n" for number in range(200))
    file.write_text(text)
    other.write_text(text.replace('"xxx"', '"xyx"'))
    (mine,), (theirs,) = locate([str(file)], tmp_path), locate([str(other)], tmp_path)
    cut, again = list(chunks(mine, 1000)), list(chunks(theirs, 1000))
    assert sum(chunk.size for chunk in cut) == len(text)
    assert all(900 < chunk.size < 2200 for chunk in cut[:-1])
    assert len({chunk.key() for chunk in cut}) == len(cut)
    assert [a.key() == b.key() for a, b in zip(cut, again, strict=True)] == [False, *[True] * (len(cut) - 1)]
    assert [list(pickle.loads(pickle.dumps(chunk)).rows()) for chunk in cut] == [list(chunk.rows()) for chunk in cut]
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n" + text)
    assert {chunk.key() for chunk in chunks(locate([str(moved)], tmp_path)[0], 1000)}.isdisjoint(
        chunk.key() for chunk in cut
    )


def test_an_array_is_read_in_bounded_memory(file: Path) -> None:
    with file.open("w") as stream:
        stream.write("[")
        for number in range(1_500):
            stream.write(f'{"," * (number > 0)}\n{{"a": {number}, "b": "{"x" * 32_000}"}}')
        stream.write("]")
    (source,) = locate([str(file)], file.parent)
    tracemalloc.start()
    count = 0
    for chunk in chunks(source):
        for _ in chunk.rows():
            count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_500
    assert source.bytes > 48_000_000
    assert peak < 40_000_000


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nothing\.json"):
        list(read_rows(tmp_path / "nothing.json"))
    with pytest.raises(MissingInputError, match=r"nothing\.txt"):
        list(read_lines(tmp_path / "nothing.txt"))


def test_plain_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo")
    assert list(read_lines(tmp_path / "a.txt")) == ["one", "", "two"]
    (tmp_path / "b.txt").write_bytes(b"one\n\xff")
    with pytest.raises(DataError, match=r"b\.txt:2"):
        list(read_lines(tmp_path / "b.txt"))


def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    """An input is read more than once: from a pipe the second reading would miss what the first one took."""
    os.mkfifo(tmp_path / "pipe")
    for read in (read_rows, read_lines):
        with pytest.raises(MissingInputError, match="is a pipe or a device"):
            next(iter(read(tmp_path / "pipe")))
    with pytest.raises(MissingInputError, match="is a directory"):
        next(iter(read_lines(tmp_path)))
