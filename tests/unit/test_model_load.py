"""Model directories are checked before anything is loaded: names, shapes, whole files, and settings that exist."""

import json

import pytest
import safetensors.torch
import torch

from tests.support.training import LLAMA
from trainer.config.schema import Model
from trainer.errors import ConfigError, DataError, MissingInputError
from trainer.model.load import check_inventory, write_initial_model

SPECIAL_IDS = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}


def write(path, **changes):
    write_initial_model(Model(config={**LLAMA, **changes}, dtype="float32"), 97, SPECIAL_IDS, 0, path)
    return path


@pytest.fixture
def directory(tmp_path):
    path = write(tmp_path / "m", tie_word_embeddings=False)
    check_inventory(path)
    return path


def rewrite(directory, change):
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    safetensors.torch.save_file(change(tensors), directory / "model.safetensors")


def test_equal_seeds_give_equal_weights(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_missing_tensor_is_refused(directory):
    """transformers would fill it with random numbers and go on."""
    rewrite(directory, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(DataError, match=r"lacks lm_head\.weight;"):
        check_inventory(directory)


def test_a_foreign_tensor_is_refused(directory):
    rewrite(directory, lambda tensors: tensors | {"extra": torch.zeros(1)})
    with pytest.raises(DataError, match="no place for: extra;"):
        check_inventory(directory)


def test_another_shape_is_refused(directory):
    rewrite(directory, lambda tensors: tensors | {"lm_head.weight": torch.zeros(96, 32)})
    with pytest.raises(DataError, match=r"lm_head\.weight has shape \[96, 32\], config\.json asks for \[97, 32\]"):
        check_inventory(directory)


def test_an_incomplete_download_is_refused(directory):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingInputError, match="lacks model-00002-of-00002"):
        check_inventory(directory)
    (directory / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="is damaged"):
        check_inventory(directory)


def test_a_broken_or_foreign_config_is_refused(directory):
    for text in ("{", json.dumps({"model_type": "nothing-of-the-kind"})):
        (directory / "config.json").write_text(text)
        with pytest.raises(DataError, match="describes no causal language model"):
            check_inventory(directory)
    (directory / "config.json").unlink()
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        check_inventory(directory)


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    small = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
    with pytest.raises(DataError, match=r"mixture of experts \(mixtral\)"):
        check_inventory(write(tmp_path / "m", **small))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hiden_size": 16}, r"model\.config\.hiden_size is not a setting of llama; did you mean 'hidden_size'"),
        ({"hidden_size": "abc"}, "model.config describes no llama model"),
        ({"hidden_size": 30}, "model.config describes no llama model"),
        ({"model_type": "lama"}, "model.config describes no lama model"),
        ({"vocab_size": 5}, "below the tokenizer's 97"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_named(tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        write(tmp_path / "m", **changes)
