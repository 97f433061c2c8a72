"""Everything that reads what others wrote, given inputs that are almost right: one line and a code, never a traceback.

Ten thousand inputs a parser here, a million with `make soak`; an input that takes more than a second of processor time
is a failure too. A failure names the seed and the number of the input.
"""

import contextlib
import hashlib
import io
import json
import random
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import steadfast
from tests.support.commit_model import commit_step
from tests.support.mutate import mutated_bytes, mutated_value, survives
from trainer.checkpoint.slices import SliceReader
from trainer.checkpoint.verify import find_checkpoint, read_manifest, verify_checkpoint
from trainer.cli import run_command
from trainer.config.deepspeed import check_deepspeed
from trainer.config.load import config_from_text
from trainer.config.resume_law import check_allowed
from trainer.config.schema import Config
from trainer.config.words import keys
from trainer.data.encode.rendering import ChatTemplate
from trainer.data.encode.templates import DEFAULT_CHAT_TEMPLATE
from trainer.data.store import open_store
from trainer.data.store.reader import body_hash
from trainer.data.store.reader import manifest_text as stored_manifest_text
from trainer.model.load import stored_shapes
from trainer.tensor_file import TensorFile

ROOT = Path(__file__).resolve().parents[2]


# Inputs of each parser, here and in `make soak`.
counts = pytest.mark.parametrize(
    "count", [10_000, pytest.param(1_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(0)])]
)


@counts
def test_configuration(count, seed):
    seeds = [file.read_bytes() for file in sorted((ROOT / "configs").glob("*.yaml"))]
    outcomes = survives(
        count,
        seed,
        lambda generator: mutated_bytes(seeds, generator).decode("utf-8", "replace"),
        lambda text: config_from_text(text, "c.yaml"),
    )
    print(outcomes)
    assert outcomes["exit 2"] > count / 5


