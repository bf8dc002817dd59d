"""Our per-sample convolution and CondConv layer against timm's CondConv2d, which takes its routing weights from outside."""

import pytest
import torch
from timm.layers import CondConv2d as TimmCondConv2d

from dyn.nn.dynamic_conv import CondConv2d
from dyn.ops.dynamic_conv import FORMS, dynamic_conv2d


def theirs(**kwargs):
    torch.manual_seed(0)
    return TimmCondConv2d(8, 12, 3, num_experts=4, **kwargs).double()


CASES = [dict(padding=1), dict(padding=0, stride=2, bias=True), dict(padding=2, dilation=2, groups=4, bias=True)]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_operation(kwargs, form):
    reference = theirs(**kwargs)
    x, weights = torch.randn(3, 8, 9, 7, dtype=torch.float64, requires_grad=True), torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    bank = reference.weight.view(4, *reference.weight_shape)
    want = reference(x, weights)
    got = dynamic_conv2d(x, bank, weights, reference.bias, reference.stride, reference.padding, reference.dilation, reference.groups, form)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    leaves = [x, weights, reference.weight] + ([reference.bias] if reference.bias is not None else [])
    direction = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_the_layer(kwargs):
    reference, x = theirs(**kwargs), torch.randn(3, 8, 9, 7, dtype=torch.float64)
    ours = CondConv2d(8, 12, 3, num_kernels=4, dtype=torch.float64, **kwargs)
    ours.weight.data = reference.weight.data.view(4, *reference.weight_shape)
    if ours.bias is not None:
        ours.bias.data = reference.bias.data
    weights = torch.sigmoid(torch.nn.functional.linear(x.mean((2, 3)), ours.attention.weight, ours.attention.bias))  # timm's routing, as in its CondConv blocks
    torch.testing.assert_close(ours(x), reference(x, weights), rtol=1e-10, atol=1e-10)
