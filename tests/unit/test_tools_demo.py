"""The demo's arithmetic and its table; the demo itself runs in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import demo
from trainer.config.load import load_config


@pytest.mark.parametrize("steps", [None, 1, 8, 40, 150, 5000])
def test_the_stop_comes_after_a_logged_step_well_before_the_end(steps: int | None) -> None:
    overrides, stop_at = demo._shortened(steps)
    config = load_config(demo.RECIPE, overrides)
    assert config.train.max_steps == (steps or load_config(demo.RECIPE).train.max_steps)
    assert config.schedule.warmup_steps < config.train.max_steps
    assert stop_at >= 1
    # The first logged step at or after it (step 1 is always logged).
    every = config.logging.every_steps
    logged = 1 if stop_at == 1 else -(-stop_at // every) * every
    if config.train.max_steps > 8:
        assert logged <= config.train.max_steps / 4


def test_every_process_of_the_demo_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    class Done:
        returncode = 0
        stdout = "{}"

    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **options: seen.append(options["env"]) or Done())
    demo._steadfast("data", "build")
    demo._answer("eval", "model")
    assert all(environ["DS_ACCELERATOR"] == "cpu" and environ["CUDA_VISIBLE_DEVICES"] == "" for environ in seen)
    assert len(seen) == 2


def test_the_table_keeps_every_value_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Path("runs/demo")
    outcome = {"loss_first": 7.25, "loss_last": 0.0007, "tokens_per_second": 12345.6, "exact_match": 0.99,
               "exact_match_int8": 0.98, "export_bytes": 2_000_000, "logit_max_diff": 1.2e-6,
               "seconds": 301.2}  # fmt: skip
    demo._table(outcome, out, out / "model", out / "model-int8")
    lines = capsys.readouterr().out.splitlines()
    for name, value in (("model", "runs/demo/model"), ("int8 model", "runs/demo/model-int8")):
        assert any(line.strip("│ ").split("│")[0].strip() == name and value in line for line in lines), lines
    assert any("2.0 MB, largest logit difference 1.2e-06" in line for line in lines)
