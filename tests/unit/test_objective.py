"""Losses in chunks against torch on the whole matrix: value and gradients."""

import pytest
import torch
from torch.nn import functional

from trainer.objective import chunks
from trainer.objective.cross_entropy import summed_cross_entropy
from trainer.objective.distillation import Distillation, summed_distillation


@pytest.mark.parametrize("chunk_elements", [1 << 24, 7 * 50, 1])
def test_equals_the_whole_matrix(monkeypatch, chunk_elements):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk_elements)
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
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * 1000)
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


def taught(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of a teacher's logits, their log-probabilities and that of all others."""
    log_probabilities = (teacher.double() / temperature).log_softmax(dim=1)
    best, candidates = log_probabilities.topk(k, dim=1)
    rest = log_probabilities.scatter(1, candidates, -torch.inf).logsumexp(dim=1, keepdim=True)
    return candidates, torch.cat([best, rest], dim=1).float()


@pytest.mark.parametrize("chunk_elements", [1 << 24, 7 * 50])
@pytest.mark.parametrize(("k", "share", "temperature"), [(5, 0.7, 2.0), (1, 0.3, 1.0), (49, 1.0, 0.5)])
def test_distillation_is_its_formula(monkeypatch, chunk_elements, k, share, temperature):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    candidates, log_probabilities = taught(torch.randn(23, 50) * 3, k, temperature)
    loss = summed_distillation(hidden, weight, targets, candidates, log_probabilities, Distillation(share, temperature))
    found = torch.autograd.grad(loss * 0.37, (hidden, weight))

    logits = (hidden @ weight.T).double()
    student = (logits / temperature).softmax(dim=1)
    others = torch.ones_like(student).scatter(1, candidates, 0)
    classes = torch.cat([student.gather(1, candidates), (student * others).sum(dim=1, keepdim=True)], dim=1)
    apart = functional.kl_div(classes.log(), log_probabilities.double(), reduction="sum", log_target=True)
    reference = (1 - share) * functional.cross_entropy(logits, targets, reduction="sum")
    reference = reference + share * temperature**2 * apart
    expected = torch.autograd.grad(reference * 0.37, (hidden, weight))
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=0)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_with_all_but_one_token_it_is_the_divergence_over_the_vocabulary():
    torch.manual_seed(0)
    hidden, weight, teacher = torch.randn(9, 8), torch.randn(12, 8), torch.randn(9, 12)
    found = summed_distillation(
        hidden, weight, torch.zeros(9, dtype=torch.int64), *taught(teacher, 11, 1.0), Distillation(1.0, 1.0)
    )
    student = (hidden @ weight.T).log_softmax(dim=1)
    whole = functional.kl_div(student, teacher.log_softmax(dim=1), reduction="sum", log_target=True)
    torch.testing.assert_close(found, whole)


def test_a_teacher_that_is_the_student_pulls_nowhere_and_certain_ones_stay_finite():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(12, 8)
    targets = torch.zeros(9, dtype=torch.int64)
    loss = summed_distillation(
        hidden, weight, targets, *taught(hidden.detach() @ weight.T, 3, 2.0), Distillation(1.0, 2.0)
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert float(hidden.grad.abs().max()) < 1e-5

    sure = torch.full((9, 4), -60000.0)
    sure[:, 0] = 0
    steep = (hidden.detach() * 1e4).requires_grad_()
    candidates = torch.arange(3).expand(9, 3)
    loss = summed_distillation(steep, weight, targets, candidates, sure, Distillation(0.5, 1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(steep.grad).all()
