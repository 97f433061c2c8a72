"""Stores in other tools' formats and back, and what the commands say about two stores."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import steadfast
from tests.support.corpora import alpaca_rows, message_rows, recipe_of, tiny_store
from trainer.data.build.run import build_store
from trainer.data.store import TokenStore, open_store
from trainer.data.store.diff import diff_stores
from trainer.data.store.interop import export_store
from trainer.errors import CannotWriteError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny_store(tmp_path_factory.mktemp("interop"), message_rows(20, seed=2, turns=3))


def content(store: TokenStore) -> list[tuple[list[int], list[list[int]]]]:
    return [(ids.tolist(), spans.tolist()) for ids, spans in map(store.document, range(store.n_documents))]


@pytest.mark.parametrize(("target", "name"), [("parquet", "x.parquet"), ("datasets", "saved"), ("megatron", "corpus")])
def test_exports_read_back_as_the_same_documents(store: TokenStore, tmp_path: Path, target: str, name: str) -> None:
    report = export_store(store, tmp_path / name, target)  # type: ignore[arg-type]
    assert report["documents"] == 20
    assert all(Path(file).exists() for file in report["files"])
    again = tmp_path / (f"{name}.bin" if target == "megatron" else name)
    recipe = recipe_of([again], store.tokenizer_path)
    build_store(recipe, tmp_path / "store")
    assert content(open_store(tmp_path / "store")) == content(store)
    with pytest.raises(CannotWriteError, match="exists"):
        export_store(store, tmp_path / name, target)  # type: ignore[arg-type]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_labels_of_an_export_are_what_transformers_wants(store: TokenStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "x.parquet", "parquet")
    row = pq.read_table(tmp_path / "x.parquet").to_pylist()[3]
    ids, spans = store.document(3)
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans.tolist():
        mask[start:stop] = True
    assert row["input_ids"] == ids.tolist()
    assert row["labels"] == np.where(mask, ids.astype(int), -100).tolist()
    assert row["source"] == "rows"


def test_a_difference_is_found_and_named(tmp_path: Path) -> None:
    rows = alpaca_rows(12)
    first = tiny_store(tmp_path / "a", rows)
    assert diff_stores(first, tiny_store(tmp_path / "same", rows)).equal
    moved = diff_stores(first, tiny_store(tmp_path / "moved", rows[::-1]))
    assert (moved.equal, moved.moved, moved.common) == (False, True, 12)
    changed = [*rows[:4], {**rows[4], "output": "else"}, *rows[5:], rows[0]]
    found = diff_stores(first, tiny_store(tmp_path / "changed", changed, sequence_length=64))
    assert (found.equal, found.common, found.only_first_count, found.only_second_count) == (False, 11, 1, 2)
    assert found.only_first == (f"{tmp_path}/a/rows.jsonl:5",)
    assert found.only_second == (f"{tmp_path}/changed/rows.jsonl:5", f"{tmp_path}/changed/rows.jsonl:13")
    assert "plan sequence_length: 128 and 64" in found.facts


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = alpaca_rows(12, longest=30)
    first = tiny_store(tmp_path / "a", rows[:8])
    second = tiny_store(tmp_path / "b", rows[7:])
    third = tiny_store(tmp_path / "c", rows[8:])

    def run(*words: object) -> tuple[int, str]:
        code = steadfast.main(["data", *[str(word) for word in words]])
        return code, capsys.readouterr().out

    code, said = run("leakage", first.path, second.path)
    assert code == 65
    assert f"{second.path.parent}/rows.jsonl:1 = {first.path.parent}/rows.jsonl:8 (exact" in said
    code, said = run("leakage", first.path, third.path)
    assert (code, "no document of one store is in another" in said) == (0, True)
    code, said = run("leakage", first.path, second.path, "--json")
    assert [leak["kind"] for leak in json.loads(said)["leaks"]] == ["exact"]
    code, said = run("diff", first.path, second.path)
    assert (code, "common     1 documents" in said) == (1, True)
    assert run("diff", first.path, first.path)[0] == 0
    code, said = run("card", first.path)
    assert code == 0
    assert "rows" in said
    assert run("card", first.path, "-o", tmp_path / "card.html")[0] == 0
    page = (tmp_path / "card.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert rows[0]["output"].split()[0] in page
    code, said = run("export", first.path, tmp_path / "out.parquet", "--to", "parquet", "--json")
    assert (code, json.loads(said)["documents"]) == (0, 8)
