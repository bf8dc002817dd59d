"""Identities of routed linear layers that need no reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.ops.linear import partial_routed_linear, routed_linear

SIZES = st.tuples(*(st.integers(low, high) for low, high in ((0, 300), (1, 9), (1, 9), (1, 6), (1, 3))))  # T I O E K


def problem(sizes, seed):
    T, I, O, E, K = sizes
    g = torch.Generator().manual_seed(seed)
    x, weight, bias, scores = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, I), (E, O, I), (E, O), (T, K)))
    return x, weight, torch.randint(E + 2, (T, K), generator=g), scores, bias


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_is_the_sum_of_single_slots(sizes, seed):
    """A token with K experts is K tokens with one."""
    x, weight, idx, scores, bias = problem(sizes, seed)
    K = sizes[-1]
    slots = routed_linear(x.repeat_interleave(K, 0), weight, idx.reshape(-1, 1), scores.reshape(-1, 1), bias)
    torch.testing.assert_close(routed_linear(x, weight, idx, scores, bias), slots.view(-1, K, sizes[2]).sum(1), rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 99))
def test_equal_experts_are_one_dense_layer(sizes, seed):
    """padnet, golden fact 23: times the sum of the scores of real experts."""
    x, weight, idx, scores, bias = problem(sizes, seed)
    weight, bias = weight[:1].expand_as(weight), bias[:1].expand_as(bias)
    share = (scores * (idx < len(weight))).sum(-1, keepdim=True)
    want = share * torch.nn.functional.linear(x, weight[0], bias[0])
    torch.testing.assert_close(routed_linear(x, weight, idx, scores, bias), want, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 99), st.floats(0, 1))
def test_forms_of_the_partial_layer_agree(sizes, seed, keep):
    """padnet, golden fact 27; at keep 0 and 1 only the static or the dynamic part counts."""
    x, weight, idx, scores, bias = problem(sizes, seed)
    g = torch.Generator().manual_seed(seed)
    static, mask = torch.randn(weight.shape[1:], generator=g, dtype=torch.float64), torch.rand(weight.shape[1:], generator=g) < keep
    forms = [partial_routed_linear(x, weight, static, mask, idx, scores, bias, dynamic_scale=0.6, static_scale=1.4, form=f) for f in ("merged", "factorised")]
    torch.testing.assert_close(*forms, rtol=1e-10, atol=1e-10)
    if mask.all():
        torch.testing.assert_close(forms[1], routed_linear(x, 0.6 * weight, idx, scores, bias), rtol=1e-10, atol=1e-10)
