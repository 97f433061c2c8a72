"""The chunked cross entropy against torch's, value and gradients."""

import pytest
import torch
from torch.nn import functional

from trainer.objective import cross_entropy
from trainer.objective.cross_entropy import summed_cross_entropy


@pytest.mark.parametrize("chunk_elements", [1 << 24, 7 * 50, 1])
def test_equals_the_whole_matrix(monkeypatch, chunk_elements):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    loss = summed_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(loss * 0.37, (hidden, weight))
    reference = functional.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    expected = torch.autograd.grad(reference * 0.37, (hidden, weight))
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_no_position_gives_zero_and_zero_gradients():
    hidden, weight = torch.randn(0, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    loss = summed_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(weight.grad.abs().sum()) == 0.0


def test_the_whole_matrix_never_exists(monkeypatch):
    """Peak size of any logits tensor made on the way, watched through functional.linear."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * 1000)
    seen = []
    linear = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *a: seen.append(linear(*a)) or seen[-1])
    summed_cross_entropy(torch.randn(64, 8), torch.randn(1000, 8), torch.zeros(64, dtype=torch.int64))
    assert max(tensor.numel() for tensor in seen) <= 4 * 1000
    assert len(seen) == 16


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16), torch.randn(20, 16)
    targets = torch.randint(0, 20, (6,))
    exact = summed_cross_entropy(hidden, weight, targets)
    rough = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=2e-2)
