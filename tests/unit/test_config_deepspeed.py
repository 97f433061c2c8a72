"""DeepSpeed's JSON is linted and compiled without DeepSpeed, and the lists agree with the installed DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from trainer.config import deepspeed_keys as known
from trainer.config.deepspeed import (
    accumulation_steps,
    check_deepspeed,
    compile_deepspeed,
    lint,
    load_deepspeed_json,
    offloads_optimizer,
    zero_stage,
)
from trainer.config.load import config_from_text
from trainer.config.schema import Config
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ZERO = {"zero_optimization": {"stage": 2}}


def config(*overrides: str) -> Config:
    minimum = ["run.dir=x", "model.path=m", "data.train=d", "train.max_steps=8"]
    return config_from_text("", "none", [*minimum, *overrides])


def compiled(path: Path, content: dict[str, Any], *overrides: str, device: Any = "cpu", **more: Any) -> dict[str, Any]:
    path.write_text(json.dumps(content))
    mine = config(f"engine.deepspeed={path}", *overrides)
    return compile_deepspeed(mine, world_size=2, accumulation_steps=3, device=device, **more)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        (ZERO | {"grad_clipping": 0.5}, "unknown key 'grad_clipping'"),
        (ZERO | {"gradient_clipping": 0.5}, "gradient_clipping is decided by train.max_gradient_norm"),
        (ZERO | {"train_batch_size": 8}, "train_batch_size is decided by train.global_batch_size"),
        (ZERO | {"optimizer": {"type": "AdamW"}}, "optimizer is decided by the section optimizer"),
        (ZERO | {"scheduler": {"type": "WarmupLR"}}, "scheduler is decided by the section schedule"),
        (ZERO | {"bf16": {"enabled": True}}, "bf16 is decided by model.dtype"),
        (ZERO | {"fp16": {"enabled": True}}, "fp16 is decided by model.dtype"),
        (ZERO | {"bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean 'enabled'?"),
        (ZERO | {"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow must stay true"),
        (ZERO | {"elasticity": {}}, "elasticity was removed from DeepSpeed"),
        (ZERO | {"tensor_parallel": {}}, "tensor_parallel is not used here"),
        (ZERO | {"aio": {"queue_dept": 1}}, "unknown key 'aio.queue_dept'; did you mean 'queue_depth'?"),
        (ZERO | {"activation_checkpointing": {"partitioned_activations": 1}}, "did you mean 'partition_activations'?"),
        (ZERO | {"checkpoint": {"writer": {"typ": "x"}}}, "unknown key 'checkpoint.writer.typ'"),
        (ZERO | {"wall_clock_breakdown": 1}, "wall_clock_breakdown must be true or false"),
        ({}, "zero_optimization.stage is missing"),
        ({"zero_optimization": "auto"}, "zero_optimization is a JSON object"),
        ({"zero_optimization": {"stage": 0}}, "use stage 1"),
        ({"zero_optimization": {"stage": 4}}, "must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage must be a whole number"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, 'overlap_comm has no "auto"'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1.5}}, "must be a whole number (got 1.5)"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is deprecated"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 2}}, "mics_shard_size was removed"),
        ({"zero_optimization": {"stage": 2, "offload_optimiser": {}}}, "did you mean 'offload_optimizer'?"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "must be cpu or none"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": True}}}, "offload_param.device is missing"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm must stay true"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(content: dict[str, Any], fragment: str) -> None:
    problems = lint(content, "mine.json", "cuda")
    assert any(problem.startswith("mine.json: ") and fragment in problem for problem in problems), problems


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 10}},
        ZERO | {"checkpoint": {"writer": {"type": "FAST"}}},
        ZERO | {"aio": {"use_gds": True}},
    ],
)
def test_gpu_only_options_are_refused_on_a_cpu_and_accepted_on_a_gpu(content: dict[str, Any]) -> None:
    (problem,) = lint(content, "mine.json", "cpu")
    assert "CUDA device only" in problem
    assert lint(content, "mine.json", "cuda") == []


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"offload_optimizer": {"device": "nvme", "pipeline_write": True}}, "offload_optimizer.pipeline_write = True"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "zero_optimization.offload_optimizer.ratio = 0.5"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "offload_optimizer.super_offload = True"),
        ({"zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size = 2"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zero_optimization.zenflow = {'topk_ratio': 0.1}"),
        ({}, "data_types.grad_accum_dtype = 'fp32'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_checkpoints_cannot_hold_is_refused_on_any_device(
    content: dict[str, Any], fragment: str, device: Any
) -> None:
    settings = {"zero_optimization": {"stage": 3, **content}}
    if not content:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    (problem,) = lint(settings, "mine.json", device)
    assert fragment in problem
    assert "checkpoints cannot" in problem


@pytest.mark.parametrize(
    ("zero", "fragment"),
    [
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "offload_param.device is nvme, which works for the optimizer",
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme"}},
            "offload_optimizer.device is nvme, which needs stage 3",
        ),
    ],
)
def test_nvme_is_for_the_optimizer_of_stage_3(zero: dict[str, Any], fragment: str) -> None:
    (problem,) = lint({"zero_optimization": zero}, "mine.json", "cuda")
    assert fragment in problem


def test_swap_files_lie_in_a_directory_of_the_runs_own(tmp_path: Path) -> None:
    def compiled(run: str, **engine: str) -> str:
        values = {"run": {"dir": run}, "model": {"path": "m"}, "data": {"train": "s"}, "train": {"max_steps": 1}}
        config = Config.model_validate(values | {"engine": {"deepspeed": "zero3-offload-nvme", **engine}})
        found = compile_deepspeed(config, world_size=1, accumulation_steps=1, device="cuda")
        return str(found["zero_optimization"]["offload_optimizer"]["nvme_path"])

    first, second = (compiled(run, nvme_path=str(tmp_path)) for run in ("runs/a", "runs/b"))
    assert first != second
    assert Path(first).parent == Path(second).parent == tmp_path
    assert compiled("runs/a", nvme_path=str(tmp_path)) == first
    with pytest.raises(ConfigError) as refused:
        compiled("runs/a")
    assert refused.value.problems == [
        "engine.deepspeed: zero3-offload-nvme offloads to nvme: set engine.nvme_path to a local directory"
    ]


def test_the_harmless_values_of_such_keys_are_accepted() -> None:
    offload = {"device": "cpu", "ratio": 1.0, "super_offload": False}
    zero = {"stage": 3, "offload_optimizer": offload, "zero_hpz_partition_size": 1, "zenflow": None}
    settings = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": None}}
    assert lint(settings, "mine.json", "cpu") == []
    assert lint(settings, "mine.json", "cuda") == []


def test_null_is_not_given(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": None, "offload_param": None, "sub_group_size": None}
    content = {"zero_optimization": zero, "aio": None, "steps_per_print": None}
    assert lint(content, "mine.json", "cuda") == []
    result = compiled(tmp_path / "a.json", content)
    assert result["zero_optimization"] == {"stage": 3}
    assert "aio" not in result
    assert result["steps_per_print"] == sys.maxsize
    assert not offloads_optimizer(result)
    assert offloads_optimizer(compiled(tmp_path / "a.json", {"zero_optimization": {**zero, "offload_optimizer": {
        "device": "cpu"}}}))  # fmt: skip


def test_auto_is_accepted_for_what_we_decide_and_resolved_by_us(tmp_path: Path) -> None:
    content: dict[str, Any] = dict.fromkeys(known.OWNED, "auto")
    content |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    content["zero_optimization"] = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        "offload_param": {"device": "cpu"},
    }
    result = compiled(tmp_path / "a.json", content, "train.micro_batch_size=4", hidden_size=64)
    assert "auto" not in json.dumps(result)
    assert {"optimizer", "scheduler", "fp16"}.isdisjoint(result)
    zero = result["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (4096, 3686)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["sub_group_size"] == 1_000_000_000
    assert isinstance(zero["sub_group_size"], int)
    assert zero["offload_optimizer"]["pin_memory"] is False
    assert zero["offload_param"]["pin_memory"] is False
    on_gpu = compiled(tmp_path / "a.json", content, device="cuda")["zero_optimization"]
    assert on_gpu["offload_param"]["pin_memory"] is True
    assert on_gpu["reduce_bucket_size"] == 500_000_000


def test_the_hidden_size_of_a_fresh_model_sizes_auto_buckets(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    result = compiled(
        tmp_path / "a.json", content, "model.path=null", "model.config={model_type: llama, hidden_size: 32}"
    )
    assert result["zero_optimization"]["reduce_bucket_size"] == 1024


def test_batch_sizes_clipping_and_precision_come_from_the_configuration(tmp_path: Path) -> None:
    result = compiled(tmp_path / "a.json", ZERO, "train.micro_batch_size=4", "train.max_gradient_norm=0")
    assert result["train_batch_size"] == 24
    assert result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 3
    assert result["gradient_clipping"] == 0.0
    assert result["bf16"] == {"enabled": True}
    assert result["zero_force_ds_cpu_optimizer"] is False
    assert result["wall_clock_breakdown"] is False
    assert compiled(tmp_path / "a.json", ZERO, "model.dtype=float32")["bf16"] == {"enabled": False}


def test_compiling_refuses_what_the_lint_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use stage 1"):
        compiled(tmp_path / "a.json", {"zero_optimization": {"stage": 0}})


def test_accumulation_follows_from_the_three_numbers_rounded_up() -> None:
    mine = config("train.global_batch_size=24", "train.micro_batch_size=2")
    assert [accumulation_steps(mine, ranks) for ranks in (1, 2, 3, 4, 5, 6, 12, 100)] == [12, 6, 4, 3, 3, 2, 1, 1]


def test_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert zero_stage(load_deepspeed_json("zero3")) == 3
    offload = load_deepspeed_json("zero3-offload-cpu")
    assert offloads_optimizer(offload)
    assert not offloads_optimizer(load_deepspeed_json("zero2"))
    path = tmp_path / "mine.json"
    for content, fragment in {
        '{"a": 1, "a": 2}': "key 'a' is given twice",
        '{"a": }': "mine.json:1: not valid JSON",
        "[1]": "a JSON object",
        '{"a": NaN}': "NaN is not a number",
        '{"a": 1e999}': "1e999 is not a number",
        "[" * 100_000: "not valid JSON",
        "\xff": "mine.json",
    }.items():
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=fragment):
            load_deepspeed_json(str(path))
    for name in ("zero_3", "", "../zero2", "nul\0.json", str(tmp_path / "absent.json"), str(tmp_path) + "/"):
        problems = check_deepspeed(name, "cpu")
        assert len(problems) == 1, name
    with pytest.raises(ConfigError, match="did you mean 'zero3'"):
        load_deepspeed_json("zero_3")


_keys = st.sampled_from(
    ["zero_optimization", "stage", "bf16", "enabled", "offload_param", "device", "nvme_path", "aio", "writer", "auto",
     "checkpoint", "type", "train_batch_size", "elasticity", "x", "", "fp16", "zenflow", "reduce_bucket_size"]
)  # fmt: skip
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(allow_nan=False), _keys),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(_keys, inner, max_size=4)),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(content=st.dictionaries(_keys, _json, max_size=5), device=st.sampled_from(["cpu", "cuda"]))
def test_lint_never_fails(content: dict[str, Any], device: Any) -> None:
    assert all(problem.startswith("p.json: ") for problem in lint(content, "p.json", device))


# One process that imports DeepSpeed and prints what it knows: every key its configuration asks for (a dictionary
# that writes down what is looked up), and the fields of its sections.
ASK_DEEPSPEED = """
import json
asked = set()
class Keys(list):
    def __contains__(self, key):
        asked.add(key)
        return list.__contains__(self, key)
