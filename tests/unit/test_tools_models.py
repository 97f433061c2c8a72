"""verify, diff, merge, sign and push: what is equal passes, and one changed byte or weight is named."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.exports import flip_a_byte
from tests.support.models import save_slice_checkpoint, save_tiny_model, tiny_model, tiny_tokenizer
from tools.diff import difference
from tools.export import export_checkpoint
from tools.merge import merge_models, recipe_of
from tools.push import push
from tools.verify import verify_model
from trainer.cli import run_command
from trainer.errors import CannotWriteError, DataError, MissingInputError, NotEqualError, UsageError

TOKENIZER = tiny_tokenizer()
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {name: (f"tools.{name}", "") for name in ("verify", "diff", "merge", "export")}
KEYS = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    save_slice_checkpoint(place / "run", tiny_model(TOKENIZER, seed=3), TOKENIZER)
    export_checkpoint(place / "run", place / "model", verify=False, max_shard_bytes=60_000)
    return place / "model"


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy that this test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def command(*words: object) -> int:
    return run_command(COMMANDS, importlib.import_module, [str(word) for word in words])


def change(model: Path, name: str, value: float) -> None:
    """Set one element of a weight of a model that has one file and no manifest."""
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[name].view(-1)[7] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def test_verify_passes_what_was_written_and_names_the_file_that_was_not(
    exported: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify_model(exported)
    assert (report.tensors, report.signed_by) == (21, None)
    assert report.files == len(list(exported.iterdir()))
    shard = sorted(model.glob("*.safetensors"))[1]
    flip_a_byte(shard)
    assert command("verify", model) == 65
    assert f"{shard.name} does not match its sha256" in capsys.readouterr().err
    assert command("verify", model.parent) == 66


def test_verify_sees_that_a_manifest_was_made_for_an_incomplete_model(model: Path) -> None:
    from tools.model_directory.writing import MANIFEST_NAME, describe, write_manifest

    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    write_manifest(model, {path.name: describe(path) for path in model.iterdir() if path.name != MANIFEST_NAME}, {})
    with pytest.raises(DataError, match=r"lacks model\.layers\.2\.\S+ and 8 more"):
        verify_model(model)


def test_a_manifest_that_names_a_file_outside_is_neither_verified_nor_pushed(model: Path, tmp_path: Path) -> None:
    from tools.model_directory.writing import describe, write_manifest

    (tmp_path / "secret").write_text("secret")
    write_manifest(model, {"../secret": describe(tmp_path / "secret")}, {})
    for work in (lambda: verify_model(model), lambda: push(model, f"memory://outside/{tmp_path.name}")):
        with pytest.raises(DataError, match=r"names the file '\.\./secret'"):
            work()


def test_diff_says_how_much_of_which_tensor_differs(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        save_tiny_model(tmp_path / name, seed=1)
    assert command("diff", tmp_path / "a", tmp_path / "b") == 0
    assert capsys.readouterr().out == "the same model: 21 of 21 common tensors are equal, 0 settings differ\n"
    before = float(safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")[KEYS].view(-1)[7])
    change(tmp_path / "b", KEYS, before + 0.5)
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    (tmp_path / "b" / "chat_template.jinja").write_text("another")
    found = difference(tmp_path / "a", tmp_path / "b")
    (tensor,) = found.different
    assert (tensor.name, tensor.what) == (KEYS, "values")
    elements = 16 * 32
    assert (tensor.max, tensor.mean, tensor.changed) == pytest.approx((0.5, 0.5 / elements, 1 / elements), rel=1e-4)
    assert found.settings == [
        "config.json: rms_norm_eps: 1e-06 -> 0.5",
        "chat_template.jinja: the contents differ",
    ]
    assert command("diff", tmp_path / "a", tmp_path / "b") == 1
    assert f"{KEYS}  values  max 5.000e-01" in capsys.readouterr().out


def test_diff_of_other_dtypes_shapes_names_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    for name in "ab":
        save_tiny_model(tmp_path / name, seed=1)
    path = tmp_path / "b" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    head = tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors[KEYS] = tensors[KEYS].bfloat16()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    safetensors.torch.save_file({**tensors, "new": head}, path, {"format": "pt"})
    found = {each.name: each for each in difference(tmp_path / "a", tmp_path / "b").different}
    assert found["lm_head.weight"].what == "only in A"
    assert found["new"].what == "only in B"
    assert found["model.norm.weight"].what == "shape (32,) -> (31,)"
    assert found[KEYS].what == "dtype F32 -> BF16"
    assert 0 < (found[KEYS].max or 0) < 0.01
    assert found["model.layers.0.mlp.up_proj.weight"].what == "not finite"
    assert len(found) == 5


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mergekit", reason="the extra 'merge' is not installed")
    place = tmp_path_factory.mktemp("relatives")
    for seed, name in enumerate(("base", "a", "b")):
        save_tiny_model(place / name, seed=seed)
    return place


def weight(model: Path, name: str = KEYS) -> torch.Tensor:
    return safetensors.torch.load_file(model / "model.safetensors")[name]


def test_merge_by_average_arc_and_ties_as_the_formulas_say(relatives: Path, tmp_path: Path) -> None:
    sources = [relatives / "a", relatives / "b"]
    base, a, b = (weight(relatives / name) for name in ("base", "a", "b"))
    merge_models(sources, tmp_path / "linear", recipe_of("linear", 2, [3.0, 1.0]))
    torch.testing.assert_close(weight(tmp_path / "linear"), 0.75 * a + 0.25 * b)
    merge_models(sources, tmp_path / "slerp", recipe_of("slerp", 2, t=0.25))
    angle = torch.acos((a * b).sum() / a.norm() / b.norm())
    arc = (torch.sin(0.75 * angle) * a + torch.sin(0.25 * angle) * b) / torch.sin(angle)
    torch.testing.assert_close(weight(tmp_path / "slerp"), arc)
    merge_models(
        sources, tmp_path / "ties", recipe_of("ties", 2, density=1.0, base=relatives / "base"), relatives / "base"
    )
    changes = torch.stack([a - base, b - base])
    agree = changes.sign() == torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    ties = base + (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(weight(tmp_path / "ties"), ties)
    for name in ("linear", "slerp", "ties"):
        assert verify_model(tmp_path / name).tensors == 21
    origin = json.loads((tmp_path / "ties" / "manifest.json").read_text())
    assert [each["name"] for each in origin["made_from"]] == ["a", "b", "base"]
    assert all(each["weights_sha256"] for each in origin["made_from"])


def test_what_does_not_fit_together_is_not_merged(relatives: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(relatives / "b", tmp_path / "other"))
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json differs between a, other"):
        merge_models([relatives / "a", other], tmp_path / "out", recipe_of("linear", 2))
    change(other, KEYS, torch.inf)
    with pytest.raises(DataError, match=r"k_proj\.weight holds values that are not finite"):
        merge_models([relatives / "a", other], tmp_path / "out", recipe_of("linear", 2))
    save_tiny_model(tmp_path / "tied", tied=True)
    with pytest.raises(DataError, match=r"lacks lm_head\.weight"):
        merge_models([relatives / "a", tmp_path / "tied"], tmp_path / "out", recipe_of("linear", 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "slerp", "--weights", "1", "1"], "slerp does not use --weights"),
        (["--method", "slerp", "--t", "2"], "--t 2 is not between"),
        (["--method", "linear", "--weights", "1"], "1 weights for 2 models"),
        (["--method", "linear", "--weights", "1", "-1"], "nothing to average"),
        (["--method", "ties"], "ties needs the model that the others were fine-tuned from"),
        (["--method", "ties", "--base", "b", "--density", "0"], "--density 0 keeps nothing"),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("merge", "a", "b", "-o", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err


def key_pair(place: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signature_names_the_file_that_got_one_byte_more(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra 'sign' is not installed")
    from tools.model_directory.signing import SIGNATURE_NAME, sign
    from tools.model_directory.writing import MANIFEST_NAME, describe, write_manifest

    private, public = key_pair(tmp_path, "ours")
    with pytest.raises(MissingInputError, match=r"has no model\.sig"):
        verify_model(model, public)
    sign(model, private)
    assert verify_model(model, public).signed_by == str(public)
    with pytest.raises(NotEqualError, match="is not what the owner of"):
        verify_model(model, key_pair(tmp_path, "theirs")[1])
    shard = sorted(model.glob("*.safetensors"))[0]
    with shard.open("ab") as stream:
        stream.write(b"\0")
    # Whoever changes a file can make its hash in the manifest right again.
    skipped = (MANIFEST_NAME, SIGNATURE_NAME)
    write_manifest(model, {path.name: describe(path) for path in model.iterdir() if path.name not in skipped}, {})
    with pytest.raises(NotEqualError, match=rf"Hash mismatch for .?{shard.name}"):
        verify_model(model, public)


def test_an_export_is_signed_before_it_gets_its_name(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra 'sign' is not installed")
    private, public = key_pair(tmp_path, "ours")
    run = exported.parent / "run"
    assert command("export", run, tmp_path / "out", "--no-verify", "--sign", private, "--max-shard-size", "60kB") == 0
    assert verify_model(tmp_path / "out", public).tensors == 21
    assert command("export", run, tmp_path / "out2", "--no-verify", "--sign", public) == 65
    assert not (tmp_path / "out2").exists()


def test_signing_without_the_extra_is_refused_before_the_work(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert command("export", exported.parent / "run", tmp_path / "out", "--sign", tmp_path / "key") == 2
    assert ".[sign]" in capsys.readouterr().err


class Recording(MemoryFileSystem):
    """Remembers the order of writing; fails when it is told to."""

    protocol = "recording"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []
        self.fails_at = ""

    def put_file(self, lpath, rpath, **options):
        if self.fails_at and rpath.endswith(self.fails_at):
            raise OSError("503 slow down")
        self.written.append(rpath.rpartition("/")[2])
        super().put_file(lpath, rpath, **options)


def test_a_copy_in_object_storage_has_its_manifest_last_or_none(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Recording()
    monkeypatch.setattr("trainer.remote.open_destination", lambda url, what: (store, "/models/tiny"))
    monkeypatch.setattr("trainer.remote.FIRST_PAUSE_SECONDS", 0.0)
    push(exported, "recording://models/tiny")
    names = {path.name for path in exported.iterdir()}
    assert set(store.written) == names
    assert store.written[-1] == "manifest.json"
    store.written.clear()
    push(exported, "recording://models/tiny")
    assert store.written == [], "a complete equal copy is left alone"
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    text = (other / "manifest.json").read_text()
    from tools.model_directory.writing import SELF_HASH, Entry, write_manifest

    files = {name: Entry(**entry) for name, entry in json.loads(text)["files"].items()}
    about = {key: value for key, value in json.loads(text).items() if key not in ("files", "format", SELF_HASH)}
    write_manifest(other, files, about | {"step": 101})
    store.fails_at = "tokenizer.json"
    with pytest.raises(CannotWriteError, match="503 slow down"):
        push(other, "recording://models/tiny")
    assert not store.exists("/models/tiny/manifest.json")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_export_is_pushed_through_fsspec(
    scheme: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://pushed/{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}/pushed"
    run = exported.parent / "run"
    assert command("export", run, tmp_path / "out", "--no-verify", "--push", url) == 0
    filesystem, root = fsspec.core.url_to_fs(url)
    back = tmp_path / "back"
    filesystem.get(root, str(back), recursive=True)
    assert difference(tmp_path / "out", back).equal
    assert verify_model(back).tensors == 21
    assert command("export", run, tmp_path / "out2", "--no-verify", "--push", "nowhere://x") == 2
    assert "--push: nowhere://x cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {"deepspeed", "ray", "datasets", "launch"}
        return None if absent else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv[1:], root = sys.argv[2:], sys.argv[1]
sys.path.insert(0, root)
from trainer.cli import run_command
from importlib import import_module
from importlib.util import find_spec
commands = {name: (f"tools.{name}", "") for name in ("export", "verify", "diff", "merge")}
run, out = sys.argv[1:]
assert run_command(commands, import_module, ["export", run, out, "--no-verify", "--traceback"]) == 0
assert run_command(commands, import_module, ["verify", out, "--traceback"]) == 0
assert run_command(commands, import_module, ["diff", out, out, "--traceback"]) == 0
if find_spec("mergekit"):
    words = ["merge", out, out, "-o", out + "-merged", "--method", "linear", "--traceback"]
    assert run_command(commands, import_module, words) == 0
training = {"trainer.loop", "trainer.assemble", "trainer.engine", "trainer.data.store", "trainer.checkpoint.saving"}
assert not training & set(sys.modules), training & set(sys.modules)
"""


def test_export_verify_and_diff_on_a_machine_without_deepspeed(exported: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT, ROOT, exported.parent / "run", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the same model" in done.stdout


def test_a_quantized_model_is_not_merged_or_compared(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "a")
    (tmp_path / "a" / "quantization.json").write_text("{}")
    with pytest.raises(UsageError, match="is quantized"):
        difference(tmp_path / "a", tmp_path / "a")
