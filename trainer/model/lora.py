"""LoRA: chosen linear maps stay frozen, and beside each a product of two thin matrices is trained (arXiv:2106.09685).

Own code and not peft: peft renames every parameter it wraps, so all that compares names with the base's files would
need a second vocabulary; it draws first weights from the global generator; and it brings accelerate along. What is
needed here is one module. The files are peft's (`trainer.adapter_file`), and tests load them with peft.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.adapter_file import AdapterConfig
from trainer.config.schema import Lora
from trainer.errors import ConfigError

ALL_LINEAR = "all-linear"


class LoraLinear(nn.Module):
    """x -> W x + bias + alpha / rank * B A dropout(x): W and bias are those of `frozen`, under the names they had."""

    def __init__(self, frozen: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.weight, self.bias = frozen.weight, frozen.bias
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.scale = lora.alpha / lora.rank
        self.dropout = nn.Dropout(lora.dropout)
        self.lora_A = _unset_linear(self.in_features, lora.rank, frozen.weight)
        self.lora_B = _unset_linear(lora.rank, self.out_features, frozen.weight)

    def reset(self, seed: int, name: str) -> None:
        """A is uniform within 1 / sqrt(inputs), drawn from seed and name; B is zero, so the model is the base's."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of the weights."""
        thin: Tensor = self.lora_B(self.lora_A(self.dropout(inputs)))
        return functional.linear(inputs, self.weight, self.bias) + thin * self.scale


def add_adapters(network: Any, lora: Lora, seed: int) -> list[str]:
    """Freeze `network`, put an adapter beside every target and return the targets' names, in model order.

    Before the network is given to DeepSpeed; its weights may be sharded already. The first weights depend on `seed` and
    the names only, never on ranks. Raises ConfigError for a target that is no linear map, or that is the head.
    """
    targets = target_modules(network, lora)
    network.requires_grad_(False)
    for name in targets:
        adapted = LoraLinear(network.get_submodule(name), lora)
        adapted.reset(seed, name)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, adapted)
    return targets


def target_modules(network: Any, lora: Lora) -> list[str]:
    """Names of the modules that get an adapter, in model order.

    The head gets none: its weight may be the embeddings', and the loss multiplies by that weight itself.
    """
    head = network.get_output_embeddings()
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    if lora.targets == ALL_LINEAR:
        found = [name for name, module in linear.items() if module is not head]
        if not found:
            raise ConfigError([f"model.lora: {type(network).__name__} has no linear maps to adapt (torch.nn.Linear)"])
        return found
    problems = []
    for target in lora.targets:
        matched = [name for name in linear if _matches(name, target)]
        if not matched:
            leaves = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head})
            problems.append(f"model.lora.targets: {target!r} is no linear map; there are {', '.join(leaves)}")
        elif any(linear[name] is head for name in matched):
            problems.append(f"model.lora.targets: {target!r} is the head, which cannot be adapted; leave it out")
    if problems:
        raise ConfigError(problems)
    return [name for name in linear if any(_matches(name, target) for target in lora.targets)]


def adapter_config(lora: Lora, base: str, targets: list[str]) -> AdapterConfig:
    """What adapter_config.json says of an adapter beside the modules `targets`."""
    names = {name.rpartition(".")[2] for name in targets} if lora.targets == ALL_LINEAR else set(lora.targets)
    return AdapterConfig(base, lora.rank, lora.alpha, lora.dropout, tuple(sorted(names)))


def _unset_linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    # By way of the meta device, where nothing is drawn: that would move the global generator.
    return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=like.dtype).to_empty(device=like.device)


def _matches(name: str, target: str) -> bool:
    # As peft reads target_modules.
    return name == target or name.endswith(f".{target}")
