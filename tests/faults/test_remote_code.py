"""Models with code of their own: it runs when the command line pins exactly this code, and in no other case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.served import start
from tests.support.training import LLAMA, settings
from tools.blame import blame_step
from tools.export import export_checkpoint
from tools.quantize import quantize_model
from trainer.checkpoint.verify import find_checkpoint, read_manifest
from trainer.config.schema import Model
from trainer.errors import DataError, UsageError
from trainer.model.load import write_initial_model
from trainer.model.remote_code import checked_code, code_files, revision_of, trust_remote_code

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "tests.support.training:train"
CONFIGURATION = """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "steadfast_tiny"
    scale = 3.0
"""
MODEL = """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_tiny import TinyConfig

class TinyModel(LlamaModel):
    config_class = TinyConfig

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        return super().forward(inputs_embeds=self.embed_tokens(input_ids) * self.config.scale, **more)

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.post_init()
"""
CLASSES = {
    "AutoConfig": "configuration_tiny.TinyConfig",
    "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
}


def model_with_code(place: Path, vocabulary_size: int) -> Path:
    """A small model whose network is known to nobody but the two files beside its weights."""
    write_initial_model(Model(config=dict(LLAMA)), vocabulary_size, {}, 3, place)
    about = json.loads((place / "config.json").read_text())
    about |= {"model_type": "steadfast_tiny", "auto_map": CLASSES, "architectures": ["TinyForCausalLM"]}
    (place / "config.json").write_text(json.dumps(about))
    (place / "configuration_tiny.py").write_text(CONFIGURATION)
    (place / "modeling_tiny.py").write_text(MODEL)
    return place


@pytest.fixture
def model(tmp_path, store):
    return model_with_code(tmp_path / "model", store.vocabulary_size)


def test_trained_resumed_and_exported(model, tmp_path, two_ranks, store):
    run = tmp_path / "run"
    values = settings(run, store.path, train__max_steps=2)
    values["model"] |= {"config": None, "path": str(model)}
    revision = revision_of(code_files(model))
    assert two_ranks.run(TRAIN, values=values, trusted_code=revision) == [None, None]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["revision"] for event in events if event["event"] == "trust_remote_code"] == [revision]
    checkpoint = find_checkpoint(run)
    assert read_manifest(checkpoint).identity["code"] == revision
    with pytest.raises(UsageError, match=f"if you pass --trust-remote-code {revision}"):
        export_checkpoint(run, tmp_path / "out")
    report = export_checkpoint(run, tmp_path / "out", trusted_code=revision)
    assert report.logit_max_diff == pytest.approx(0, abs=1e-5), "the exported network is another one"
    assert code_files(tmp_path / "out") == code_files(model)
    with pytest.raises(UsageError, match=r"has code of its own, which llama\.cpp does not run; choose int8 or fp8"):
        quantize_model(tmp_path / "out", tmp_path / "int8", "gguf-f16", trusted_code=revision)
    with pytest.raises(UsageError, match=f"if you pass --trust-remote-code {revision}"):
        quantize_model(tmp_path / "out", tmp_path / "int8")
    smaller = quantize_model(tmp_path / "out", tmp_path / "int8", trusted_code=revision)
    assert smaller.quality.mean_kl < 1e-2
    assert code_files(tmp_path / "int8") == code_files(model)
    with pytest.raises(UsageError, match=f"if you pass --trust-remote-code {revision}"):
        blame_step(run, 1)
    assert blame_step(run, 1, trusted_code=revision).loss == pytest.approx(first_loss(run), abs=1e-5)
    server = start(tmp_path / "out", "--trust-remote-code", revision)
    assert server.about["engine"] == "embedded"
    server.process.terminate()
    server.process.communicate()

    # The same network, but other code: never behind the back of the checkpoint.
    (model / "modeling_tiny.py").write_text(MODEL + "\n# changed\n")
    changed = revision_of(code_files(model))
    more = values | {"train": values["train"] | {"max_steps": 3}}
    found = two_ranks.run(TRAIN, values=more, trusted_code=revision)
    assert all(error.startswith("2: ") and f"--trust-remote-code {changed}" in error for error in found)
    found = two_ranks.run(TRAIN, values=more, trusted_code=changed)
    assert all(error.startswith("76: ") and f"code: {revision} -> {changed}" in error for error in found)
    assert two_ranks.run(TRAIN, values=more, trusted_code=changed, allow_changes=["code"]) == [None, None]


def first_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["train/loss"])


def test_without_the_flag_no_process_is_started(model, tmp_path, store):
    (model / "modeling_tiny.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{MODEL}")
    config = tmp_path / "c.yaml"
    values = settings(tmp_path / "run", store.path)
    values["model"] |= {"config": None, "path": str(model)}
    config.write_text(yaml.safe_dump(values))
    revision = revision_of(code_files(model))
    for words in ([], ["--trust-remote-code", revision[:-1] + "x"]):
        done = subprocess.run(
            [sys.executable, ROOT / "steadfast.py", "train", config, *words],
            capture_output=True, text=True, env=os.environ | {"PYTHONVERBOSE": "1"},
        )  # fmt: skip
        assert done.returncode == 2
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "needs code of its own (configuration_tiny.py, modeling_tiny.py)" in error
        assert error.endswith(f"it will run with your rights if you pass --trust-remote-code {revision}")
        assert "import 'torch'" not in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_every_byte_and_name_counts(model):
    files = code_files(model)
    found = {
        revision_of(files),
        revision_of(files | {"modeling_tiny.py": files["modeling_tiny.py"] + b"\n"}),
        revision_of(files | {"more.py": b""}),
        revision_of({f"x{name}": content for name, content in files.items()}),
        revision_of({"a": b"bc"}),
        revision_of({"ab": b"c"}),
    }
    assert len(found) == 6


def test_what_is_refused_whatever_is_pinned(model, tmp_path):
    with pytest.raises(UsageError, match="a model from scratch needs no code"):
        checked_code(None, "sha256:0")
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"auto_map": {"AutoConfig": "them/theirs--m.C"}}))
    with pytest.raises(DataError, match="from another repository"):
        checked_code(model, revision_of(code_files(model)))
    (model / "config.json").write_text(json.dumps(about))
    (model / "modeling_tiny.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(DataError, match="ModuleNotFoundError: No module named 'a_package_that_is_not_there'"):
        trust_remote_code(model, revision_of(code_files(model)))
