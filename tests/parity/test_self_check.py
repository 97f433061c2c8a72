"""Training does not start on a model that lets packed samples see each other, or whose loss is not what we compute."""

from pathlib import Path

import pytest
import torch

from tests.support.training import LLAMA
from trainer.config.schema import Model
from trainer.errors import ConfigError, DataError
from trainer.model.load import check_inventory, load_language_model, write_initial_model
from trainer.model.self_check import check_model
from trainer.model.supervised import SupervisedLanguageModel, unsupported_head

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
    check_model(engine, VOCABULARY, micro_batch_size=3, packing=True, dtype="float32")


def test_a_leak_between_packed_samples_is_refused(tmp_path):
    engine = PlainEngine(initial(tmp_path / "m"), leaky=True)
    with pytest.raises(DataError, match=r"packed samples see each other.*data\.packing=false"):
        check_model(engine, VOCABULARY, micro_batch_size=3, packing=True, dtype="float32")
    check_model(PlainEngine(tmp_path / "m"), VOCABULARY, micro_batch_size=3, packing=False, dtype="float32")


def test_one_row_apart_is_not_enough(tmp_path):
    """Some kernels tell packed samples apart only when a micro-batch has one row: the check has training's rows."""
    engine = PlainEngine(initial(tmp_path / "m"))
    apart = engine.logits
    leaky = PlainEngine(tmp_path / "m", leaky=True)
    engine.logits = lambda batch, keep: (apart if len(batch.input_ids) == 1 else leaky.logits)(batch, keep)
    check_model(engine, VOCABULARY, micro_batch_size=1, packing=True, dtype="float32")
    with pytest.raises(DataError, match="packed samples see each other"):
        check_model(engine, VOCABULARY, micro_batch_size=2, packing=True, dtype="float32")


def test_a_model_that_writes_into_its_position_ids_is_refused(tmp_path):
    engine = PlainEngine(initial(tmp_path / "m"))
    logits = engine.logits

    def shifting(batch, keep):
        found = logits(batch, keep)
        torch.from_numpy(batch.position_ids).add_(1)
        return found

    engine.logits = shifting
    with pytest.raises(DataError, match="changes its position_ids in place"):
        check_model(engine, VOCABULARY, micro_batch_size=2, packing=False, dtype="float32")


def test_a_head_that_is_more_than_one_matrix_is_refused(tmp_path):
    """Gemma 2 bends its logits before the softmax: the loss of the plain head would be another one."""
    path = initial(tmp_path / "m", model_type="gemma2", num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    with pytest.raises(ConfigError, match=r"model\.attention: sdpa cannot be used"):
        PlainEngine(path)
    engine = PlainEngine(path, attention="eager")
    assert unsupported_head(engine.model.language_model) == "its logits are bent (final_logit_softcapping = 0.5)"
    with pytest.raises(DataError, match="is not the model's own"):
        check_model(engine, VOCABULARY, micro_batch_size=3, packing=False, dtype="float32")
