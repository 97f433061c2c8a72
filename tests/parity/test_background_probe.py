"""A save in the background is proved by what training computed next: the logits are those of the weights it holds."""

import numpy as np
import pytest
from torch import nn
from transformers import LlamaConfig

from tests.support.training import settings
from tools.export import export_checkpoint
from trainer.checkpoint.slices import SliceReader
from trainer.checkpoint.verify import step_directory
from trainer.engine.deepspeed_engine import has_dropout
from trainer.tensor_file import TensorFile

TRAIN = "tests.support.training:train"


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_checkpoint_of_the_middle_is_the_live_model_to_the_last_digits(stage, tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(
        run, store.path, engine__deepspeed=stage, checkpoint__every_steps=3, checkpoint__keep=3,
        optimizer__learning_rate=0.1,
    )  # fmt: skip
    assert two_ranks.run(TRAIN, values=values) == [None, None]
    middle, last = (step_directory(run / "checkpoints", step) for step in (3, 6))
    probe = TensorFile(middle / "probe.safetensors")
    assert probe.array("logits").shape[:2] == probe.array("input_ids").shape == (1, 8)
    assert TensorFile(last / "probe.safetensors").array("input_ids").shape[0] > 1
    report = export_checkpoint(middle, tmp_path / "out")
    assert report.logit_max_diff == pytest.approx(0, abs=2e-5)
    # At this learning rate one step more would be seen.
    weights = [SliceReader(place).read("master", "model.norm.weight") for place in (middle, last)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-2


@pytest.mark.parametrize(("rate", "layers", "found"), [(0.0, 0.0, False), (0.1, 0.0, True), (0.0, 0.1, True)])
def test_dropout_is_noticed(rate, layers, found):
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(layers))
    network.config = LlamaConfig(attention_dropout=rate)
    assert has_dropout(network) is found
