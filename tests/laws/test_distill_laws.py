"""Identities of the coarsened KL: never negative, 0 for equals, the full KL for K = V, below it for K < V, and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.core import distill
from dyn.core.distill import distillation_loss, divergence, top_logp

seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(2, 12), st.integers(1, 12)).map(lambda vk: (vk[0], min(vk)))  # V, K
spreads = st.sampled_from([0.1, 1.0, 10.0, 60.0])


def logits(seed, vocabulary, spread=1.0):
    return spread * torch.randn(2, 3, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(teacher, student):
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@settings(max_examples=100, deadline=None)
@given(sizes, spreads, seeds)
def test_between_zero_and_the_full_divergence(size, spread, seed):
    vocabulary, k = size
    teacher, student = logits(seed, vocabulary, spread), logits(seed + 1, vocabulary, spread)
    loss = distillation_loss(student, *top_logp(teacher, k))
    assert -1e-9 <= loss.item() <= full(teacher, student).item() + 1e-9


@settings(max_examples=100, deadline=None)
@given(sizes, spreads, seeds, st.floats(-50, 50))
def test_equal_networks_have_none_and_no_gradient(size, spread, seed, shift):
    vocabulary, k = size
    teacher = logits(seed, vocabulary, spread)
    student = (teacher + shift).requires_grad_()
    loss = distillation_loss(student, *top_logp(teacher, k))
    loss.backward()
    assert abs(loss.item()) < 1e-9 and student.grad.abs().max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), spreads, seeds)
def test_all_entries_kept_is_the_full_divergence(vocabulary, spread, seed):
    teacher, student = logits(seed, vocabulary, spread), logits(seed + 1, vocabulary, spread)
    torch.testing.assert_close(distillation_loss(student, *top_logp(teacher, vocabulary)), full(teacher, student), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds)
def test_more_kept_entries_tell_more(size, seed):
    vocabulary, _ = size
    teacher, student = logits(seed, vocabulary), logits(seed + 1, vocabulary)
    losses = [distillation_loss(student, *top_logp(teacher, k)).item() for k in range(1, vocabulary + 1)]
    assert all(a <= b + 1e-12 for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("k", [1, 3, 6, 7])
@pytest.mark.parametrize("chunk", [1 << 25, 14])
def test_gradient(k, chunk, monkeypatch):
    """Also where the rows are cut into chunks."""
    monkeypatch.setattr(distill, "CHUNK_VALUES", chunk)
    teacher, student = logits(0, 7), logits(1, 7).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    ids, logp = top_logp(teacher, k)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, ids, logp, mask), (student,))
    (grad,) = torch.autograd.grad(distillation_loss(student, ids, logp, mask), student)
    assert torch.all(grad[~mask] == 0) and grad.sum(-1).abs().max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(sizes, spreads, seeds)
def test_the_gradient_by_hand_is_autograd_s(size, spread, seed):
    vocabulary, k = size
    teacher, student = logits(seed, vocabulary, spread), logits(seed + 1, vocabulary, spread).requires_grad_()
    ids, logp = top_logp(teacher, k)
    (grad,) = torch.autograd.grad(distillation_loss(student, ids, logp), student)
    reference = divergence(student.flatten(0, 1), ids.flatten(0, 1), logp.flatten(0, 1))[0].mean()
    torch.testing.assert_close(grad, torch.autograd.grad(reference, student)[0], rtol=1e-8, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_rest_moves_as_one(seed):
    """The gradient is q - p for kept entries; the rest shares what is left over in the student's own proportions."""
    teacher, student = logits(seed, 9, 3.0), logits(seed + 1, 9, 3.0).requires_grad_()
    ids, logp = top_logp(teacher, 4)
    (grad,) = torch.autograd.grad(distillation_loss(student, ids, logp), student)
    q = student.detach().softmax(-1)
    outside = torch.ones_like(q).scatter(-1, ids, 0.0) * q
    target = (outside / outside.sum(-1, keepdim=True) * (1 - logp.exp().sum(-1, keepdim=True))).scatter(-1, ids, logp.exp())
    torch.testing.assert_close(grad, (q - target) / 6, rtol=1e-8, atol=1e-10)
