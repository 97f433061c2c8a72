"""Norms of the weights by layer. Every rank calls these together."""

from __future__ import annotations

import math
import re

import torch

from trainer import collectives
from trainer.engine.protocol import SavableEngine


def layer_of(parameter: str) -> str:
    """The layer of a parameter: its name up to the first number, e.g. model.layers.3; else the module that has it."""
    found = re.match(r"(.*?\.\d+)\.", parameter)
    return found.group(1) if found else parameter.rpartition(".")[0] or parameter


def layer_norms(engine: SavableEngine) -> dict[str, tuple[float, float]]:
    """L2 norms of each layer's master weights and of its moments over all ranks, in model order.

    One pass over what each rank owns. A norm is not finite when any element is not.
    """
    layers = list(dict.fromkeys(layer_of(name) for name, _ in engine.language_model.named_parameters()))
    squares = {layer: [0.0, 0.0] for layer in layers}
    with torch.no_grad():
        for piece in engine.owned_slices():
            for kind, tensor in piece.tensors.items():
                squares[layer_of(piece.name)][0 if kind == "master" else 1] += _norm(tensor) ** 2
    sums = collectives.add_up([value for layer in layers for value in squares[layer]])
    # The sum over ranks of squares beyond float64 is infinite, and so are the weights by then.
    roots = [math.sqrt(value) if value >= 0 else value for value in sums]
    return {layer: (roots[2 * index], roots[2 * index + 1]) for index, layer in enumerate(layers)}


def _norm(tensor: torch.Tensor) -> float:
    # Not in float64: that would copy the tensor, which a full GPU has no room for.
    norm = float(torch.linalg.vector_norm(tensor))
    if not math.isfinite(norm) and bool(torch.isfinite(tensor).all()):
        # Only the sum of squares is too large; the largest element tells the order of magnitude.
        norm = float(tensor.abs().max())
    return norm
