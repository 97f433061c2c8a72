"""Weight-only int8: each row (output channel) of a weight matrix is an int8 row times one fp32 scale.

For row w: scale = max|w| / 127, q = round(w / scale), so |w - scale * q| <= scale / 2. Activations keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

SCHEME = "int8"
KEPT = ("lm_head", "score", "classifier", "gate", "router", "shared_expert_gate")
"""Linear layers that stay as they are: heads, whose errors go straight into the logits, and routers, which choose."""
LARGEST = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values [out, in] and fp32 scales [out] of a floating-point `weight` [out, in]; rows of zeros get scale 1."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.round(rows / scale[:, None]).clamp_(-LARGEST, LARGEST).to(torch.int8)
    return values, scale


def quantized_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers of `model` that this scheme covers: all but heads and routers."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] not in KEPT
    ]


def replace_layers(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Put an int8 layer with empty weights in the place of each named linear layer (on that layer's device)."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, Int8Linear(getattr(parent, child)))


class Int8Linear(torch.nn.Module):
    """y = (x @ q^T) * scale + bias. The int8 matrix is widened for the duration of one product only."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device = layer.weight.device
        self.register_buffer("weight", torch.empty(layer.weight.shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(layer.out_features, dtype=torch.float32, device=device))
        self.bias = layer.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features [..., in] to [..., out] in the dtype of `features`; scales are applied in fp32."""
        # Scaling the product and not the matrix touches out numbers per token instead of out * in.
        product = torch.nn.functional.linear(features, self.weight.to(features.dtype)).float()
        result = (product * self.weight_scale).to(features.dtype)
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        """Shapes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(dtype)` of the whole model must not turn the scales into bfloat16.
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
