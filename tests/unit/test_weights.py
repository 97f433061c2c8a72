"""Norms of weights: one pass, exact about what is a number."""

import math

import pytest
import torch

from trainer.observe.weights import _norm, layer_of


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_seen(bad):
    tensor = torch.ones(1000)
    tensor[517] = bad
    assert not math.isfinite(_norm(tensor))


def test_large_numbers_are_numbers():
    assert _norm(torch.tensor([3e38, -1e30])) == pytest.approx(3e38)
    assert _norm(torch.tensor([3.0, 4.0])) == 5.0


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("transformer.h.0.mlp.c_fc.bias", "transformer.h.0"),
        ("scale", "scale"),
    ],
)
def test_layers(parameter, layer):
    assert layer_of(parameter) == layer
