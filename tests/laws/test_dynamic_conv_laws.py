"""Every form of the per-sample convolution is the loop, gradients included; the limits of the mixture (PAD-Net section 8, facts 1-4)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dyn.core.mixture import mix
from dyn.core.routing import attend
from dyn.nn.dynamic_conv import CondConv2d, DynamicConv2d, ODConv2d
from dyn.nn.partial import PartialConv2d
from dyn.ops.dynamic_conv import FORMS, WITHOUT_KERNELS, choose, dynamic_conv2d

FAST = [form for form in FORMS if form != "loop"]


def tensors(seed, B=3, K=4, groups=1, channels=4, outputs=6, kernel=(3, 3), size=(7, 6), bias=True, spatial=False):
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    bank = leaf(K, outputs, channels // groups, *kernel)
    return leaf(B, channels, *size), bank, leaf(B, K), leaf(K, outputs) if bias else None, leaf(B, *kernel) if spatial else None


def compare(form, parts, **kwargs):
    x, bank, alpha, bias, spatial = parts
    want = dynamic_conv2d(x, bank, alpha, bias, form="loop", spatial_Bhw=spatial, **kwargs)
    got = dynamic_conv2d(x, bank, alpha, bias, form=form, spatial_Bhw=spatial, **kwargs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    leaves = [t for t in parts if t is not None]
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", [*FAST, "auto"])
@pytest.mark.parametrize("kwargs", [
    dict(), dict(stride=2, padding=1), dict(padding=(2, 1), dilation=2), dict(groups=2, padding=1), dict(groups=4, padding=1, stride=(2, 1)),
], ids=str)
def test_forms_are_the_loop(form, kwargs):
    outputs = 8 if kwargs.get("groups") == 4 else 6
    compare(form, tensors(0, groups=kwargs.get("groups", 1), outputs=outputs), **kwargs)


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("kwargs", [dict(kernel=(1, 1)), dict(kernel=(1, 3)), dict(K=1), dict(B=1), dict(bias=False)], ids=str)
def test_odd_kernels_single_samples_single_sets(form, kwargs):
    compare(form, tensors(1, **kwargs), stride=2, padding=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2),
       st.sampled_from(FAST))
def test_any_shape(B, K, per_group, groups, outputs, kernel, stride, padding, form):
    parts = tensors(2, B, K, groups, per_group * groups, outputs * groups, (kernel, kernel), (5, 4))
    compare(form, parts, stride=stride, padding=padding, groups=groups)


@pytest.mark.parametrize("form", [f for f in FAST if f not in WITHOUT_KERNELS] + ["auto"])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_kernel_positions(form, groups):
    compare(form, tensors(3, groups=groups, spatial=True), groups=groups, padding=1)


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("groups", [1, 4])
def test_channels_last(form, groups):
    x, *rest = tensors(4, groups=groups, outputs=8)
    compare(form, (x.detach().to(memory_format=torch.channels_last).requires_grad_(), *rest), groups=groups, padding=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kwargs", [dict(), dict(stride=2), dict(padding=1, stride=(2, 1)), dict(groups=2)], ids=str)
def test_products_of_1x1_kernels_in_both_layouts(layout, kwargs):
    x, *rest = tensors(9, groups=kwargs.get("groups", 1), kernel=(1, 1))
    x = x.detach().to(memory_format=layout).requires_grad_()
    compare("unfold", (x, *rest), **kwargs)
    y = dynamic_conv2d(x, *rest[:3], form="unfold", **kwargs)
    assert y.is_contiguous(memory_format=layout) or "groups" in kwargs


def test_channels_last_products_copy_nothing(monkeypatch):
    x, bank, alpha, *_ = (None if t is None else t.detach() for t in tensors(9, kernel=(1, 1)))
    x, seen, bmm = x.to(memory_format=torch.channels_last), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (seen.append(a.data_ptr()), bmm(a, b))[1])
    dynamic_conv2d(x, bank, alpha, form="unfold")
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("form", ["auto", *FAST])
def test_a_static_part_of_any_layout(form):
    x, bank, alpha, *_ = tensors(6)
    static = torch.randn(bank.shape[1:], dtype=bank.dtype).to(memory_format=torch.channels_last)
    want = dynamic_conv2d(x, bank, alpha, form=form, static_OIhw=static.contiguous())
    torch.testing.assert_close(dynamic_conv2d(x, bank, alpha, form=form, static_OIhw=static), want)


@pytest.mark.parametrize("form", FAST)
def test_second_derivatives(form):
    x, bank, alpha, *_ = tensors(5, B=2, K=2, channels=2, outputs=2, size=(4, 4))
    torch.autograd.gradgradcheck(lambda *a: dynamic_conv2d(*a, padding=1, form=form), (x, bank, alpha), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_one_kernel_one_hot_and_the_mean(form):
    x, bank, *_ = tensors(6, bias=False)
    one = torch.ones(3, 1, dtype=torch.float64)
    torch.testing.assert_close(dynamic_conv2d(x, bank[:1], attend(torch.randn(3, 1).double()), form=form), F.conv2d(x, bank[0]))
    torch.testing.assert_close(dynamic_conv2d(x, bank, F.one_hot(torch.tensor([2, 2, 2]), 4).double(), form=form), F.conv2d(x, bank[2]))
    hot = attend(torch.randn(3, 4, dtype=torch.float64), 1e9)
    assert (hot - 0.25).abs().max() < 1e-9
    torch.testing.assert_close(dynamic_conv2d(x, bank, hot, form=form), F.conv2d(x, bank.mean(0)), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(dynamic_conv2d(x, bank.mean(0, keepdim=True), one, form=form), F.conv2d(x, bank.mean(0)))


def test_mixing_is_the_sum():
    bank, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(mix(bank, weight), (weight[:, :, None, None] * bank).sum(1))
    with pytest.raises(ValueError, match=r"a bank of 3 sets is mixed by weights \[B, 3\]; got \[3, 4\]"):
        mix(bank, weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision(form, dtype):
    x, bank, alpha, bias, _ = (None if t is None else t.detach().to(dtype) for t in tensors(7))
    want = dynamic_conv2d(x.double(), bank.double(), alpha.double(), bias.double(), form="loop")
    got = dynamic_conv2d(x, bank, alpha, bias, form=form)
    assert got.dtype == dtype and (got.double() - want).norm() < 0.02 * want.norm()


def test_autocast_casts_as_a_convolution_does():
    x, bank, alpha, bias, _ = (None if t is None else t.detach().float() for t in tensors(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert {dynamic_conv2d(x, bank, alpha, bias, form=form).dtype for form in FORMS} == {torch.bfloat16}


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.untyped_storage().nbytes() // t.element_size() for t in (out if isinstance(out, (tuple, list)) else [out])
                                      if isinstance(t, torch.Tensor) and not t.is_sparse)])
        return out


@pytest.mark.parametrize("form", [*FAST, "auto"])
@pytest.mark.parametrize("kind", [DynamicConv2d, CondConv2d, ODConv2d, PartialConv2d])
def test_no_tensor_has_a_kernel_for_every_sample_and_set(kind, form):
    """Mixing is a matrix product, forward and backward: never B K P numbers, P those of a kernel, as a broadcast of alpha over the bank has."""
    if form in WITHOUT_KERNELS and kind is ODConv2d:
        return
    B, K, C, O = 8, 4, 16, 16
    options = {"mask": torch.rand(O, C, 3, 3) < 0.3} if kind is PartialConv2d else {}
    layer = kind(C, O, 3, padding=1, num_kernels=K, **options)
    layer.form = form
    with Largest() as seen:
        layer(torch.randn(B, C, 3, 3, requires_grad=True)).square().sum().backward()
    assert K * O * C * 9 <= seen.most < B * K * O * C * 9


def test_auto_follows_shape_and_device():
    def chosen(size, I=8, device="meta", spatial=False, channels=512, kernels=4):
        x, bank = torch.empty(2, channels, size, size, device=device), torch.empty(kernels, channels, I, 3, 3, device=device)
        return choose(x, bank, ((1, 1),) * 3, spatial)

    assert (chosen(7, 512), chosen(8, 512), chosen(7, 512, spatial=True), chosen(8, 512, spatial=True)) == ("outputs", "grouped", "unfold", "grouped")
    assert chosen(7, 1, channels=2**20) == "grouped" and chosen(7, 8, channels=8) == "grouped"  # depthwise; small kernels
    assert chosen(7, 512, kernels=1) == "scale"
    with FakeTensorMode():
        x = torch.empty(2, 8, 16, 16, device="cuda")
        banks = [torch.empty(4, 8, *rest, device="cuda") for rest in ((8, 1, 1), (4, 1, 1), (8, 3, 3), (8, 1, 3))]
        window = (1, 1), (0, 0), (1, 1)
        assert [choose(x, bank, window) for bank in banks] == ["unfold", "grouped", "scale", "scale"]  # the second has groups
        assert choose(x, banks[2], window, spatial=True) == "unfold"


@pytest.mark.parametrize(("change", "message"), [
    (dict(form="fastest"), "form='fastest' of dynamic_conv2d is unknown; allowed: auto, loop, grouped"),
    (dict(alpha_BK=torch.ones(3, 5)), r"alpha must be \[3, 4\]; got x float32 \[3, 4, 7, 6\] on cpu, bank .* alpha float32 \[3, 5\]"),
    (dict(groups=2), r"x must have 4 \* groups channels"),
    (dict(bias_KO=torch.ones(4)), r"bias must be \[4, 6\]; got .* bias float32 \[4\]"),
    (dict(x_BCHW=torch.ones(3, 4, 7)), r"needs x \[B, C, H, W\]"),
    (dict(x_BCHW=torch.ones(3, 4, 7, 6, dtype=torch.float16)), "must share a floating dtype; got x float16 .* bank float32"),
    (dict(spatial_Bhw=torch.ones(3, 2, 2)), r"spatial must be \[3, 3, 3\]; got .* spatial float32 \[3, 2, 2\]"),
    (dict(static_OIhw=torch.ones(6, 4, 3, 3, dtype=torch.float64)), "must share a floating dtype; got .* static float64"),
    (dict(alpha_BK=torch.ones(3, 4, device="meta")), "all tensors must be on one device; got .* alpha float32 .* on meta"),
    (dict(bias_KO=torch.ones(4, 6, device="meta")), "all tensors must be on one device"),
    (dict(spatial_Bhw=torch.ones(3, 3, 3), form="scale"), "form='scale' builds no kernel .* allowed: loop, grouped, unfold"),
])
def test_errors(change, message):
    good = dict(x_BCHW=torch.ones(3, 4, 7, 6), bank_KOIhw=torch.ones(4, 6, 4, 3, 3), alpha_BK=torch.ones(3, 4))
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(**(good | change))
