"""What `steadfast quantize` can make. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Maker = Literal["embedded", "llm-compressor", "llama.cpp"]


@dataclass(frozen=True)
class Scheme:
    """One way of making a model smaller."""

    maker: Maker
    meaning: str
    calibrated: bool = False
    """Whether it needs rows to calibrate on."""
    needs_gpu: bool = False
    """Whether llm-compressor makes it on a GPU only: it pins memory for one."""


SCHEMES = {
    "int8": Scheme("embedded", "int8 weights, for steadfast serve and eval; needs nothing else"),
    "w8a8": Scheme("llm-compressor", "int8 weights and activations (SmoothQuant, GPTQ)", calibrated=True),
    "w4a16-rtn": Scheme("llm-compressor", "4-bit weights, rounded to nearest"),
    "w4a16-gptq": Scheme("llm-compressor", "4-bit weights, GPTQ", calibrated=True),
    "w4a16-awq": Scheme("llm-compressor", "4-bit weights, AWQ; made on a GPU only", calibrated=True, needs_gpu=True),
    "fp8": Scheme("llm-compressor", "float8 weights and activations, scales per token"),
    "sparse24-magnitude": Scheme("llm-compressor", "two of four weights zero: the smallest"),
    "sparse24-wanda": Scheme("llm-compressor", "two of four weights zero, Wanda", calibrated=True),
    "sparse24-sparsegpt": Scheme("llm-compressor", "two of four weights zero, SparseGPT", calibrated=True),
    "gguf-f16": Scheme("llama.cpp", "GGUF, 16 bits"),
    "gguf-q8_0": Scheme("llama.cpp", "GGUF, 8 bits"),
    "gguf-q4_k_m": Scheme("llama.cpp", "GGUF, 4 bits"),
}
