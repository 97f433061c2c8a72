"""int8: what it stores, what it loses, and that a broken or foreign artefact never answers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import save_tiny_model, tiny_model, tiny_tokenizer
from tools.model_directory.int8 import quantize_rows
from tools.model_directory.loading import load_model
from tools.model_directory.writing import parse_size
from tools.quantize import quantize_model
from tools.quantizing.quality import quality
from tools.quantizing.schemes import SCHEMES
from tools.quantizing.texts import encoded, ids_of, read_texts
from tools.verify import verify_model
from trainer.errors import CannotWriteError, DataError, MissingInputError, NotEqualError, SteadfastError, UsageError

CHAT = [[{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "plain text"]


def ids_of_chat() -> list[list[int]]:
    return [encoded(text, tiny_tokenizer()) for text in CHAT]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "export", seed=1)


@pytest.fixture(scope="module")
def artefact(export: Path) -> Path:
    quantize_model(export, export.parent / "int8", held_out=ids_of_chat())
    return export.parent / "int8"


def test_rows_are_off_by_half_a_scale_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 33, generator=generator) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(dim=1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    assert torch.all((weight - values * scale[:, None]).abs() <= scale[:, None] * 0.5001)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loaded_artefact_computes_what_the_dequantised_model_computes(tmp_path: Path, tied: bool) -> None:
    export = save_tiny_model(tmp_path / "export", seed=2, tied=tied)
    report = quantize_model(export, tmp_path / "int8", held_out=ids_of_chat())
    assert report.layers == 14
    assert report.bytes_after < report.bytes_before
    quantized, _ = load_model(tmp_path / "int8")
    reference = tiny_model(tiny_tokenizer(), seed=2, tied=tied)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            values, scale = quantize_rows(module.weight.data)
            module.weight.data = values * scale[:, None]
    # Rotary frequencies are in no file: they must have been computed, not left empty.
    assert torch.equal(quantized.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert (quantized.lm_head.weight is quantized.model.embed_tokens.weight) == tied
    ids = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (quantized(ids).logits - reference(ids).logits).abs().max()
    assert difference < 1e-4
    stored = load_file(tmp_path / "int8" / "model-int8.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    assert ("lm_head.weight" in stored) == (not tied)


def test_buffers_that_share_a_module_with_weights_leave_the_weights_alone(tmp_path: Path) -> None:
    """Gemma's embedding has a computed scale beside its weight, and rotary frequencies for each kind of layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        eos_token_id=3,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "export")
    tokenizer.save_pretrained(tmp_path / "export")
    report = quantize_model(tmp_path / "export", tmp_path / "int8")
    assert report.quality.max_kl < 1e-3
    plain, _ = load_model(tmp_path / "export")
    quantized, _ = load_model(tmp_path / "int8")
    assert torch.equal(plain.model.embed_tokens.weight, quantized.model.embed_tokens.weight)
    expected, found = dict(plain.named_buffers()), dict(quantized.named_buffers())
    assert len(expected) >= 5
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_bfloat16_export_keeps_its_dtype_in_the_file_and_runs_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_model(tiny_tokenizer(), seed=2).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "export", max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors.index.json").exists()
    quantize_model(tmp_path / "export", tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "model-int8.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    loaded, _ = load_model(tmp_path / "int8", device="cpu")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    narrow, _ = load_model(tmp_path / "int8", dtype="bfloat16", device="cpu")
    assert narrow.dtype == torch.bfloat16
    assert narrow.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    narrow = narrow.to(torch.bfloat16)
    assert narrow.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32


def test_the_numbers_say_what_was_lost(export: Path, tmp_path: Path) -> None:
    (export / "proof.json").write_text(json.dumps({"prompts": [[5, 6, 7, 8], [9, 10]]}))
    try:
        report = quantize_model(export, tmp_path / "int8", held_out=[encoded("abc", tiny_tokenizer())])
    finally:
        (export / "proof.json").unlink()
    assert report.prompts == 3
    assert report.quality.positions == 4 + 2 + 3
    assert 0 < report.quality.mean_kl <= report.quality.max_kl < 0.1
    assert report.quality.top1_agreement > 0.7
    about = json.loads((tmp_path / "int8" / "quality.json").read_text())
    assert about["mean_kl"] == report.quality.mean_kl
    assert not (tmp_path / "int8" / "proof.json").exists()


def test_plain_transformers_refuses_the_artefact(artefact: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(artefact)


def test_what_cannot_be_quantized_is_refused(export: Path, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantized already"):
        quantize_model(artefact, tmp_path / "out")
    with pytest.raises(CannotWriteError, match="exists already"):
        quantize_model(export, artefact)
    with pytest.raises(MissingInputError):
        quantize_model(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="int4"):
        quantize_model(export, tmp_path / "out", "int4")
    broken = Path(shutil.copytree(export, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][2, 2] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        quantize_model(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def change_tensors(directory: Path, change: str) -> None:
    file = directory / "model-int8.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    if change == "missing":
        del tensors[f"{name}_scale"]
    elif change == "unknown":
        tensors["model.extra.weight"] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:5].clone()
    (directory / "manifest.json").unlink()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 weights are missing, e.g. model\.layers\.0\.self_attn\.q_proj\.weight_scale"),
        ("unknown", r"model\.extra\.weight has no place"),
        ("shape", "does not load"),
    ],
)
def test_a_tampered_artefact_does_not_load(artefact: Path, tmp_path: Path, change: str, message: str) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    change_tensors(copy, change)
    with pytest.raises(DataError, match=message):
        load_model(copy)


def test_an_artefact_with_a_cut_file_is_noticed_before_anything_is_loaded(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    file = copy / "model-int8.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{file} has \d+ bytes where manifest\.json says"):
        load_model(copy)
    file.unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        load_model(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_with_a_cut_file_does_not_load_and_says_which_file(export: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SteadfastError, match=str(copy)):
        load_model(copy)


def test_a_plain_model_with_a_weight_missing_does_not_load(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        load_model(copy)


def test_texts_are_read_from_rows_and_paragraphs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert read_texts(rows) == ["a", [{"role": "user", "content": "b"}]]
    plain = tmp_path / "plain.txt"
    plain.write_text("one\nline\n\n\ntwo\n")
    assert read_texts(plain) == ["one\nline", "two"]
    rows.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match="row 2"):
        read_texts(rows)
    with pytest.raises(MissingInputError):
        read_texts(tmp_path / "none.jsonl")


def test_sizes_are_parsed() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 << 19
    assert parse_size("40000") == 40000
    for text in ("", "GB", "5XB", "-1GB", "0"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_a_scheme_says_what_it_lacks(export: Path, tmp_path: Path) -> None:
    for scheme, options, said in (
        ("w4a16-gptq", {}, "w4a16-gptq is calibrated on rows like those of training; give some: --calibrate STORE"),
        ("gguf-q8_0", {}, "GGUF needs a checkout of llama.cpp"),
        ("gguf-f16", {"llama_cpp": tmp_path, "max_kl": 1.0}, "has no convert_hf_to_gguf.py"),
        ("w2", {}, "there is no scheme 'w2'"),
        ("w4a16-rtn", {}, "self_attn.q_proj has 32 inputs, which the groups of 128 weights of w4a16-rtn do not"),
        ("fp8", {"environment": tmp_path}, "is no environment of Python; make one: python3 -m venv"),
    ):
        with pytest.raises(SteadfastError) as error:
            quantize_model(export, tmp_path / "out", scheme, **options)
        assert said in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_model_that_lost_too_much_is_not_kept(export: Path, tmp_path: Path) -> None:
    lost = quantize_model(export, tmp_path / "kept", held_out=ids_of_chat(), max_kl=1.0).quality
    assert lost is not None
    assert 0 < lost.mean_kl <= lost.p99_kl <= lost.max_kl
    about = json.loads((tmp_path / "kept/quality.json").read_text())
    assert (about["allowed_mean_kl"], about["max_kl"]) == (1.0, lost.max_kl)
    assert lost.perplexity_before == pytest.approx(lost.perplexity_after, rel=0.05)
    with pytest.raises(NotEqualError, match="where 1e-12 is allowed"):
        quantize_model(export, tmp_path / "lost", held_out=ids_of_chat(), max_kl=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_quality_is_that_of_the_formulas(export: Path) -> None:
    """Against itself a model loses nothing; against another one the sums are those of torch, position by position."""
    first, _ = load_model(export)
    other = tiny_model(tiny_tokenizer(), seed=9)
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    same = quality(first, first, rows)
    assert (same.top1_agreement, same.max_kl) == (1.0, 0.0)
    assert same.perplexity_before == same.perplexity_after
    found = quality(first, other, rows)
    divergences, losses = [], 0.0
    with torch.no_grad():
        for row in rows:
            one, two = (torch.log_softmax(model(torch.tensor([row])).logits[0], -1) for model in (first, other))
            divergences += torch.nn.functional.kl_div(two, one, log_target=True, reduction="none").sum(-1).tolist()
            losses -= sum(float(two[place, token]) for place, token in enumerate(row[1:]))
    assert found.mean_kl == pytest.approx(sum(divergences) / 7, rel=1e-5)
    assert found.max_kl == pytest.approx(max(divergences), rel=1e-5)
    assert found.perplexity_after == pytest.approx(math.exp(losses / 5), rel=1e-5)


def test_rows_of_a_store_are_its_documents(store, tmp_path: Path) -> None:
    from trainer.data.encode.tokenizer import load_tokenizer

    rows = ids_of(store.path, load_tokenizer(store.tokenizer_path), 5)
    chosen = [number * store.n_documents // 5 for number in range(5)]
    assert rows == [store.document(number)[0].tolist() for number in chosen]
    with pytest.raises(DataError, match="another tokenizer"):
        ids_of(store.path, tiny_tokenizer(), 5)


def test_an_environment_that_cannot_be_made_leaves_nothing(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MissingInputError, match=r"could not be installed .* --environment: python3 -m venv DIR"):
        quantize_model(export, tmp_path / "out", "fp8")
    assert [path.suffix for path in (tmp_path / "cache/steadfast").iterdir()] == [".lock"]
    assert not (tmp_path / "out").exists()


def save_wide_model(directory: Path) -> Path:
    """Wide enough for groups of 128 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.1)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheme", [name for name, each in SCHEMES.items() if each.maker == "llm-compressor"])
def test_what_llm_compressor_makes_is_close_and_loads(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment of the user's cache, which the first of these makes: gigabytes from the package index."""
    if SCHEMES[scheme].needs_gpu and not torch.cuda.is_available():
        pytest.skip("no GPU")
    rows = [[4 + (7 * row + place) % 250 for place in range(48)] for row in range(32)]
    save_wide_model(tmp_path / "export")
    monkeypatch.chdir(tmp_path)  # names as people type them: the environment's process works elsewhere
    report = quantize_model(Path("export"), Path("out"), scheme, rows[:8], calibration=rows)
    assert report.quality is not None
    # Of random weights half are as large as any other: without them a model is another one.
    assert report.quality.mean_kl < (5.0 if scheme.startswith("sparse24") else 0.2)
    config = json.loads((tmp_path / "out/config.json").read_text())
    if not scheme.startswith("sparse24"):
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert config["quantization_config"]["ignore"] == ["lm_head"]
        return
    weight = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_what_others_read_is_verified_too(artefact: Path, tmp_path: Path) -> None:
    """A model whose tensors are not those of its architecture: of compressed-tensors, or none but a GGUF file."""
    from tools.model_directory.writing import describe, new_directory, write_manifest

    with new_directory(tmp_path / "gguf", 0) as building:
        (building / "model.gguf").write_bytes(b"GGUF")
        shutil.copyfile(artefact / "config.json", building / "config.json")
        entries = {path.name: describe(path) for path in building.iterdir()}
        write_manifest(building, entries, {"kind": "quantized model", "scheme": "gguf-q8_0"})
    for path, files in ((tmp_path / "gguf", 3), (artefact, len(list(artefact.iterdir())))):
        report = verify_model(path)
        assert (report.files, report.tensors) == (files, None)
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUX")
    with pytest.raises(DataError, match=r"model\.gguf does not match its sha256"):
        verify_model(tmp_path / "gguf")


def test_other_token_ids_than_the_tokenizers_are_refused(export: Path) -> None:
    from types import SimpleNamespace

    from tools.quantizing.gguf import _same_tokens

    tokenizer = tiny_tokenizer()

    def same(text: bytes, **_: bool) -> list[int]:
        return [int(token) for token in tokenizer(text.decode(), add_special_tokens=False)["input_ids"]]

    _same_tokens(tokenizer, SimpleNamespace(tokenize=same), export)
    with pytest.raises(DataError, match=r"llama.cpp cuts text into other tokens .* \(token 0 of 'The quick"):
        _same_tokens(tokenizer, SimpleNamespace(tokenize=lambda text, **more: [5, *same(text)]), export)
