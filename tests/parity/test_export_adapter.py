"""A LoRA run leaves training as a whole model or as peft's adapter, and both are the live model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training import settings
from tools.export import export_checkpoint
from tools.exporting.adapter import loaded_with
from tools.exporting.proof import examine
from tools.merge import merge_adapter
from tools.model_directory.loading import check_model_directory
from tools.model_directory.writing import verify_artefact
from tools.verify import verify_model
from trainer.checkpoint.slices import SliceReader
from trainer.checkpoint.verify import find_checkpoint
from trainer.errors import DataError, MissingInputError, NotEqualError, UsageError

TRAIN = "tests.support.training:train"
RANK, ALPHA = 4, 16.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, two_ranks: Any, store: Any) -> Path:
    """A run whose adapter has moved the model far beyond what a proof allows; embeddings and head are one tensor."""
    path = tmp_path_factory.mktemp("lora") / "run"
    lora = {"rank": RANK, "alpha": ALPHA, "targets": ["q_proj", "layers.1.mlp.down_proj"]}
    values = settings(path, store.path, model__lora=lora, engine__deepspeed="zero3", optimizer__learning_rate=2e-2)
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    return path


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    reader = SliceReader(find_checkpoint(run))
    return {
        name: torch.from_numpy(reader.read("master", name)).view(shape) for name, shape in reader.parameters.items()
    }


def test_merged_is_base_plus_the_product_and_gives_the_live_logits(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = export_checkpoint(run, tmp_path / "model")
    assert (report.lora, report.tensors) == ("merged", 20)
    assert report.logit_max_diff is not None
    assert report.logit_max_diff < 1e-5
    base = load_file(run / "initial-model/model.safetensors")
    merged, adapter = load_file(tmp_path / "model/model.safetensors"), adapter_of(run)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"{name.rpartition('.lora_')[0]}.weight" for name in adapter}
    assert len(changed) == 3
    for name in changed:
        up, down = (adapter[f"{name.removesuffix('.weight')}.lora_{letter}.weight"].double() for letter in "BA")
        exact = base[name].double() + ALPHA / RANK * up @ down
        assert (merged[name].double() - exact).abs().max() < 1e-6
    assert not (tmp_path / "model/adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    half = export_checkpoint(run, tmp_path / "half", dtype="bfloat16", verify=False)
    assert half.dtype == "bfloat16"
    rounded = load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(rounded[name], merged[name].to(torch.bfloat16)) for name in merged)


def test_apart_is_the_adapter_alone_with_its_base_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    report = export_checkpoint(run, out, lora="apart")
    assert (report.lora, report.tensors, report.parameters) == ("apart", 6, RANK * (2 * 64 + 96))
    assert report.logit_max_diff is not None
    assert report.logit_max_diff < 1e-5
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, int(ALPHA), "LORA")
    assert config["target_modules"] == ["layers.1.mlp.down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(run / "initial-model")
    stored = load_file(out / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): tensor.tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in adapter_of(run).items()
    }
    assert not (out / "config.json").exists()
    assert json.loads((out / "proof.json").read_text())["loaded_with"] == loaded_with()
    assert verify_model(out).tensors is None
    with pytest.raises(MissingInputError, match="it is an adapter"):
        check_model_directory(out)


def test_peft_loads_and_merges_it_to_the_same_model(run: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    export_checkpoint(run, tmp_path / "adapter", lora="apart")
    export_checkpoint(run, tmp_path / "model")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    loaded = peft.get_peft_model_state_dict(model)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    merged = load_file(tmp_path / "model/model.safetensors")
    for name, parameter in model.merge_and_unload().named_parameters():
        assert (parameter - merged[name]).abs().max() < 1e-6


def test_an_adapter_merges_into_its_base_afterwards_too(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "adapter", lora="apart", verify=False)
    export_checkpoint(run, tmp_path / "model", verify=False)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (report.method, report.tensors) == ("lora", 20)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "merged"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    verify_artefact(tmp_path / "merged")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(DataError, match="uses use_dora, which is more than plain LoRA; merge it with peft"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(MissingInputError, match="is no adapter"):
        merge_adapter(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_only_the_base_that_was_trained_with_is_taken(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    base = tmp_path / "base"
    (moved / "initial-model").rename(base)
    checkpoint = find_checkpoint(moved)
    config = json.loads((checkpoint / "model/adapter_config.json").read_text())
    with pytest.raises(MissingInputError, match="is not there; name it: --base DIR"):
        export_checkpoint(moved, tmp_path / "model", base=tmp_path / "nowhere")
    assert export_checkpoint(moved, tmp_path / "model", base=base).lora == "merged"
    export_checkpoint(moved, tmp_path / "adapter", base=base, lora="apart")
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert (named, config["base_model_name_or_path"]) == (str(base), str(run / "initial-model"))
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    for lora in ("merged", "apart"):
        with pytest.raises(DataError, match=r"is not the base that .* was trained with"):
            export_checkpoint(moved, tmp_path / "other", base=base, lora=lora)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("lora", ["merged", "apart"])
def test_an_adapter_that_is_not_the_live_one_is_refused(
    run: Path, tmp_path: Path, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SliceReader.read

    def without_the_second_factor(self: SliceReader, kind: str, name: str, *place: int) -> Any:
        return original(self, kind, name, *place) * (0 if "layers.1.mlp.down_proj.lora_B" in name else 1)

    monkeypatch.setattr(SliceReader, "read", without_the_second_factor)
    with pytest.raises(NotEqualError, match="not the live"):
        export_checkpoint(run, tmp_path / "model", lora=lora, prove=examine)  # here, where the reader is spoilt
    assert not (tmp_path / "model").exists()


def test_a_whole_model_has_no_adapter_to_export(tmp_path: Path, two_ranks: Any, store: Any) -> None:
    values = settings(tmp_path / "run", store.path, train__max_steps=1)
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    with pytest.raises(UsageError, match="is no LoRA checkpoint"):
        export_checkpoint(tmp_path / "run", tmp_path / "adapter", lora="apart")
