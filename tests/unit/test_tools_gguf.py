"""GGUF: what is asked of llama.cpp's programs and what becomes of what they say; for real where llama.cpp is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tools.quantize import quantize_model
from tools.quantizing.gguf import CONVERTER, QUANTIZER, Gguf
from tools.quantizing.texts import BUILT_IN_TEXTS
from trainer.errors import DataError, MissingInputError

CONVERTS = """
import pathlib, sys
out, kind = (sys.argv[sys.argv.index(option) + 1] for option in ("--outfile", "--outtype"))
pathlib.Path(out).write_text(kind)
"""
QUANTIZES = """#!/bin/sh
echo "llama_model_quantize_impl: WARNING: 14 of 20 tensor(s) required fallback quantization" >&2
echo "$(cat "$1") to $3" > "$2"
"""


def checkout(place: Path, converter: str = CONVERTS, quantizer: str = QUANTIZES) -> Path:
    """Programs in the places of llama.cpp's, built."""
    (place / "build/bin").mkdir(parents=True)
    (place / CONVERTER).write_text(converter)
    (place / "build/bin" / QUANTIZER).write_text(quantizer)
    (place / "build/bin" / QUANTIZER).chmod(0o755)
    return place


def made(tmp_path: Path, kind: str, llama_cpp: Path) -> dict[str, str]:
    """What lies in the directory afterwards."""
    (tmp_path / "out").mkdir()
    Gguf(tmp_path / "model", kind, llama_cpp, None).write(tmp_path / "out")
    return {file.name: file.read_text().strip() for file in (tmp_path / "out").iterdir()}


def test_the_quantizer_gets_16_bits_and_its_fallbacks_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert made(tmp_path, "q4_k_m", checkout(tmp_path / "l")) == {"model-q4_k_m.gguf": "f16 to Q4_K_M"}
    assert capfd.readouterr().err == "14 of 20 tensors keep more bits: q4_k_m needs rows of 256 numbers\n"


def test_eight_bits_need_no_quantizer(tmp_path: Path) -> None:
    llama_cpp = checkout(tmp_path / "l")
    shutil.rmtree(llama_cpp / "build")
    assert made(tmp_path, "q8_0", llama_cpp) == {"model-q8_0.gguf": "q8_0"}


def test_without_any_quantizer_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = checkout(tmp_path / "l", converter="raise SystemExit('converted')")
    shutil.rmtree(llama_cpp / "build")
    monkeypatch.setattr("tools.quantizing.gguf.can_load", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingInputError, match=r"build llama\.cpp, or pip install llama-cpp-python"):
        made(tmp_path, "q4_k_m", llama_cpp)


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"converter": "raise SystemExit('Model NoSuch is not supported')"}, f"{CONVERTER} ended with 1: Model NoSuch"),
        ({"quantizer": "#!/bin/sh\necho 'main: failed' >&2\nexit 3\n"}, f"{QUANTIZER} ended with 3: main: failed"),
        ({"quantizer": "#!/bin/sh\nkill -SEGV $$\n"}, f"{QUANTIZER} ended with -11: it said nothing"),
    ],
)
def test_a_program_that_fails_is_named(tmp_path: Path, programs: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        made(tmp_path, "q4_k_m", checkout(tmp_path / "l", **programs))


def test_q4_k_m_for_real(tmp_path: Path) -> None:
    """By llama-cpp-python alone: the checkout that $LLAMA_CPP names has nothing built."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if not (source := os.environ.get("LLAMA_CPP")):
        pytest.skip("$LLAMA_CPP names no checkout of llama.cpp")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # llama.cpp takes no tokenizer without merges.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=letters)
    backend.train_from_iterator(BUILT_IN_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    report = quantize_model(
        tmp_path / "model", tmp_path / "out", "gguf-q4_k_m", llama_cpp=Path(source), gguf_pre="gpt-2"
    )
    assert report.quality is not None
    assert report.quality.mean_kl < 0.05
    assert report.bytes_after < report.bytes_before / 3
