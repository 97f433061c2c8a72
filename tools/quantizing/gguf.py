"""GGUF for llama.cpp, by llama.cpp's own converter and quantizer from a checkout that the user names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.errors import DataError, MissingInputError, UsageError

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
        self._quantizer = "" if kind in ("f16", "q8_0") else _quantizer_of(llama_cpp)
        self.expected_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))

    def write(self, building: Path) -> None:
        """The GGUF file, and nothing else."""
        out = building / f"{self._model.resolve().name}-{self._kind}.gguf"
        first = building / "f16.gguf" if self._quantizer else out
        words = [str(self._model.absolute()), "--outfile", str(first)]
        words += ["--outtype", "f16" if self._quantizer else self._kind]
        converter = str(self._converter.absolute())
        if self._pre_tokenizer is None:
            self._run([sys.executable, converter, *words])
        else:
            self._run([sys.executable, "-c", _WITH_NAMED_TOKENIZER, converter, self._pre_tokenizer, *words])
        if self._quantizer:
            self._run([self._quantizer, str(first), str(out), self._kind.upper()])
            first.unlink()

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
        )
        if not done.returncode:
            return
        if _UNKNOWN_TOKENIZER in done.stdout + done.stderr:
            raise DataError(
                f"llama.cpp does not know how the tokenizer of {self._model} cuts words",
                "say which known one cuts alike, e.g. --gguf-pre gpt-2 for a ByteLevel tokenizer of your own",
            )
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["it said nothing"]
        raise DataError(f"{Path(command[-1] if command[0] != sys.executable else CONVERTER).name}: {said[-1]}")


def _quantizer_of(llama_cpp: Path) -> str:
    built = llama_cpp / "build" / "bin" / QUANTIZER
    found = str(built) if built.is_file() else shutil.which(QUANTIZER)
    if found is None:
        raise MissingInputError(f"there is no {QUANTIZER} in {built.parent} or on PATH", "build llama.cpp")
    return found
