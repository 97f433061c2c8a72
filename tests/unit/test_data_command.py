import json
from pathlib import Path

import pytest

import steadfast
from tests.support.corpora import alpaca_rows, save_tokenizer, sharegpt_rows, tiny_store, write_json, write_json_lines


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    write_json(work / "a.json", alpaca_rows(30))
    write_json_lines(work / "s.jsonl", sharegpt_rows(5))
    return work


def test_from_files_to_a_shown_store(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> str:
        code = steadfast.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    inputs = ["--input", work / "a.json", "--input", work / "s.jsonl"]
    said = run("tokenizer", "train", *inputs, "--vocab-size", 330, "-o", work / "tok")
    assert "vocabulary 330" in said
    assert "ids equal to SentencePiece" in said
    build = ["data", "build", *inputs, "--tokenizer", work / "tok", "--sequence-length", 256, "-o", work / "store"]
    said = run(*build)
    assert "format     alpaca, 30 rows -> 30 documents" in said
    assert "format     sharegpt, 5 rows -> 5 documents" in said
    assert "padding" in said
    assert steadfast.main([str(word) for word in build]) == 73
    assert "--overwrite" in capsys.readouterr().err
    report = json.loads(run(*build, "--overwrite", "--json"))
    assert [source["format"] for source in report["stores"][0]["sources"]] == ["alpaca", "sharegpt"]

    shown = run("data", "inspect", work / "store", "--rows", 2)
    first = alpaca_rows(30)[0]
    assert f"⟦{first['output']}<|im_end|>⟧" in shown
    assert f"{work / 'a.json'}:2" in shown
    as_json = json.loads(run("data", "inspect", work / "store", "--rows", 3, "--json"))
    assert as_json["documents"] == 35
    for row in as_json["shown"]:
        assert row["supervised_tokens"] == sum(
            stop - start for sample in row["samples"] for start, stop in sample["spans"]
        )
        assert row["tokens"] == sum(len(sample["ids"]) for sample in row["samples"])
    assert json.loads(run("data", "verify", work / "store", "--json"))["documents"] == 35
    assert "every sha256 right" in run("data", "verify", work / "store")
    assert steadfast.main(["data", "inspect", str(work / "store"), "--first-row", "9999"]) == 2
    assert "it has rows 0 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--input", "nothing.json"], 66, "nothing.json"),
        (["--input", "a.json", "--format", "messages"], 65, "a.json:2: 'messages' is missing"),
        (["--input", "a.json", "--overlap", "64"], 2, "overlap 64 does not fit sequence length 64"),
        (["--input", "a.json", "--sequence-length", "1"], 2, "too short"),
        (["--input", "tokenizer"], 65, "tokenizer.json:1: no known format"),
        (["--input", "a.json", "--tokenizer", "none"], 66, "no tokenizer directory none"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(work)
    if not (work / "tokenizer").exists():
        save_tokenizer(work / "tokenizer")
    defaults = ["--tokenizer", "tokenizer", "--sequence-length", "64", "-o", "out"]
    assert steadfast.main(["data", "build", *defaults, *words]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (work / "out").exists()


def test_data_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path, [{"instruction": "\x1b[2J\u202eevil", "output": "tab\tok"}])
    assert steadfast.main(["data", "inspect", str(store.path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J\\u202eevil" in shown
    assert "⟦tab\tok<|im_end|>⟧" in shown
    assert "\x1b" not in shown


def test_tokenizer_from_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some words and more words\n" * 50 + "other things entirely\n" * 50)
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "290", "--json"]
    assert steadfast.main([*command, "-o", str(tmp_path / "tok")]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary_size"] == 290
