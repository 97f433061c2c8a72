"""Ledgers survive torn lines and are cut back to the resumed step."""

import json

from trainer.observe.ledger import JsonLines, cut_back, read_lines


def test_a_torn_last_line_is_left_out_and_cut_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, 6):
        lines.append({"step": step, "loss": float("nan")})
    lines.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert [entry["step"] for entry in read_lines(path)] == [1, 2, 3, 4, 5]
    assert cut_back(path, 3) == {"step": 3, "loss": None}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_cutting_an_absent_ledger_is_nothing(tmp_path):
    assert cut_back(tmp_path / "none.jsonl", 3) is None
    assert not (tmp_path / "none.jsonl").exists()


def test_an_entry_after_a_torn_line_is_not_lost_with_it(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    lines = JsonLines(path)
    lines.append({"step": 3})
    lines.close()
    assert [entry["step"] for entry in read_lines(path)] == [1, 3]
