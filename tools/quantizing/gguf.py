"""GGUF for llama.cpp, by llama.cpp's own converter and quantizer from a checkout that the user names."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError, MissingInputError, UsageError

if TYPE_CHECKING:
    import torch

    from tools.quantizing.quality import Quality

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
_UNKNOWN_TOKENIZER = "BPE pre-tokenizer was not recognized"
# The converter knows tokenizers by a hash; of one that was trained for the model the user has to say which it is like.
_WITH_NAMED_TOKENIZER = """
import runpy, sys
from pathlib import Path
converter, name, *words = sys.argv[1:]
sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
try:
    from conversion.base import TextModel
except ImportError:
    import convert_hf_to_gguf as module
    TextModel = module.TextModel
else:
    import convert_hf_to_gguf as module
TextModel.get_vocab_base_pre = lambda self, tokenizer: name
sys.argv = [converter, *words]
module.main()
"""
# What llama-quantize does, by the same library.
_QUANTIZE_BY_LIBRARY = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))
"""


class Gguf:
    """Writes `model` (a directory) as OUT/NAME-SCHEME.gguf.

    Raises MissingInputError when the checkout has no converter, or no quantizer where one is needed.
    """

    def __init__(self, model: Path, kind: str, llama_cpp: Path | None, pre_tokenizer: str | None) -> None:
        if llama_cpp is None:
            raise UsageError("GGUF needs a checkout of llama.cpp", "git clone it, and name it: --llama-cpp DIR")
        self._model, self._kind, self._pre_tokenizer = model, kind, pre_tokenizer
        self._converter = llama_cpp / CONVERTER
        if not self._converter.is_file():
            raise MissingInputError(f"{llama_cpp} has no {CONVERTER}", "name a checkout of llama.cpp")
        self._quantizer = [] if kind in ("f16", "q8_0") else _quantizer_of(llama_cpp)
        self.expected_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))

    def write(self, building: Path) -> None:
        """The GGUF file, and nothing else."""
        out = building / f"{self._model.resolve().name}-{self._kind}.gguf"
        first = building / "f16.gguf" if self._quantizer else out
        words = [str(self._model.absolute()), "--outfile", str(first)]
        words += ["--outtype", "f16" if self._quantizer else self._kind]
        converter = str(self._converter.absolute())
        if self._pre_tokenizer is None:
            self._run(CONVERTER, [sys.executable, converter, *words])
        else:
            named = [sys.executable, "-c", _WITH_NAMED_TOKENIZER, converter, self._pre_tokenizer]
            self._run(CONVERTER, [*named, *words])
        if self._quantizer:
            said = self._run(QUANTIZER, [*self._quantizer, str(first), str(out), self._kind.upper()])
            if wider := re.search(r"(\d+ of \d+) tensor\(s\) required fallback", said):
                print(f"{wider[1]} tensors keep more bits: {self._kind} needs rows of 256 numbers", file=sys.stderr)
            first.unlink()

    def _run(self, program: str, command: list[str]) -> str:
        """What `command` said; DataError in the name of `program` when it failed."""
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
        )
        if not done.returncode:
            return done.stdout + done.stderr
        if _UNKNOWN_TOKENIZER in done.stdout + done.stderr:
            raise DataError(
                f"llama.cpp does not know how the tokenizer of {self._model} cuts words",
                "say which known one cuts alike, e.g. --gguf-pre gpt-2 for a ByteLevel tokenizer of your own",
            )
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["it said nothing"]
        raise DataError(f"{program} ended with {done.returncode}: {said[-1].strip()}", "is it a model llama.cpp knows?")


def can_load() -> bool:
    """Whether llama-cpp-python is installed here."""
    return importlib.util.find_spec("llama_cpp") is not None


def compare(model: Path, directory: Path, prompts: Sequence[Sequence[int]]) -> Quality:
    """How close the GGUF file in `directory` is to `model`, with llama-cpp-python.

    Raises DataError when llama.cpp cuts text into other tokens than the model's tokenizer: it would answer, worse, and
    nobody would know why.
    """
    import llama_cpp

    from tools.model_directory.loading import load_model
    from tools.quantizing.quality import MAX_PROMPT_TOKENS, quality

    # It keeps the logits of its whole context: no longer than it has to be.
    context = min(MAX_PROMPT_TOKENS, max(map(len, prompts), default=1))
    original, tokenizer = load_model(model, device="cpu")
    (file,) = directory.glob("*.gguf")
    try:
        loaded = llama_cpp.Llama(str(file), n_ctx=context, logits_all=True, verbose=False)
    except ValueError as error:
        raise DataError(
            f"llama.cpp does not load {file.name}", "its architecture or tokenizer is not known there"
        ) from error
    _same_tokens(tokenizer, loaded, model)
    return quality(original, _Logits(loaded), prompts)


class _Logits:
    """A model of llama.cpp, called like one of transformers."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def __call__(self, input_ids: torch.Tensor) -> Any:
        import torch

        ids = input_ids[0].tolist()
        self._loaded.reset()
        self._loaded.eval(ids)
        return SimpleNamespace(logits=torch.tensor(self._loaded.scores[: len(ids)])[None])


def _same_tokens(tokenizer: Any, loaded: Any, model: Path) -> None:
    from tools.model_directory.chat import Prompts
    from tools.quantizing.texts import BUILT_IN_TEXTS

    texts = list(BUILT_IN_TEXTS)
    if tokenizer.chat_template:
        texts.append(Prompts(tokenizer).text([{"role": "user", "content": BUILT_IN_TEXTS[1]}], prompt=True))
    for text in texts:
        ours = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        theirs = loaded.tokenize(text.encode(), add_bos=False, special=True)
        if ours != theirs:
            place = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), 0)
            raise DataError(
                f"llama.cpp cuts text into other tokens than the tokenizer of {model} (token {place} of {text!r:.40})",
                "this tokenizer cannot be served from GGUF; with --gguf-pre try another name",
            )


def _quantizer_of(llama_cpp: Path) -> list[str]:
    """How to start a program that takes a GGUF file, the one to make, and its kind."""
    built = llama_cpp / "build" / "bin" / QUANTIZER
    if found := str(built) if built.is_file() else shutil.which(QUANTIZER):
        return [found]
    if can_load():
        return [sys.executable, "-c", _QUANTIZE_BY_LIBRARY]
    raise MissingInputError(
        f"there is no {QUANTIZER} in {built.parent} or on PATH", "build llama.cpp, or pip install llama-cpp-python"
    )
