"""Files as users really have them, through the command: one line, the right exit code, nothing left behind."""

import json
from pathlib import Path

import pytest

import steadfast
from tests.support.corpora import save_tokenizer
from tests.support.nasty import write_nasty


def test_every_nasty_file_ends_in_one_line_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_nasty(tmp_path)
    (tmp_path / "out").mkdir()
    tokenizer = save_tokenizer(tmp_path / "out/tokenizer")
    assert len(files) > 20
    for nasty in files:
        words = ["--input", str(nasty.path), "--tokenizer", str(tokenizer), "--sequence-length", "256"]
        code = steadfast.main(["data", "build", *words, "-o", str(tmp_path / "out/store")])
        error = capsys.readouterr().err
        assert code == nasty.exit_code, (nasty.path.name, error)
        assert error.startswith("error: "), (nasty.path.name, error)
        assert error.count("\n") == 1, (nasty.path.name, error)
        assert nasty.words in error or nasty.readable, (nasty.path.name, error)
        assert nasty.path.name.split(".")[0] in error, (nasty.path.name, error)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer"], nasty.path.name


def test_the_same_files_with_their_bad_rows_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [nasty for nasty in write_nasty(tmp_path) if nasty.bad_rows]
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    assert len(files) > 5
    built = 0
    for number, nasty in enumerate(files):
        words = ["--input", str(nasty.path), "--tokenizer", str(tokenizer), "--sequence-length", "256", "--json"]
        policy = ["bad_rows.policy=skip", "bad_rows.budget=1000"]
        code = steadfast.main(["data", "build", *words, *policy, "-o", str(tmp_path / f"store-{number}")])
        said = capsys.readouterr()
        if code:
            # Nothing but bad rows: there is no first row that says what a row means.
            assert (code, nasty.words in said.err) == (65, True), (nasty.path.name, said.err)
            continue
        (source,) = json.loads(said.out)["stores"][0]["sources"]
        assert source["left_out"]["counts"] == {"bad rows": nasty.bad_rows}, nasty.path.name
        assert source["kept"] == source["rows"] - nasty.bad_rows > 0
        built += 1
    assert built > 5