@counts
def test_overrides_and_names_of_keys(count, seed):
    text = (ROOT / "configs/tiny.yaml").read_text()
    seeds = [f"{key}={value}".encode() for key in keys(Config) for value in ("1", "[1, 2]", "{a: 1}", "null", "x")]

    def override(word: str) -> None:
        config_from_text(text, "c.yaml", [word])

    outcomes = survives(
        count, seed, lambda generator: mutated_bytes(seeds, generator).decode("utf-8", "surrogateescape"), override
    )
    assert outcomes["exit 2"] > count / 5
    assert survives(
        count // 10, seed, lambda generator: mutated_bytes(seeds, generator).decode("utf-8", "replace"),
        lambda word: check_allowed([word]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    """Module name to module; the work of every command but `config` is to do nothing."""
    found: dict[str, Any] = {}
    for module_name, _ in steadfast.COMMANDS.values():
        module = import_module(module_name)
        idle = SimpleNamespace(__doc__=module.__doc__, configure=module.configure, run=lambda arguments: 0)
        found[module_name] = module if module_name == "trainer.config.command" else idle
    return found


@counts
def test_words_of_the_command_line(count, seed, modules):
    """Every command's parser; `config` really runs."""
    known = [
        "config", "check", "show", "explain", "schema", str(ROOT / "configs/tiny.yaml"), "data.overlap", "--json",
        "--ranks", "2", "--device", "cuda", "train.max_steps=3", "--nproc", "--traceback", "--allow-change", "local",
        "--nodes", "-h", "--", "-", "@x", "run.dir=", "=", "--ranks=9", "--help", "", "x" * 300, *steadfast.COMMANDS,
    ]  # fmt: skip

    def words(generator: random.Random) -> list[str]:
        chosen = generator.choices(known, k=generator.randint(0, 6))
        if generator.random() < 0.7:
            chosen = [generator.choice(["config", *steadfast.COMMANDS]), *chosen]
        if generator.random() < 0.5 and chosen:
            at = generator.randrange(len(chosen))
            chosen[at] = mutated_bytes([chosen[at].encode()], generator).decode("utf-8", "surrogateescape")
        return chosen

    def run(given: list[str]) -> None:
        silence = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            code = run_command(steadfast.COMMANDS, modules.__getitem__, given)
        silence.seek(0)
        said = silence.read()
        assert code in (0, 2, 65, 66), f"exit {code}: {said}"
        assert "Traceback (most recent" not in said or "--traceback" in given

    outcomes = survives(count, seed, words, run, SystemExit)
    assert outcomes["accepted"] > count / 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    return commit_step(directory, 1, rank=0, world_size=1, exchange=lambda message: [message], elements=12)


def copied(checkpoint: Path, place: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    copy = place / checkpoint.name
    copy.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@counts
def test_manifest_of_a_checkpoint(count, seed, checkpoint, tmp_path):
    """Bytes as they come, and other values under a hash that fits: whoever made the checkpoint made the hash too."""
    copy = copied(checkpoint, tmp_path)
    content = (checkpoint / "MANIFEST.json").read_bytes()
    body = json.loads(content)
    del body["sha256_of_body"]

    def make(generator: random.Random) -> bytes:
        if generator.random() < 0.3:
            return mutated_bytes([content], generator)
        changed = mutated_value(body, generator)
        if not isinstance(changed, dict):
            return json.dumps(changed).encode()
        text = json.dumps(changed, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        spelt = json.dumps(
            {**changed, "sha256_of_body": hashlib.sha256(text).hexdigest()}, indent=1, ensure_ascii=False
        )
        return f"{spelt}\n".encode("utf-8", "surrogatepass")

    def load(given: bytes) -> None:
        (copy / "MANIFEST.json").write_bytes(given)
        read_manifest(copy)
        verify_checkpoint(copy)
        reader = SliceReader(find_checkpoint(copy))
        for name in reader.parameters:
            reader.read("master", name)

    outcomes = survives(count, seed, make, load)
    print(outcomes)
    assert outcomes["exit 74"] > count / 2


@counts
def test_header_of_a_tensor_file(count, seed, checkpoint, tmp_path):
    original = next(checkpoint.glob("rank-*")).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    file = tmp_path / "x.safetensors"

    def make(generator: random.Random) -> bytes:
        if generator.random() < 0.5:
            return mutated_bytes([original], generator)
        text = json.dumps(mutated_value(header, generator)).encode()
        return len(text).to_bytes(8, "little") + text + original[8 + length :]

    def read(given: bytes) -> None:
        file.write_bytes(given)
        opened = TensorFile(file)
        for name in opened.entries:
            opened.array(name)

    outcomes = survives(count, seed, make, read)
    assert outcomes["exit 65"] > count / 2


@counts
def test_index_of_weights(count, seed, checkpoint, tmp_path):
    names = ["model.safetensors", "other.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(next(checkpoint.glob("rank-*")).read_bytes())
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": names[0], "b": names[1]}}

    def make(generator: random.Random) -> bytes:
        if generator.random() < 0.5:
            return mutated_bytes([json.dumps(index).encode()], generator)
        return json.dumps(mutated_value(index, generator)).encode()

    def read(given: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(given)
        stored_shapes(tmp_path)

    outcomes = survives(count, seed, make, read)
    assert outcomes["exit 65"] > count / 5


@counts
def test_deepspeed_configuration(count, seed, tmp_path):
    seeds = [file.read_bytes() for file in sorted((ROOT / "configs/ds").glob("*.json"))]
    file = tmp_path / "ds.json"

    def make(generator: random.Random) -> bytes:
        if generator.random() < 0.5:
            return mutated_bytes(seeds, generator)
        return json.dumps(mutated_value(json.loads(generator.choice(seeds)), generator)).encode()

    def check(given: bytes) -> None:
        file.write_bytes(given)
        for problem in check_deepspeed(str(file), "cpu"):
            assert "\n" not in problem, problem

    survives(count, seed, make, check)


@counts
def test_manifest_of_a_store(count, seed, store, tmp_path):
    place = tmp_path / "store"
    place.symlink_to(store.path)
    manifest = json.loads(next(store.path.glob("manifest*.json")).read_bytes())

    def make(generator: random.Random) -> bytes:
        changed = mutated_value(manifest, generator)
        if isinstance(changed, dict):
            with contextlib.suppress(ValueError):
                changed["body_sha256"] = body_hash(changed)
                return stored_manifest_text(changed).encode()
        return json.dumps(changed).encode()

    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in store.path.iterdir():
        if not entry.name.startswith("manifest"):
            (copy / entry.name).symlink_to(entry)

    def read(given: bytes) -> None:
        (copy / next(store.path.glob("manifest*.json")).name).write_bytes(given)
        opened = open_store(str(copy))
        opened.plan()
        opened.document(0)

    survives(count, seed, make, read)


@counts
def test_chat_template(count, seed):
    """Compiled and rendered in the sandbox, within its limits; two seconds of its own are allowed before ours."""
    seeds = [DEFAULT_CHAT_TEMPLATE.encode(), b"{% for m in messages %}{{ m.role ~ ': ' ~ m.content * 3 }}{% endfor %}"]
    seeds.append(b"{% macro a(x) %}{{ x | upper | replace('a', 'b') }}{% endmacro %}{{ a(messages[0]['content']) }}")
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]

    def render(source: str) -> None:
        ChatTemplate(source, "the template", {"eos_token": "</s>"}).render(messages, None, "row 1")

    outcomes = survives(
        count, seed, lambda generator: mutated_bytes(seeds, generator).decode("utf-8", "replace"), render
    )
    assert outcomes["exit 65"] > count / 5
