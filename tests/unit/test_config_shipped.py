"""Every configuration that is shipped loads, and what is generated is up to date."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from trainer.config.deepspeed import SHIPPED, check_deepspeed, lint, load_deepspeed_json
from trainer.config.device import device_warnings
from trainer.config.document import parse
from trainer.config.explain import EXAMPLES, explain, explanations, json_schema
from trainer.config.load import config_as_yaml, config_from_text, load_config
from trainer.config.words import keys, sections
from trainer.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
DEEPSPEED = sorted(SHIPPED.glob("*.json"))


def steadfast(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), *words], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_files_others_rely_on_are_there() -> None:
    assert ROOT / "configs" / "tiny.yaml" in RECIPES
    assert {path.stem for path in DEEPSPEED} == {"zero1", "zero2", "zero3", "zero3-offload-cpu", "zero3-offload-nvme"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_loads_and_fits_the_schema(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    config = load_config(path)
    assert check_deepspeed(config.engine.deepspeed, "cpu") == []
    assert device_warnings(config, "cpu") == []
    document = parse(text, str)
    jsonschema.Draft202012Validator(json_schema()).validate(document.value)
    jsonschema.Draft202012Validator(json_schema()).validate(parse(config_as_yaml(config), str).value)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_a_shipped_deepspeed_file_is_accepted(path: Path) -> None:
    settings = load_deepspeed_json(path.stem)
    assert lint(settings, path.name, "cuda") == []
    assert lint(settings, path.name, "cpu") == []


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert shipped == json_schema(), "run: python steadfast.py config schema > configs/schema.json"


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    document = parse((ROOT / "configs" / "tiny.yaml").read_text(), str)
    for path, value in {"train.max_steps": "ten", "optimizer.lr": 1, "schedule.type": "step", "foo": 1}.items():
        broken = json.loads(json.dumps(document.value))
        *parents, last = path.split(".")
        target = broken
        for parent in parents:
            target = target[parent]
        target[last] = value
        assert not validator.is_valid(broken), path


def test_every_key_is_explained_with_an_example_that_loads() -> None:
    text = explain()
    for key in keys():
        assert f"{key}: " in text
        assert keys()[key].description, f"{key} has no docstring"
    minimum = ["run.dir=x", "model.path=m", "data.train=d", "train.max_steps=8", "model.config=null"]
    for entry in explanations():
        override = entry["example"].strip("'")
        extra = ["model.path=null"] if entry["key"] == "model.config" else []
        assert config_from_text("", "none", [*minimum, *extra, override]), entry


def test_explain_names_the_type_the_default_and_the_near_word() -> None:
    assert "whole number >= 1 or null, default null" in explain("data.overlap")
    assert "one of cosine, linear, constant" in explain("schedule")
    with pytest.raises(UsageError, match=r"did you mean 'data\.overlap'"):
        explain("data.stride")
    assert set(EXAMPLES) <= set(keys())


def test_check_imports_no_torch() -> None:
    done = steadfast("config", "check", "configs/tiny.yaml", "train.max_steps=5", "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "configs/tiny.yaml: ok (zero2 on cpu)\n", "")
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, trainer.config.command; print({'torch', 'deepspeed'} & {*sys.modules})"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert imported.stdout == "set()\n"


def test_check_reports_yaml_and_deepspeed_problems_without_a_traceback(tmp_path: Path) -> None:
    bad = steadfast("config", "check", "configs/tiny.yaml", "train.max_stepz=5", "--json")
    assert bad.returncode == 2
    assert "did you mean 'train.max_steps'" in json.loads(bad.stdout)["problems"][0]
    settings = tmp_path / "mine.json"
    settings.write_text('{"zero_optimisation": {"stage": 3}}')
    bad = steadfast("config", "check", "configs/tiny.yaml", f"engine.deepspeed={settings}")
    assert bad.returncode == 2
    assert "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_check_reports_the_deepspeed_file_beside_the_problems_of_the_yaml(tmp_path: Path) -> None:
    settings = tmp_path / "mine.json"
    settings.write_text('{"zero_optimisation": {"stage": 3}}')
    bad = steadfast(
        "config", "check", "configs/tiny.yaml", f"engine.deepspeed={settings}", "train.max_stepz=5",
        "engine.timeout_seconds=x",
    )  # fmt: skip
    assert bad.returncode == 2
    for fragment in ("train.max_stepz", "engine.timeout_seconds", "unknown key 'zero_optimisation'"):
        assert bad.stderr.count(fragment) >= 1, bad.stderr
    # What cannot be read twice is not said twice.
    bad = steadfast("config", "check", "configs/tiny.yaml", "engine.deepspeed=zero9", "--json")
    assert len(json.loads(bad.stdout)["problems"]) == 1
    bad = steadfast("config", "check", "configs/tiny.yaml", "engine.deepspeed=3", "--json")
    assert len(json.loads(bad.stdout)["problems"]) == 1


def test_check_asks_for_the_device_of_this_machine_and_warns_of_slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "warning: model.dtype=bfloat16 on a CPU is about 80 times slower than float32; set model.dtype=float32\n"
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for visible, device, warning in (("", "cpu", slow), ("0", "cuda", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        done = steadfast("config", "check", "configs/tiny.yaml", "model.dtype=bfloat16")
        assert (done.returncode, done.stdout) == (0, f"configs/tiny.yaml: ok (zero2 on {device})\n")
        assert done.stderr == warning
    assert steadfast("config", "check", "configs/tiny.yaml", "model.dtype=bfloat16", "--device", "cpu").stderr == slow


def test_show_prints_a_configuration_that_loads_again(tmp_path: Path) -> None:
    shown = steadfast("config", "show", "configs/tiny.yaml", "run.seed=7", "--ranks", "2", "--device", "cpu")
    path = tmp_path / "shown.yaml"
    path.write_text(shown.stdout)
    assert load_config(path) == load_config(ROOT / "configs" / "tiny.yaml", ["run.seed=7"])
    assert '"gradient_accumulation_steps": 2' in shown.stdout
    as_json = json.loads(steadfast("config", "show", "configs/tiny.yaml", "--ranks", "4", "--json").stdout)
    assert as_json["deepspeed"]["train_batch_size"] == 4


def test_sections_are_listed_in_the_order_of_the_schema() -> None:
    assert [*sections()][:4] == ["run", "model", "data", "train"]
