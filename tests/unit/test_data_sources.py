import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sources import MAX_ROW_BYTES, read_lines, read_rows
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
        ('{\n "a": 1\n}\n', ":1: not JSON"),
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
        (b"\x1f\x8b\x08\x00", "is compressed"),
        (b"PAR1xxxx", "is a Parquet file"),
        ('{"a": 1}\n{"a": ' + "[" * 10_000 + "]" * 10_000 + "}\n", ":2: nested deeper than 64 levels"),
        ('{"a": 1}\n{"a": ' + "[" * 100 + "]" * 100 + "}\n", ":2: nested deeper than 64 levels"),
        ("[" * 100_000, ":1: nested deeper than 64 levels"),
        ('{"a": ' + "9" * 5000 + "}\n", ":1: not JSON"),
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
    with suppress(DataError):
        assert list(read_rows(file))


def test_a_saved_dataset_is_a_source(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}]},
        {"messages": [{"role": "user", "content": "b", "name": "n"}]},
    ]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    found = list(read_rows(tmp_path / "saved"))
    assert [(row.line, row.value) for row in found] == [
        (1, {"messages": [{"role": "user", "content": "a"}]}),
        (2, {"messages": [{"role": "user", "content": "b", "name": "n"}]}),
    ]
    DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="several splits"):
        list(read_rows(tmp_path / "splits"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="load_from_disk cannot open"):
        list(read_rows(tmp_path / "other"))


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
