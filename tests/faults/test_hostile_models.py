"""Models, tokenizers, stores and checkpoints made to do harm: no code runs, nothing outside is read or written."""

import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest

from trainer.checkpoint.verify import Manifest, manifest_text, read_manifest
from trainer.data.encode.tokenizer import load_tokenizer
from trainer.data.store.reader import _checked_manifest, body_hash
from trainer.data.store.reader import manifest_text as stored_manifest_text
from trainer.errors import CheckpointError, DataError, SteadfastError
from trainer.model.load import check_inventory, load_language_model, stored_shapes
from trainer.names import is_plain_name, is_plain_path


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path):
    """A file that harm would make."""
    yield tmp_path / "pwned"
    assert not (tmp_path / "pwned").exists(), "code of the model ran"


def remote_code(directory: Path, marker: Path) -> Path:
    """A model directory whose configuration asks for code that lies beside it."""
    directory.mkdir()
    (directory / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass C(PretrainedConfig):\n    model_type = 'evil'\nM = T = C\n"
    )
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    config = {"model_type": "evil", "auto_map": classes, "architectures": ["M"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes, "tokenizer_class": "T"}))
    return directory


def test_code_of_a_model_never_runs_nor_is_anybody_asked(tmp_path, marker, monkeypatch):
    from tools.model_directory import loading

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = remote_code(tmp_path / "m", marker)
    for load in (load_tokenizer, check_inventory, loading.load_tokenizer, loading.load_config):
        with pytest.raises(SteadfastError):
            load(path)
    for load in (loading._load_plain, lambda path, _: load_language_model(
        path, dtype="float32", attention="sdpa", gradient_checkpointing=False
    )):  # fmt: skip
        with pytest.raises((SteadfastError, ValueError)):
            load(path, "float32")


def test_weights_that_are_pickles_are_not_opened(tmp_path, marker):
    from tools.model_directory import loading

    path = tmp_path / "m"
    path.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": 8}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    for name in ("pytorch_model.bin", "model.safetensors", "adapter_model.bin", "tokenizer.pkl", "training_args.bin"):
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))
    for load in (check_inventory, loading.load_model):
        with pytest.raises(SteadfastError):
            load(path)
    (path / "model.safetensors").unlink()
    for load in (check_inventory, loading.load_model):
        with pytest.raises(SteadfastError):
            load(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (path / name).write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(SteadfastError):
            loading.load_model(path)


def hostile_names(count: int, seed: int) -> list[str]:
    """File names that would leave their directory, or surprise a shell or a terminal."""
    generator = random.Random(seed)
    parts = ["..", ".", "", "/", "//", "etc", "passwd", "~", "~root", "-rf", "C:", "\\", "\\..\\", "%2e%2e", "%2f", "a",
             "\0", "\n", "\x1b[2J", "$HOME", "`id`", "*", "..;", ".ssh", "．．",
             "‥", "COM1", "\u202e", "x" * 300]  # fmt: skip
    names = ["../x", "/etc/passwd", "a/../../x", "..\\x", "tokens/../../x", ".", "..", "", "a/..", "./x", "a//b", "-x"]
    while len(names) < count:
        name = generator.choice(["", "/", "tokens/", "model/"]) + "/".join(
            generator.choices(parts, k=generator.randint(1, 5))
        )
        if not all(part == "a" or part in ("etc", "passwd", "tokens", "model", "COM1") for part in name.split("/")):
            names.append(name)
    return names


def test_a_thousand_hostile_names_and_none_leaves_its_directory(tmp_path, store):
    """Through everything that takes a file's name from a file: index of weights, store and checkpoint manifests."""
    (tmp_path / "secret").write_text("outside")
    model = tmp_path / "model"
    model.mkdir()
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    stored = json.loads(next(store.path.glob("manifest*.json")).read_text())
    for name in hostile_names(1_000, 3):
        assert not is_plain_name(name)
        assert not is_plain_path(name)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(DataError, match="names the file"):
            stored_shapes(model)
        manifest = Manifest(1, 1, {name: {"bytes": 7, "xxh3_128": "0"}}, {}, {}, {}, {}, {})
        (checkpoint / "MANIFEST.json").write_text(manifest_text(manifest))
        with pytest.raises(CheckpointError, match="names a file outside"):
            read_manifest(checkpoint)
        changed = {**stored, "files": [{**stored["files"][-1], "name": name}]}
        changed["body_sha256"] = body_hash(changed)
        with pytest.raises(DataError, match="names the file"):
            _checked_manifest(stored_manifest_text(changed).encode(), "manifest.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model", "secret"]


def test_ordinary_names_pass():
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "rank-00000-of-00001.safetensors", "_x"):
        assert is_plain_name(name)
    assert is_plain_path("tokens/00000.safetensors")
    assert is_plain_path("tokenizer/chat_template.jinja")


def test_a_template_that_never_ends_is_stopped_where_prompts_are_made(tmp_path, store):
    from tools.model_directory.chat import Prompts

    tokenizer = load_tokenizer(store.tokenizer_path)
    for template in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 999999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="the chat template"):
            Prompts(tokenizer).ids([{"role": "user", "content": "hello"}])
