"""Training does not start on a model that lets packed samples see each other, or whose loss is not what we compute."""

from pathlib import Path

import pytest
import torch

from tests.support.training import LLAMA
from trainer.config.schema import Model
from trainer.errors import ConfigError, DataError
from trainer.model.load import check_inventory, load_language_model, write_initial_model
from trainer.model.self_check import check_model
from trainer.model.supervised import SupervisedLanguageModel

VOCABULARY = 97


class PlainEngine:
    """The model without DeepSpeed; `leaky` switches transformers' own detection of packed rows off."""

    def __init__(self, path: Path, *, attention: str = "sdpa", leaky: bool = False) -> None:
        model = load_language_model(path, dtype="float32", attention=attention, gradient_checkpointing=False)
        self.model = SupervisedLanguageModel(model).eval()
        self.leaky = leaky

    def evaluate_loss(self, batch):
        with torch.no_grad():
            return float(self.model(*map(torch.from_numpy, (batch.input_ids, batch.position_ids, batch.targets))))

    def logits(self, batch, keep):
        ids, positions = map(torch.from_numpy, (batch.input_ids, batch.position_ids))
        with torch.no_grad():
            if self.leaky:
                ones = torch.ones_like(ids)
                return self.model.language_model(input_ids=ids, position_ids=positions, attention_mask=ones).logits
            return self.model(ids, positions, None, keep)


def initial(path: Path, **changes) -> Path:
    model = Model(config={**LLAMA, **changes}, dtype="float32")
    write_initial_model(model, VOCABULARY, {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}, 0, path)
    check_inventory(path)
    return path


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_models_that_keep_samples_apart_pass(tmp_path, model_type, attention):
    engine = PlainEngine(initial(tmp_path / "m", model_type=model_type, num_key_value_heads=2), attention=attention)
    check_model(engine, VOCABULARY, packing=True, dtype="float32")


def test_a_leak_between_packed_samples_is_refused(tmp_path):
    engine = PlainEngine(initial(tmp_path / "m"), leaky=True)
    with pytest.raises(DataError, match=r"packed samples see each other.*data\.packing=false"):
        check_model(engine, VOCABULARY, packing=True, dtype="float32")
    check_model(PlainEngine(tmp_path / "m"), VOCABULARY, packing=False, dtype="float32")


def test_a_head_that_is_more_than_one_matrix_is_refused(tmp_path):
    """Gemma 2 bends its logits before the softmax: the loss of the plain head would be another one."""
    path = initial(tmp_path / "m", model_type="gemma2", num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    with pytest.raises(ConfigError, match=r"model\.attention: sdpa cannot be used"):
        PlainEngine(path)
    with pytest.raises(DataError, match="is not the model's own"):
        check_model(PlainEngine(path, attention="eager"), VOCABULARY, packing=False, dtype="float32")


def test_missing_and_foreign_tensors_are_refused(tmp_path):
    """transformers would fill a missing weight with random numbers and go on."""
    import safetensors.torch

    path = initial(tmp_path / "m", tie_word_embeddings=False)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, path / "model.safetensors"
    )
    with pytest.raises(DataError, match=r"the file lacks lm_head\.weight"):
        check_inventory(path)
    safetensors.torch.save_file(tensors | {"extra": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(DataError, match="the model has no place for extra"):
        check_inventory(path)
