"""The build as a whole: workers, kills, policies, and the decisions over all rows."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.support.corpora import (
    alpaca_rows,
    message_rows,
    recipe_of,
    save_tokenizer,
    sentence,
    tiny_store,
    write_json_lines,
)
from trainer.data.build import pool, run
from trainer.data.build.run import build_store
from trainer.data.encode.fast_tokenizer import Twin
from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.store import open_store, verify_store
from trainer.data.store.reader import TokenStore
from trainer.errors import ConfigError, DataError, PeerLostError, RunLockedError

ROOT = Path(__file__).resolve().parents[2]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def texts_of(store: TokenStore) -> list[str]:
    tokenizer = load_tokenizer(store.tokenizer_path)
    return [tokenizer.decode(store.document(i)[0].astype(int)) for i in range(store.n_documents)]


def source_of(store: TokenStore) -> dict[str, Any]:
    return dict(store.manifest["sources"][0])


def listed(path: Path, name: str = "left_out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "reports" / f"{name}.jsonl").read_text().splitlines()]


def test_any_number_of_workers_and_any_history_gives_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", message_rows(300, seed=3))
    recipe = recipe_of([file], tokenizer, 128, "duplicates.near=drop", "duplicates.exact=drop")
    options: dict[str, Any] = {"chunk_bytes": 20_000, "shard_tokens": 9000}
    build_store(recipe, tmp_path / "one", workers=1, **options)
    build_store(recipe, tmp_path / "three", workers=3, **options)
    one = content(tmp_path / "one")
    assert len([name for name in one if name.startswith("tokens/")]) > 3
    assert content(tmp_path / "three") == one
    verify_store(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "rows.jsonl", "three", "tokenizer"]


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from tests.support.corpora import recipe_of
from trainer.data.build import run as build
from trainer.data.build import pool
work, parts, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def die(progress, seen=[]):
    seen.append(progress)
    if len(seen) == parts:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    recipe = recipe_of([work / "rows.jsonl"], work / "tokenizer", 128)
    build.build_store(recipe, work / "store", workers=workers, chunk_bytes=1500, progress=die)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_continues_and_ends_the_same(tmp_path: Path, workers: int) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(200))
    recipe = recipe_of([file], tokenizer, 128)
    build_store(recipe, tmp_path / "whole", workers=1, chunk_bytes=1500)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_BUILD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "3", str(workers)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    work = tmp_path / ".store.work"
    kept = {part.name: part.stat().st_mtime_ns for part in (work / "parts").glob("0*")}
    assert len(kept) >= 3
    deadline = time.monotonic() + 5
    while any(script.name in line for line in _commands()):
        assert time.monotonic() < deadline, "a worker outlived the build"
        time.sleep(0.05)

    build_store(recipe, tmp_path / "store", workers=1, chunk_bytes=1500)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert not work.exists()


def _commands() -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return lines


def test_finished_parts_are_kept_after_a_bad_row_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows: list[Any] = alpaca_rows(200)
    file = write_json_lines(tmp_path / "rows.jsonl", [*rows, {"instruction": "a", "output": 5}])
    recipe = recipe_of([file], tokenizer, 128)
    with pytest.raises(DataError, match=r"rows\.jsonl:201: 'output' must be a string"):
        build_store(recipe, tmp_path / "store", workers=1, chunk_bytes=1500)
    assert "finished parts are kept" in capsys.readouterr().err
    before = {part.name: part.stat().st_ino for part in (tmp_path / ".store.work/parts").iterdir()}
    write_json_lines(file, [*rows, {"instruction": "a", "output": "mended"}])
    again: list[set[int]] = []
    capsys.readouterr()
    parts = tmp_path / ".store.work/parts"
    build_store(
        recipe,
        tmp_path / "store",
        workers=1,
        chunk_bytes=1500,
        progress=lambda _: again.append({part.stat().st_ino for part in parts.iterdir()}),
    )
    assert "continuing an earlier build" in capsys.readouterr().err
    assert len(before) > 5
    assert set(before.values()) <= again[-1]
    assert open_store(tmp_path / "store").n_documents == 201


def test_two_builds_of_one_store_at_once_are_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(5))
    recipe = recipe_of([file], tokenizer)

    def second(_: object) -> None:
        with pytest.raises(RunLockedError, match="in use by pid"):
            build_store(recipe, tmp_path / "store")
        refused.append(True)

    refused: list[bool] = []
    build_store(recipe, tmp_path / "store", progress=second)
    assert refused
    assert open_store(tmp_path / "store").n_documents == 5


def test_a_killed_worker_is_said_and_its_build_continues(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(300))
    recipe = recipe_of([file], tokenizer, 128)

    def kill(_: object) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    with pytest.raises(PeerLostError, match="a worker process of the build was killed"):
        build_store(recipe, tmp_path / "store", workers=2, chunk_bytes=1500, progress=kill)
    build_store(recipe, tmp_path / "store", workers=1, chunk_bytes=1500)
    assert open_store(tmp_path / "store").n_documents == 300


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(3))

    def change(_: object) -> None:
        write_json_lines(file, alpaca_rows(3, seed=1))

    with pytest.raises(DataError, match=r"rows.jsonl changed while it was read"):
        build_store(recipe_of([file], tokenizer), tmp_path / "store", progress=change)


def test_inputs_come_from_urls(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    fsspec.filesystem("memory").pipe("/data/rows.jsonl", "".join(f"{json.dumps(r)}\n" for r in alpaca_rows(4)).encode())
    build_store(recipe_of(["memory://data/rows.jsonl"], tokenizer), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert (store.n_documents, store.place(3)) == (4, "memory://data/rows.jsonl:4")


BAD = [
    {"instruction": "a", "output": None},
    {"instruction": 7, "output": "b"},
]


def with_bad_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ['{"instruction": "broken', json.dumps(BAD[0])]
    path.write_text("\n".join([*lines, json.dumps(BAD[1])]) + "\n")
    return path


def test_bad_rows_are_skipped_or_quarantined_and_counted(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = with_bad_lines(tmp_path / "rows.jsonl", alpaca_rows(20))
    for policy in ("skip", "quarantine"):
        out = tmp_path / policy
        build_store(recipe_of([file], tokenizer, 128, f"bad_rows.policy={policy}", "bad_rows.budget=3"), out)
        source = source_of(open_store(out))
        assert (source["rows"], source["documents"]) == (23, 20)
        assert source["left_out"] == {"counts": {"bad rows": 3}, "first": {"bad rows": f"{file}:4"}}
    entries = listed(tmp_path / "quarantine", "quarantine")
    assert [entry["place"] for entry in entries] == [f"{file}:4", f"{file}:5", f"{file}:23"]
    assert entries[0]["raw"] == '{"instruction": "broken'
    data = file.read_bytes()
    assert [data[entry["byte"] :].split(b"\n")[0].decode() for entry in entries] == [
        entries[0]["raw"],
        json.dumps(BAD[0]),
        json.dumps(BAD[1]),
    ]
    assert "not JSON" in entries[0]["fact"]
    assert all("raw" not in entry and entry["fact"] for entry in listed(tmp_path / "skip"))
    for budget in ("2", "0.1"):
        with pytest.raises(DataError, match=rf"3 of 23 rows are bad, more than bad_rows.budget={budget}.*rows.jsonl:4"):
            build_store(
                recipe_of([file], tokenizer, 128, "bad_rows.policy=skip", f"bad_rows.budget={budget}"), tmp_path / "no"
            )
    with pytest.raises(DataError, match=r"rows\.jsonl:4: "):
        build_store(recipe_of([file], tokenizer), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_duplicates_are_counted_or_dropped_and_named(tmp_path: Path) -> None:
    rows = message_rows(30, seed=5, longest=40)
    near = json.loads(json.dumps(rows[4]))
    near["messages"][-1]["content"] += " red"
    rows += [rows[2], near]
    kept = source_of(tiny_store(tmp_path / "kept", rows, words=["duplicates.near=keep"]))
    assert kept["documents"] == 32
    assert kept["notes"]["counts"] == {"exact duplicates kept": 1, "near duplicates kept": 1}
    store = tiny_store(tmp_path / "dropped", rows, words=["duplicates.near=drop", "duplicates.exact=drop"])
    assert source_of(store)["left_out"]["counts"] == {"exact duplicates": 1, "near duplicates": 1}
    assert store.n_documents == 30
    file = tmp_path / "dropped/rows.jsonl"
    assert listed(store.path) == [
        {"place": f"{file}:31", "reason": "exact duplicates", "kept": False, "repeats": f"{file}:3"},
        {"place": f"{file}:32", "reason": "near duplicates", "kept": False, "repeats": f"{file}:5"},
    ]


def grouped_rows(groups: int, seed: int = 1) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [
        {
            "user": f"u{number}",
            "kind": ["a", "b", "c"][number % 3],
            "when": f"2026-01-{1 + number % 28:02d}",
            "instruction": f"{number} {sentence(source, 6)}",
            "output": sentence(source, 4),
        }
        for number in range(groups)
        for _ in range(source.randint(1, 4))
    ]


def test_a_split_never_tears_a_group_and_every_store_is_whole(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows = grouped_rows(120)
    file = write_json_lines(tmp_path / "rows.jsonl", rows)
    shares = "split.shares={train: 0.7, validation: 0.2, test: 0.1}"
    report = build_store(recipe_of([file], tokenizer, 128, shares, "split.group_by=user"), tmp_path / "store")
    stores = {name: open_store(tmp_path / "store" / name) for name in ("train", "validation", "test")}
    assert [store["name"] for store in report["stores"]] == list(stores)
    where: dict[str, set[str]] = {}
    for name, store in stores.items():
        verify_store(store.path)
        for index in range(store.n_documents):
            line = int(store.place(index).rpartition(":")[2])
            where.setdefault(rows[line - 1]["user"], set()).add(name)
    assert sum(store.n_documents for store in stores.values()) == len(rows)
    assert len(where) == 120
    assert all(len(names) == 1 for names in where.values())
    counts = Counter(next(iter(names)) for names in where.values())
    assert abs(counts["train"] - 84) < 20
    assert counts["test"] > 2


def test_folds_cover_every_row_once_as_validation(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(60))
    build_store(recipe_of([file], tokenizer, 128, "split.folds=3"), tmp_path / "store")
    seen: list[str] = []
    for fold in range(3):
        train, validation = (open_store(tmp_path / f"store/fold-{fold}" / name) for name in ("train", "validation"))
        assert train.n_documents + validation.n_documents == 60
        assert not set(texts_of(train)) & set(texts_of(validation))
        seen += texts_of(validation)
    assert len(set(seen)) == 60


def test_splits_by_label_and_by_time(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows = grouped_rows(90)
    file = write_json_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError):
        recipe_of([file], tokenizer, 128, "split.stratify_by=label", "split.shares={train: 0.5, test: 0.5}")
    words = ["label.column=kind", "label.values=[a, b, c]", "split.shares={train: 0.5, test: 0.5}"]
    report = build_store(recipe_of([file], tokenizer, 128, *words, "split.stratify_by=label"), tmp_path / "label")
    for store in map(open_store, (tmp_path / "label/train", tmp_path / "label/test")):
        counts = np.bincount(store.column("label"), minlength=3)
        assert counts.min() > 0.6 * counts.max()
        weights = store.manifest["class_weights"]
        assert sorted(weights) == ["a", "b", "c"]
        assert sum(weights.values()) / 3 == pytest.approx(1, abs=0.2)
    assert report["stores"][0]["labels"] == ["a", "b", "c"]
    shares = "split.shares={train: 0.8, test: 0.2}"
    build_store(recipe_of([file], tokenizer, 128, shares, "split.time_column=when"), tmp_path / "time")

    def days(name: str) -> list[str]:
        store = open_store(tmp_path / "time" / name)
        return [rows[int(store.place(i).rpartition(":")[2]) - 1]["when"] for i in range(store.n_documents)]

    assert max(days("train")) < min(days("test"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: label 'a' is not in the label set; known labels: b"):
        build_store(recipe_of([file], tokenizer, 128, "label.column=kind", "label.values=[b]"), tmp_path / "no")
    with pytest.raises(DataError, match=r"rows.jsonl:1: no value in column 'kid'"):
        build_store(recipe_of([file], tokenizer, 128, "label.column=kid"), tmp_path / "no")


def test_balance_repeats_the_rare_and_leaves_out_the_frequent(tmp_path: Path) -> None:
    rows = [{**row, "kind": "rare" if n % 10 == 0 else "usual"} for n, row in enumerate(alpaca_rows(100))]
    over = tiny_store(tmp_path / "over", rows, words=["label.column=kind", "balance.method=over"])
    assert np.bincount(over.column("label")).tolist() == [90, 90]
    under = tiny_store(tmp_path / "under", rows, words=["label.column=kind", "balance.method=under"])
    assert np.bincount(under.column("label")).tolist() == [10, 10]
    assert source_of(under)["left_out"]["counts"] == {"rows left out of training for balance": 80}


def test_augmented_copies_are_only_trained_on(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write_json_lines(tmp_path / "rows.jsonl", alpaca_rows(40, longest=12))
    words = ["augment.copies=2", "augment.swap=0.5", "split.shares={train: 0.5, test: 0.5}"]
    build_store(recipe_of([file], tokenizer, 256, *words), tmp_path / "store")
    train, test = (open_store(tmp_path / "store" / name) for name in ("train", "test"))
    assert train.n_documents > 2 * test.n_documents
    assert len(set(texts_of(test))) == test.n_documents
    answers = {row["output"] for row in alpaca_rows(40, longest=12)}
    for text in texts_of(train):
        assert any(f"assistant\n{answer}<|im_end|>" in text for answer in answers)
    places = {train.place(i) for i in range(train.n_documents)}
    assert not places & {test.place(i) for i in range(test.n_documents)}


def test_filters_repairs_and_personal_data_are_counted(tmp_path: Path) -> None:
    rows = [
        *alpaca_rows(10, longest=8),
        {"instruction": "write to ann@example.org please", "output": "I wrote to ann@example.org"},
        {"instruction": "what is it?", "output": "N/A"},
        {"instruction": "一个很长的中文问题，应该被语言过滤器拒绝", "output": "这是一个中文回答"},
        {"instruction": "bell\x07 rings", "output": "it rings"},
    ]
    words = [
        "clean.missing=drop",
        "clean.repair=true",
        "clean.pii=[email]",
        "clean.pii_salt=pepper",
        "keep.scripts=[latin]",
        "keep.script_share=0.3",
    ]
    store = tiny_store(tmp_path, rows, words=words)
    source = source_of(store)
    assert source["left_out"]["counts"]["rows with an abnormal value: placeholder"] == 1
    assert source["left_out"]["counts"]["rows in another script"] >= 1
    assert source["changed"]["counts"] == {
        "personal data replaced: email": 2,
        "control characters removed": 1,
    }
    text = "\n".join(texts_of(store))
    assert "ann@example.org" not in text
    assert text.count("[EMAIL_") == 2


def test_rows_with_evaluation_text_are_left_out(tmp_path: Path) -> None:
    source = random.Random(4)
    secret = " ".join(f"w{source.randint(0, 999)}" for _ in range(30))
    held_out = write_json_lines(tmp_path / "eval.jsonl", [{"instruction": secret, "output": "answer"}])
    rows = [*alpaca_rows(10), {"instruction": f"please: {secret[:110]} and more", "output": "yes"}]
    store = tiny_store(tmp_path, rows, words=[f"decontaminate.against=[{held_out}]"])
    assert source_of(store)["left_out"]["counts"] == {"rows with text of the evaluation files": 1}
    assert listed(store.path)[0]["place"].endswith("rows.jsonl:11")


def test_limits_fail_the_build(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of the tokens are supervised, less than limits.min_supervised=0.9"):
        tiny_store(tmp_path, words=["limits.min_supervised=0.9"])
    long_answers = [{"instruction": "a", "output": "b" * 900}] * 5
    with pytest.raises(DataError, match=r"supervised tokens are lost to rows.long_text=truncate"):
        tiny_store(tmp_path, long_answers, words=["rows.long_text=truncate", "limits.max_truncated=0.5"])
    rows = [*alpaca_rows(3), {"instruction": "a", "output": ""}]
    with pytest.raises(DataError, match=r"25.0% of the rows train nothing.*rows.jsonl:4"):
        tiny_store(tmp_path, rows, words=["limits.max_without_answer=0.1"])
    assert not (tmp_path / "store").exists()


def test_named_sources_of_several_files(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "many").mkdir()
    for name in "abc":
        write_json_lines(tmp_path / f"many/{name}.jsonl", alpaca_rows(4, seed=ord(name)))
    questions = write_json_lines(tmp_path / "qa.jsonl", [{"q": f"what is {n}?", "a": f"number {n}"} for n in range(5)])
    sources = [
        {"path": str(tmp_path / "many"), "name": "instructions"},
        {"path": str(questions), "format": "completion", "map": {"prompt": "q", "completion": "a"}},
    ]
    build_store(recipe_of(sources, tokenizer), tmp_path / "store")
    store = open_store(tmp_path / "store")
    first, second = store.manifest["sources"]
    assert (first["name"], len(first["files"]), first["documents"]) == ("instructions", 3, 12)
    assert (second["name"], second["documents"]) == ("qa", 5)
    assert second["mapping"] == {"prompt": "q", "completion": "a"}
    assert store.place(4) == f"{tmp_path}/many/b.jsonl:1"
    assert store.place(13) == f"{questions}:2"
    assert [entry["name"] for entry in store.manifest["inputs"]][-1] == str(questions)


def test_a_twin_that_gives_other_ids_is_found_and_the_build_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = tiny_store(tmp_path / "right")
    for module in (run, pool):
        monkeypatch.setattr(module, "verified_twin", lambda *_: Twin("a wrong twin", lambda text: [0]))
    wrong = tiny_store(tmp_path / "wrong")
    assert "a wrong twin gave other ids on" in capsys.readouterr().err
    assert wrong.fingerprint == right.fingerprint
