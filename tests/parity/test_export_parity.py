"""An export is the live model: same tensors, same logits, or nothing at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import save_slice_checkpoint, tiny_model, tiny_tokenizer
from tools.export import ExportReport
from tools.export import export_checkpoint as export_with_fresh_process
from tools.exporting import proof as export_proof
from trainer.checkpoint.verify import MANIFEST_NAME, manifest_text, read_manifest
from trainer.durable import sha256_of_file, xxh3_of_file
from trainer.errors import (
    CannotWriteError,
    CheckpointError,
    DataError,
    MissingInputError,
    NotEqualError,
)
from trainer.tensor_file import TensorFile

TOKENIZER = tiny_tokenizer()


def export_checkpoint(source: Path, out: Path, **options: Any) -> ExportReport:
    """With the proof's examination in this process: a fresh one imports for seconds. One test below takes that way."""
    return export_with_fresh_process(source, out, prove=export_proof.examine, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_slice_checkpoint(path, tiny_model(TOKENIZER, seed=3), TOKENIZER, world_size=3)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A checkpoint this test may damage."""
    return Path(shutil.copytree(run / "checkpoints" / "step-00000100", tmp_path / "damaged"))


def rewrite_manifest(checkpoint: Path, **changes: object) -> None:
    """Change fields of a manifest and make its hashes right again: the files are as 'committed'."""
    manifest = read_manifest(checkpoint)
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "xxh3_128": xxh3_of_file(checkpoint / name)}
        for name in manifest.files
    }
    fields = {**manifest.__dict__, "files": files, **changes}
    (checkpoint / MANIFEST_NAME).write_text(manifest_text(type(manifest)(**fields)))


def assert_nothing_at(out: Path) -> None:
    assert not out.exists()
    assert not list(out.parent.glob(f"{out.name}*"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world_size", "shard_bytes"), [(1, 10**9), (3, 30_000)])
def test_export_is_bit_equal_and_loads_with_plain_transformers(
    tmp_path: Path, tied: bool, world_size: int, shard_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = tiny_model(TOKENIZER, seed=5, tied=tied)
    save_slice_checkpoint(tmp_path / "run", live, TOKENIZER, world_size=world_size)
    out = tmp_path / "model"
    report = export_checkpoint(tmp_path / "run", out, max_shard_bytes=shard_bytes)
    assert report.logit_max_diff is not None
    assert report.logit_max_diff < 1e-5
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    shards = sorted(out.glob("*.safetensors"))
    assert all(shard.stat().st_size < shard_bytes + 4096 for shard in shards)
    assert all(TensorFile(shard).metadata == {"format": "pt"} for shard in shards)
    stored = [name for shard in shards for name in TensorFile(shard).entries]
    assert ("lm_head.weight" in stored) == (not tied)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, expected), (loaded_name, found) in zip(
        live.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(expected, found)
    assert loaded.dtype == torch.float32
    chat = [{"role": "user", "content": "你好"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(chat) == TOKENIZER.apply_chat_template(chat)


def test_manifest_names_every_file_with_its_sha256(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_checkpoint(run, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in out.iterdir()}
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": sha256_of_file(out / name)}
    assert manifest["step"] == 100
    proof = json.loads((out / "proof.json").read_text())
    assert proof["tensors"] == 21
    assert proof["files"] == len(manifest["files"]) - 2
    assert len(proof["prompts"]) == 3
    card = (out / "README.md").read_text()
    assert "| step | 100 |" in card
    assert "123456" in card
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_bfloat16_is_the_rounded_weight_and_the_trained_dtype_is_the_default(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=6)
    save_slice_checkpoint(tmp_path / "run", live, TOKENIZER, dtype="bfloat16")
    report = export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert report.dtype == "bfloat16"
    assert report.logit_max_diff is not None
    assert 0 < report.logit_max_diff < (report.tolerance or 0)
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, live.state_dict()[name].to(torch.bfloat16))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert export_checkpoint(tmp_path / "run", tmp_path / "wide", dtype="float32").dtype == "float32"


def test_float16_is_the_rounded_weight_and_what_is_beyond_its_range_is_refused(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=6)
    save_slice_checkpoint(tmp_path / "run", live, TOKENIZER)
    report = export_checkpoint(tmp_path / "run", tmp_path / "model", dtype="float16")
    assert 0 < (report.logit_max_diff or 0) < 0.05
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, live.state_dict()[name].half())
    with torch.no_grad():
        live.lm_head.weight[0, 0] = 70_000.0
    save_slice_checkpoint(tmp_path / "large", live, TOKENIZER)
    with pytest.raises(DataError, match=r"lm_head\.weight holds values beyond the range of float16"):
        export_checkpoint(tmp_path / "large", tmp_path / "other", dtype="float16")
    assert_nothing_at(tmp_path / "other")


def test_frozen_parameters_and_resized_embeddings_are_exported_as_they_are(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=7)
    live.resize_token_embeddings(300)
    frozen = [name for name, _ in live.named_parameters() if ".layers.0." in name]
    save_slice_checkpoint(tmp_path / "run", live, TOKENIZER, frozen=frozen)
    export_checkpoint(tmp_path / "run", tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported["model.embed_tokens.weight"].shape == (300, 32)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 300
    for name, tensor in live.named_parameters():
        assert torch.equal(exported[name], tensor)


def test_a_tensor_larger_than_a_piece_comes_in_pieces(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_checkpoint(run, tmp_path / "whole")
    monkeypatch.setattr("tools.exporting.checkpoint_tensors.PIECE_ELEMENTS", 100)
    monkeypatch.setattr("tools.model_directory.tensors.PIECE_ELEMENTS", 77)
    export_checkpoint(run, tmp_path / "pieces")
    for name in ("model.safetensors", "proof.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()


def test_the_configuration_of_the_run_comes_along_and_a_checkpoint_alone_has_none(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    (own / "config.yaml").write_text("optimizer: {learning_rate: 1.0e-05}\n")
    export_checkpoint(own, tmp_path / "model", verify=False)
    assert (tmp_path / "model" / "training-config.yaml").read_text() == (own / "config.yaml").read_text()
    export_checkpoint(run, tmp_path / "alone", verify=False)
    assert not (tmp_path / "alone" / "training-config.yaml").exists()


def test_without_verification_the_bytes_of_the_checkpoint_are_not_checked(copy: Path, tmp_path: Path) -> None:
    damage(copy / "rank-00002-of-00003.safetensors")
    export_checkpoint(copy, tmp_path / "model", verify=False)
    assert "Not verified: exported with --no-verify" in (tmp_path / "model" / "README.md").read_text()


def test_a_parameter_stored_twice_though_tied_is_dropped_only_when_equal(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=7)
    equal = tmp_path / "equal"
    live.lm_head.weight.data.copy_(live.model.embed_tokens.weight.data)
    live.config.tie_word_embeddings = True
    checkpoint = save_slice_checkpoint(equal, live, TOKENIZER)
    export_checkpoint(checkpoint, tmp_path / "model")
    assert "lm_head.weight" not in TensorFile(tmp_path / "model" / "model.safetensors").entries
    live.lm_head.weight.data[5, 5] += 0.5
    different = save_slice_checkpoint(tmp_path / "different", live, TOKENIZER)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        export_checkpoint(different, tmp_path / "other")
    assert_nothing_at(tmp_path / "other")


def test_the_newest_valid_checkpoint_of_a_run_is_taken(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    newer = save_slice_checkpoint(own, tiny_model(TOKENIZER, seed=4), TOKENIZER, step=200)
    assert export_checkpoint(own, tmp_path / "a").step == 200
    damage(newer / "rank-00001-of-00002.safetensors")
    assert export_checkpoint(own, tmp_path / "b").step == 100


def damage(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


def test_one_flipped_bit_in_a_slice_is_named_and_nothing_is_written(copy: Path, tmp_path: Path) -> None:
    damage(copy / "rank-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="rank-00002-of-00003"):
        export_checkpoint(copy, tmp_path / "model")
    assert_nothing_at(tmp_path / "model")


def test_a_weight_the_architecture_wants_and_the_checkpoint_lacks_is_named(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "model" / "config.json").read_text())
    (copy / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    rewrite_manifest(copy)
    with pytest.raises(CheckpointError, match=r"lacks weight model\.layers\.2\.\S+ and 8 more"):
        export_checkpoint(copy, tmp_path / "model")
    (copy / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    rewrite_manifest(copy)
    with pytest.raises(CheckpointError, match=r"unknown weight model\.layers\.1\."):
        export_checkpoint(copy, tmp_path / "model")
    (copy / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    rewrite_manifest(copy)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(64, 32\)"):
        export_checkpoint(copy, tmp_path / "model")
    assert_nothing_at(tmp_path / "model")


def test_a_model_that_is_not_the_live_one_is_refused(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=8)
    checkpoint = save_slice_checkpoint(tmp_path / "run", live, TOKENIZER)
    with torch.no_grad():
        live.model.layers[1].self_attn.k_proj.weight[3, 3] += 0.05
    other = save_slice_checkpoint(tmp_path / "other", live, TOKENIZER)
    shutil.copyfile(other / "probe.safetensors", checkpoint / "probe.safetensors")
    rewrite_manifest(checkpoint)
    with pytest.raises(NotEqualError, match="the exported model is not the live one"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert_nothing_at(tmp_path / "model")
    assert export_checkpoint(checkpoint, tmp_path / "model", verify=False).logit_max_diff is None


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    live = tiny_model(TOKENIZER, seed=9)
    live.model.layers[0].mlp.up_proj.weight.data[1, 1] = float("inf")
    checkpoint = save_slice_checkpoint(tmp_path / "run", live, TOKENIZER)
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        export_checkpoint(checkpoint, tmp_path / "model", verify=False)
    assert_nothing_at(tmp_path / "model")


def test_what_is_there_is_never_replaced_and_a_full_disk_is_seen_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    with pytest.raises(CannotWriteError, match="exists already"):
        export_checkpoint(run, out)
    assert list(out.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CannotWriteError, match=r"its disk has 1\.0 kB"):
        export_checkpoint(run, tmp_path / "other")
    assert_nothing_at(tmp_path / "other")


def test_a_source_without_checkpoints_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(MissingInputError):
        export_checkpoint(tmp_path, tmp_path / "model")


def test_the_command_prints_json_and_refuses_nonsense(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    from trainer.cli import run_command

    def export(*words: str) -> int:
        return run_command({"export": ("tools.export", "")}, importlib.import_module, ["export", *words])

    out = tmp_path / "model"
    assert export(str(run), str(out), "--verify", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["dtype"], report["tensors"]) == (100, "float32", 21)
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert export(str(run), str(out)) == CannotWriteError.exit_code
    assert export(str(run), str(tmp_path / "b"), "--max-shard-size", "large") == 2
    assert capsys.readouterr().err.count("\n") == 2