class Recording(dict):
    def get(self, key, default=None):
        asked.add(key)
        return dict.get(self, key, default)
    def __getitem__(self, key):
        asked.add(key)
        return dict.__getitem__(self, key)
    def __contains__(self, key):
        asked.add(key)
        return dict.__contains__(self, key)
    def keys(self):
        return Keys(dict.keys(self))
from deepspeed.runtime import config as c
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
c.DeepSpeedConfig(Recording({"train_batch_size": 1, "zero_optimization": {"stage": 2}}))
def fields(model):
    return {name: bool((f.json_schema_extra or {}).get("deprecated")) for name, f in
            ((f.alias or name, f) for name, f in model.model_fields.items())}
print("ANSWER" + json.dumps({
    "asked": sorted(asked),
    "removed": [*c._REMOVED_TOP_LEVEL_CONFIG_KEYS] + ["zero_optimization." + k for k in c._REMOVED_ZERO_CONFIG_KEYS],
    "zero_optimization": fields(DeepSpeedZeroConfig),
    "zero_optimization.offload_param": fields(DeepSpeedZeroOffloadParamConfig),
    "zero_optimization.offload_optimizer": fields(DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.leaf_module": fields(DeepSpeedZeroLeafModuleConfig),
    "bf16": fields(DeepSpeedBF16Config),
    "aio": dict.fromkeys(AIO_DEFAULT_DICT, False),
    "activation_checkpointing": dict.fromkeys(ACT_CHKPT_DEFAULT, False),
}))
"""


@pytest.fixture(scope="module")
def deepspeed_says() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", ASK_DEEPSPEED], capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.split("ANSWER")[1])
    return answer


def test_every_key_the_installed_deepspeed_reads_is_known_here(deepspeed_says: dict[str, Any]) -> None:
    ours = {*known.OWNED, *known.PASSED, *known.REFUSED, *known.REMOVED, *known.SECTIONS}
    assert set(deepspeed_says["asked"]) - ours == set()
    assert set(deepspeed_says["removed"]) == set(known.REMOVED)


# DeepSpeed keeps no list of the keys of these.
UNLISTED = ("checkpoint", "data_types")


@pytest.mark.parametrize("section", [name for name in known.SECTIONS if not name.startswith(UNLISTED)])
def test_the_keys_of_a_section_are_those_of_the_installed_deepspeed(
    section: str, deepspeed_says: dict[str, Any]
) -> None:
    current = {name for name, deprecated in deepspeed_says[section].items() if not deprecated}
    assert current == set(known.SECTIONS[section])
