"""The comparisons: every contender has its line, an absent one is named, and the figures are what they say."""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools import bench
from tools.benchmarks import corpus, measure, ours, packing, read, readers, startup
from tools.benchmarks import export as exports
from trainer.cli import run_command
from trainer.data.store.packing import RowPlan

COMMANDS = {"bench": ("tools.bench", "measures")}


def quiet(text: str) -> None:
    pass


def busy(milliseconds: int, log: str = "", name: str = "", fail: bool = False, work: float = 1.0) -> dict[str, Any]:
    """A contender of the tests; called in a process of its own."""
    if log:
        with Path(log).open("a") as file:
            file.write(f"{name}\n")
    if fail:
        raise ValueError("no such thing")
    with measure.stopwatch() as watch:
        began = time.process_time()
        while (time.process_time() - began) * 1e3 < milliseconds:
            pass
    return {"cpu": watch.cpu, "wall": watch.wall, "work": work}


def contender(name: str, milliseconds: int = 1, package: str | None = None, **more: Any) -> measure.Contender:
    arguments = {"milliseconds": milliseconds, "name": name, **more}
    return measure.Contender(name, "tests.unit.test_tools_bench:busy", arguments, package, goal=2.0)


def in_this_process(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Instead of `run_apart`: a process a contender costs seconds of imports."""
    module, _, name = function.partition(":")
    table = {"tools.benchmarks.ours": ours, "tools.benchmarks.readers": readers, "tools.benchmarks.packing": packing}
    try:
        found: dict[str, Any] = getattr(table[module], name)(**arguments)
    except Exception as error:
        raise RuntimeError(str(error)) from error
    return found


def test_contenders_take_turns_in_processes_of_their_own_and_none_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    contenders = [
        contender("ours", 20, log=str(log), work=4.0),
        contender("slow", 80, log=str(log), work=4.0),
        contender("broken", log=str(log), fail=True),
        contender("absent", package="no-such-distribution"),
    ]
    outcomes = measure.run_rounds(contenders, 2, quiet)
    assert log.read_text().split() == ["ours", "slow", "broken", "ours", "slow"]
    ours_line, slow, broken, absent = measure.compare("s", "per s", contenders, outcomes, lambda facts: "fine")
    assert ours_line.ratio is None
    assert slow.ratio is not None
    assert 2.0 < slow.ratio < 8.0
    assert slow.met
    assert slow.facts["cpu"] == min(slow.facts["all_cpu"]) >= 0.07
    assert (broken.value, broken.note) == (None, "failed: ValueError: no such thing")
    assert absent.note == "not installed (pip install --no-deps -r tools/bench-requirements.txt)"
    assert absent.ratio is None
    assert absent.met is None


def test_lengths_have_the_quantiles_they_claim() -> None:
    lengths = corpus.sample_lengths(40_000, seed=3)
    found = np.quantile(lengths, [0.5, 0.95, 0.99])
    assert found == pytest.approx([148, 973, 2217], rel=0.05)
    assert np.array_equal(lengths[:100], corpus.sample_lengths(40_000, seed=3)[:100])


def test_conversations_depend_on_the_seed_alone_and_alternate() -> None:
    rows = corpus.make_conversations(20, seed=1)
    assert rows == corpus.make_conversations(20, seed=1) != corpus.make_conversations(20, seed=2)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert all(message["content"].strip() for message in row["messages"])


def test_both_stores_and_every_format_hold_the_same_rows(tmp_path: Path) -> None:
    read.make_rows(tmp_path, 24, 128, seed=0)
    ways = [(name, ahead) for name in ("packed", "whole") for ahead in (True, False)]
    found: dict[object, Any] = {(name, ahead): ours.read(str(tmp_path / name), 8, 24, ahead) for name, ahead in ways}
    readers.write("megatron", str(tmp_path))
    found["megatron"] = readers.read("megatron", str(tmp_path), 8, ready=True)
    assert len({tuple(facts["sums"]) for facts in found.values()}) == 1
    assert {facts["rows"] for facts in found.values()} == {24}
    raw = readers.read("megatron", str(tmp_path), 8, ready=False)
    assert raw["sums"][0] == found["megatron"]["sums"][0]
    assert raw["sums"][1] != found["megatron"]["sums"][1]


def test_a_computed_plan_answers_what_a_feed_asks_of_a_real_one(tmp_path: Path) -> None:
    ids = np.arange(3, 3 + 6 * 32, dtype=np.int32).reshape(6, 32)
    documents = corpus.rows_as_documents(ids, np.ones(ids.shape, dtype=np.uint8))
    ours.write_store(tmp_path / "store", documents, 32, 1 << 20)
    from trainer.data.micro_batch import make_micro_batch
    from trainer.data.store.reader import open_store

    store = open_store(tmp_path / "store")
    real, computed = store.plan(), ours.ComputedPlan(1_000_000_000, 6, 32, store.spec)
    assert isinstance(real, RowPlan)
    for row in (0, 5):
        one, other = (make_micro_batch(store, plan, [row]) for plan in (real, computed))
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.targets, other.targets)
        for name in ("supervised", "tokens", "row_offsets", "row_samples", "start", "stop", "first_target"):
            assert int(getattr(real, name)[row]) == int(getattr(computed, name)[row]), name
    last = make_micro_batch(store, computed, [999_999_999])
    assert np.array_equal(last.input_ids[0], ids[999_999_999 % 6])


def test_the_report_has_every_line_and_names_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "run_apart", in_this_process)
    monkeypatch.setattr(read, "run_apart", in_this_process)
    for module in (measure, read):
        monkeypatch.setattr(module, "installed_version", lambda package: None)
    monkeypatch.setattr(startup, "STORED_ROWS", 32)
    sizes = bench.Sizes(0, 0, 16, 128, (100, 1_000_000_000), 2000, (2048,), 0, 1)
    lines = bench.measure(("read", "start", "pack"), sizes, 1, tmp_path, (), 0, quiet)
    absent = [line.contender for line in lines if line.note.startswith("not installed")]
    assert absent == [
        *(peer for peer, _, package, _, _ in read.PEERS if package),
        "MDS partition and py1e of 100 rows",
        "TRL bfd, rows of 2,048",
    ]
    measured = [line for line in lines if line.contender not in absent]
    assert all(line.value is not None and line.value > 0 and "failed" not in line.note for line in measured)
    by_name = {line.contender: line for line in lines}
    mapped = by_name["Megatron-style mmap"]
    assert mapped.ratio is not None
    assert mapped.note.startswith("same rows, same targets")
    assert mapped.ratio == pytest.approx(by_name["Steadfast, rows as they are"].value / mapped.value)
    assert "state" in by_name["Steadfast, 1,000,000,000 rows: first batch"].note
    assert "waste" in by_name["Steadfast, rows of 2,048"].note
    with redirect_stdout(io.StringIO()) as printed:
        bench.show(lines, {"seed": 0})
    for line in lines:
        assert line.contender.split(",")[0] in printed.getvalue()
    json.dumps([bench._as_json(line) for line in lines])


def test_exports_of_every_kind_are_compared_with_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            found: dict[str, Any] = getattr(exports, function.partition(":")[2])(**arguments)
        except Exception as error:
            raise RuntimeError(str(error)) from error
        return found

    monkeypatch.setattr(exports, "run_apart", here)
    lines = {line.contender: line for line in exports.run(tmp_path, quick=True, rounds=1, seed=0, say=quiet)}
    for kind in ("tied", "partly frozen"):
        assert "0 of" in lines[f"Steadfast: {kind}"].note
        assert lines[f"Steadfast: {kind}"].facts["missing"] == []
    assert "share memory" in lines["DeepSpeed zero_to_fp32, lazy: tied"].note
    ours, peer = (line for name, line in lines.items() if name.endswith("time"))
    assert peer.ratio == pytest.approx(peer.value / ours.value)
    assert {line.goal for line in lines.values()} == {None, exports.MEMORY_GOAL, exports.TIME_GOAL}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--rounds", "0"], 2, "--rounds 0 is too few"),
        (["--corpus", "nowhere.jsonl"], 66, "nowhere.jsonl"),
        (["--work", "."], 2, "exists"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_measured(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(COMMANDS, lambda name: bench, ["bench", "data", *words]) == code
    assert message in capsys.readouterr().err


def test_a_corpus_of_the_user_is_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    ]
    file = corpus.write_json_lines(tmp_path / "rows.jsonl", rows)
    assert ours.read_messages([file]) == (rows[:1], 1)
