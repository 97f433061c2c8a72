"""Whatever goes wrong between writing an export and proving it is found: exit code 1, and nothing at OUT."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.support.exports import WEIGHTS, flip_a_byte, rewrite, set_config, swap
from tests.support.models import save_slice_checkpoint, tiny_model, tiny_tokenizer
from tools.export import export_checkpoint
from tools.exporting import proof as export_proof
from trainer.cli import run_command
from trainer.errors import NotEqualError

TOKENIZER = tiny_tokenizer()
NORM = "model.layers.{}.input_layernorm.weight"
KEYS = "model.layers.{}.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(TOKENIZER, seed=3)
    with torch.no_grad():
        # Norms start as ones; after training no two are equal.
        model.model.layers[1].input_layernorm.weight += 1e-3
    return save_slice_checkpoint(tmp_path_factory.mktemp("run"), model, TOKENIZER)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slice_checkpoint(tmp_path_factory.mktemp("tied"), tiny_model(TOKENIZER, seed=4, tied=True), TOKENIZER)


def byte_in_a_shard(claim):
    flip_a_byte(Path(claim.model, WEIGHTS))
    return claim


def byte_in_the_tokenizer(claim):
    flip_a_byte(Path(claim.model, "tokenizer.json"))
    return claim


def file_is_gone(claim):
    Path(claim.model, "chat_template.jinja").unlink()
    return claim


def file_too_many(claim):
    Path(claim.model, "pytorch_model.bin").write_bytes(b"pickle")
    return claim


def changed_by(change):
    return lambda claim: rewrite(claim, change)


def hole(value):
    def change(tensors):
        tensors[KEYS.format(0)][2, 3] = value

    return changed_by(change)


ATTACKS = {
    "byte in a shard": (byte_in_a_shard, r"model\.safetensors is not what was written"),
    "byte in the tokenizer": (byte_in_the_tokenizer, r"tokenizer\.json is not what was written"),
    "file is gone": (file_is_gone, r"chat_template\.jinja is missing"),
    "file too many": (file_too_many, r"pytorch_model\.bin was not written by the export"),
    "tensor is missing": (changed_by(lambda tensors: tensors.pop(KEYS.format(1))), r"lacks \S+1\.self_attn\.k_proj"),
    "tensor too many": (changed_by(lambda tensors: tensors.update(b=torch.ones(2))), r"holds b, which its arch"),
    "tensor is empty": (changed_by(lambda tensors: tensors.update({NORM.format(0): torch.ones(0)})), r"shape \(0,\)"),
    "not a number": (hole(torch.nan), r"0\.self_attn\.k_proj\.weight holds values that are not finite"),
    "infinite": (hole(-torch.inf), r"0\.self_attn\.k_proj\.weight holds values that are not finite"),
    "last bit of a weight": (hole(0.123456789), r"0\.self_attn\.k_proj\.weight is not the checkpoint's"),
    "two matrices swapped": (
        changed_by(lambda tensors: swap(tensors, KEYS.format(0), KEYS.format(1))),
        r"k_proj\.weight is not the checkpoint's",
    ),
    "two norms swapped": (
        changed_by(lambda tensors: swap(tensors, NORM.format(0), NORM.format(1))),
        r"input_layernorm\.weight is not the checkpoint's",
    ),
    "another dtype": (
        changed_by(lambda tensors: tensors.update({NORM.format(0): tensors[NORM.format(0)].half()})),
        r"input_layernorm\.weight is not stored as F32",
    ),
    "said to be tied": (
        lambda claim: set_config(claim, tie_word_embeddings=True),
        r"holds lm_head\.weight, which its architecture does not know",
    ),
    "a setting": (lambda claim: set_config(claim, rope_theta=500.0, rope_parameters=None), "is not the live one"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_named_and_nothing_is_left(attack: str, checkpoint: Path, tmp_path: Path) -> None:
    spoil, message = ATTACKS[attack]
    with pytest.raises(NotEqualError, match=message):
        export_checkpoint(checkpoint, tmp_path / "model", prove=lambda claim: export_proof.examine(spoil(claim)))
    assert list(tmp_path.iterdir()) == []


def test_a_tied_model_that_says_it_is_not_lacks_its_head(tied: Path, tmp_path: Path) -> None:
    def prove(claim):
        return export_proof.examine(set_config(claim, tie_word_embeddings=False))

    with pytest.raises(NotEqualError, match=r"lacks lm_head\.weight"):
        export_checkpoint(tied, tmp_path / "model", prove=prove)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["not a number", "two matrices swapped"])
def test_the_logits_alone_find_what_the_weights_would(
    change: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of the weights reads the checkpoint as the exporter did; the logits came another way."""
    monkeypatch.setattr(export_proof, "_check_weights", lambda tensors, source: None)
    monkeypatch.setattr("tools.model_directory.tensors.check_inventory", lambda tensors, expected: None)
    with pytest.raises(NotEqualError, match="is not the live one: logits differ by up to"):
        export_checkpoint(
            checkpoint, tmp_path / "model", prove=lambda claim: export_proof.examine(ATTACKS[change][0](claim))
        )


def test_a_fresh_process_proves_and_the_command_ends_with_1(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, processes = export_proof.subprocess.run, []

    def spoil_and_run(command, **options):
        (building,) = tmp_path.glob(".model.unfinished")
        flip_a_byte(building / WEIGHTS)
        processes.append(command[0])
        return real(command, **options)

    monkeypatch.setattr(export_proof.subprocess, "run", spoil_and_run)
    words = ["export", str(checkpoint), str(tmp_path / "model")]
    assert run_command({"export": ("tools.export", "")}, importlib.import_module, words) == 1
    assert "model.safetensors is not what was written" in capsys.readouterr().err
    assert len(processes) == 1
    assert list(tmp_path.iterdir()) == []
