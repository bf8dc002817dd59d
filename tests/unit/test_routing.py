"""Load statistics and balance losses: values by hand, masks, dtypes, gradients, refusals."""

import math

import pytest
import torch

from dyn.core import routing

IDX = torch.tensor([[0, 1], [0, 2], [3, 0]])
WEIGHT = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
MASK = torch.tensor([True, True, False])


def test_importance_and_load_by_hand():
    torch.testing.assert_close(routing.importance(IDX, WEIGHT, 5), torch.tensor([1.35, 0.25, 0.5, 0.9, 0.0]))
    torch.testing.assert_close(routing.importance(IDX, WEIGHT, 5, MASK), torch.tensor([1.25, 0.25, 0.5, 0.0, 0.0]))
    assert routing.hard_load(IDX, 5).tolist() == [3, 1, 1, 1, 0]
    assert routing.hard_load(IDX.int(), 5, MASK).tolist() == [2, 1, 1, 0, 0]


def test_importance_is_differentiable_in_the_scores_of_real_tokens_only():
    weight = WEIGHT.clone().requires_grad_()
    (routing.importance(IDX, weight, 5, MASK) * torch.arange(1.0, 6)).sum().backward()
    assert weight.grad.tolist() == [[1, 2], [1, 3], [0, 0]]


@pytest.mark.parametrize("fn", [
    lambda m, d: routing.importance(IDX, WEIGHT.to(d), 5, m),
    lambda m, d: routing.switch_loss(torch.ones(3, 5, dtype=d), IDX, m),
    lambda m, d: routing.z_loss(torch.ones(3, 5, dtype=d), m),
    lambda m, d: routing.soft_load(torch.rand(3, 5, dtype=d), torch.rand(3, 5, dtype=d), torch.ones(3, 5, dtype=d), 2, m),
    lambda m, d: routing.cv_squared(torch.arange(4, dtype=d)),
])
def test_float32_unless_float64(fn):
    for given, computed in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert fn(MASK, given).dtype == computed


def test_cv_squared_edges():
    assert routing.cv_squared(torch.tensor([7.0])) == 0  # one expert: the unbiased variance does not exist
    assert routing.cv_squared(torch.zeros(4)) == 0  # nothing routed: the 1e-10 keeps it finite
    torch.testing.assert_close(routing.cv_squared(torch.tensor([1.0, 3.0])), torch.tensor(2.0 / 4.0))


def test_padding_enters_no_statistic_whatever_it_holds():
    clean, noise = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    std = torch.full_like(clean, 0.7)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    real = mask.bool()
    broken = clean.clone()
    broken[~real] = math.nan
    idx = clean.topk(2).indices
    for masked, alone in (
        (routing.soft_load(broken, clean + noise, std, 2, mask), routing.soft_load(clean[real], (clean + noise)[real], std[real], 2)),
        (routing.z_loss(broken, mask), routing.z_loss(clean[real])),
        (routing.switch_loss(broken, idx, mask), routing.switch_loss(clean[real], idx[real])),
        (routing.hard_load(idx, 4, mask), routing.hard_load(idx[real], 4)),
    ):
        torch.testing.assert_close(masked, alone, rtol=1e-14, atol=1e-14)


def test_no_token_at_all():
    none = torch.zeros(3, dtype=torch.bool)
    logits = torch.randn(3, 5)
    assert routing.switch_loss(logits, IDX, none) == 0
    assert routing.z_loss(logits, none) == 0
    assert routing.z_loss(logits[:0]) == 0
    assert routing.importance_load_loss(routing.importance(IDX, WEIGHT, 5, none), routing.hard_load(IDX, 5, none)) == 0


def test_z_loss_value():
    torch.testing.assert_close(routing.z_loss(torch.zeros(7, 4)), torch.tensor(math.log(4) ** 2))


def test_soft_load_thresholds_carry_gradient():
    """As in the official code: the threshold is another expert's noisy logit, and the gradient reaches it."""
    clean = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    noisy = clean.clone().requires_grad_()
    std = torch.ones_like(clean)
    routing.soft_load(clean, noisy, std, 1)[0].backward()
    density = math.exp(-0.5 * 0.5**2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(noisy.grad, torch.tensor([[0.0, -density, 0.0]], dtype=torch.float64))


def test_soft_load_by_hand():
    clean = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    load = routing.soft_load(clean, clean, torch.full_like(clean, 0.5), 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    # Expert 0 is in and must stay above the second; the others must beat the first.
    torch.testing.assert_close(load, normal.cdf(torch.tensor([1.0, -1.0, -2.0], dtype=torch.float64)))


@pytest.mark.parametrize("k", [0, 4])
def test_soft_load_refuses_k(k):
    with pytest.raises(ValueError, match=rf"k={k} with 4 experts; allowed: 1 to 3"):
        routing.soft_load(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4), k)


def test_mask_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask_T has shape \[2\]; with 3 tokens"):
        routing.z_loss(torch.zeros(3, 4), torch.ones(2, dtype=torch.bool))


def test_update_bias_moves_against_the_load_and_keeps_its_input():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    moved = routing.update_bias(bias, torch.tensor([10, 2, 6, 6]), rate=0.01)
    torch.testing.assert_close(moved, torch.tensor([0.49, 0.01, -0.5, 0.0]))
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.0]
