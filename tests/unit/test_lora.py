"""LoRA: what is adapted, where it starts, what is refused, and how the base is recognised."""

import json
import os
import shutil

import pytest
import torch

from tests.support.models import tiny_model, tiny_tokenizer
from trainer.adapter_file import AdapterConfig, adapted_modules, read_adapter_config
from trainer.config.load import config_from_text
from trainer.config.schema import Lora
from trainer.errors import ConfigError, DataError
from trainer.model.load import trainable_share
from trainer.model.lora import adapter_config, add_adapters
from trainer.weight_files import weights_fingerprint

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CONFIG = "run: {dir: r}\nmodel: {path: m}\ndata: {train: s}\ntrain: {max_steps: 1}\n"


@pytest.fixture
def network():
    return tiny_model(tiny_tokenizer(), seed=1)


def test_all_linear_is_every_linear_map_but_the_head_and_the_model_stays_the_base(network):
    ids = torch.arange(12)[None]
    before, names = network(ids).logits, [name for name, _ in network.named_parameters()]
    targets = add_adapters(network, Lora(rank=4), seed=1)
    assert {name.rpartition(".")[2] for name in targets} == LINEAR
    assert len(targets) == 14
    assert torch.equal(network(ids).logits, before)
    adapter = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert adapted_modules(adapter) == targets
    assert set(names) == {name for name, _ in network.named_parameters()} - set(adapter)
    per_layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert trainable_share(network)[0] == 2 * per_layer
    assert set(adapter_config(Lora(), "base", targets).targets) == LINEAR


def test_first_weights_depend_on_seed_and_name_only(network):
    state = torch.get_rng_state()
    add_adapters(network, Lora(targets=["q_proj"]), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    other = tiny_model(tiny_tokenizer(), seed=9)
    add_adapters(other, Lora(), seed=1)
    first, second = (model.model.layers[1].self_attn.q_proj.lora_A.weight for model in (network, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, network.model.layers[0].self_attn.q_proj.lora_A.weight)
    assert first.abs().max() <= 32**-0.5
    assert float(first.detach().std()) == pytest.approx((3 * 32) ** -0.5, rel=0.1)


def test_targets_are_ends_of_names(network):
    targets = add_adapters(network, Lora(targets=["layers.0.self_attn.v_proj", "down_proj"]), seed=1)
    assert targets == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_targets_that_are_no_linear_map_or_the_head_are_refused_together(network):
    with pytest.raises(ConfigError) as refused:
        add_adapters(network, Lora(targets=["q_prj", "lm_head", "norm"]), seed=1)
    assert refused.value.problems == [
        f"model.lora.targets: 'q_prj' is no linear map; there are {', '.join(sorted(LINEAR))}",
        "model.lora.targets: 'lm_head' is the head, which cannot be adapted; leave it out",
        f"model.lora.targets: 'norm' is no linear map; there are {', '.join(sorted(LINEAR))}",
    ]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_learning_rate_is_that_of_lora_unless_it_is_given():
    assert config_from_text(CONFIG, "c", ["model.lora={}"]).optimizer.learning_rate == 2e-4
    assert config_from_text(CONFIG, "c", ["model.lora.rank=8", "optimizer.beta1=0.8"]).optimizer.learning_rate == 2e-4
    assert (
        config_from_text(CONFIG, "c", ["model.lora={}", "optimizer.learning_rate=1e-5"]).optimizer.learning_rate == 1e-5
    )
    assert config_from_text(CONFIG, "c", ["model.lora=null"]).optimizer.learning_rate == 1e-5


def test_mistakes_in_the_block_are_named():
    with pytest.raises(ConfigError) as refused:
        config_from_text(CONFIG, "c", ["model.lora.ranc=8", "model.lora.targets=all", "model.lora.dropout=1"])
    assert refused.value.problems == [
        "override 'model.lora.dropout=1': model.lora.dropout: input should be less than 1 (got 1)",
        "override 'model.lora.targets=all': model.lora.targets should be all-linear or a list of names, "
        "e.g. [q_proj, v_proj]",
        "override 'model.lora.ranc=8': unknown key 'model.lora.ranc'; did you mean 'model.lora.rank'?",
    ]
    with pytest.raises(ConfigError, match=r"give model\.lora or model\.trainable, not both"):
        config_from_text(CONFIG, "c", ["model.lora={}", "model.trainable=['*']"])


def test_the_configuration_of_an_adapter_reads_back(tmp_path):
    assert read_adapter_config(tmp_path) is None
    written = AdapterConfig("/models/base", 8, 16.0, 0.1, ("k_proj", "q_proj"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(written.as_json()))
    assert read_adapter_config(tmp_path) == written
    assert written.scale == 2
    (tmp_path / "adapter_config.json").write_text('{"r": "many"}')
    with pytest.raises(DataError, match=r"adapter_config\.json is not readable"):
        read_adapter_config(tmp_path)


def test_a_base_is_known_by_its_content_and_read_again_only_when_it_was_touched(tmp_path, network):
    network.save_pretrained(tmp_path / "base")
    file, remembered = tmp_path / "base/model.safetensors", tmp_path / "base-model.json"
    found = weights_fingerprint(tmp_path / "base", remembered)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    assert weights_fingerprint(tmp_path / "copy") == found
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_fingerprint(tmp_path / "base", remembered) == found, "equal size and time: not read again"
    os.utime(file)
    assert weights_fingerprint(tmp_path / "base", remembered) != found
    remembered.write_text("[]")
    assert weights_fingerprint(tmp_path / "copy", remembered) == found
