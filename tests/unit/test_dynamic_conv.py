"""The dynamic layers: initialisers, temperature, precision, memory format, compilation, batches of one."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.core.routing import annealed_temperature
from dyn.nn import dynamic_conv
from dyn.nn.dynamic_conv import KINDS, CondConv2d, DynamicConv2d, ODConv2d, attention_entropy, set_temperature
from dyn.nn.partial import compact
from dyn.nn.surgery import make_dynamic


def layer(kind, channels=8, outputs=12, kernel=3, **kwargs):
    torch.manual_seed(0)
    return KINDS[kind](channels, outputs, kernel, padding=kernel // 2, **kwargs)


def x(B=3, C=8, size=6, dtype=torch.float32):
    return torch.randn(B, C, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kwargs", [dict(), dict(kernel=1), dict(groups=4), dict(groups=8, outputs=8), dict(bias=True, stride=2), dict(num_kernels=1)], ids=str)
def test_forms_agree_in_layers(kind, kwargs):
    forms = ("loop", "grouped", "unfold") if kind == "odconv" and kwargs.get("kernel") != 1 else ("loop", "grouped", "unfold", "scale", "outputs")
    net = layer(kind, **kwargs).double()
    if net.bias is not None:
        nn.init.normal_(net.bias)
    results = []
    for form in (*forms, "auto"):
        net.form = form
        results.append(net(x(dtype=torch.float64)))
    assert results[0].shape[1] == net.out_channels
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-9, atol=1e-10)


def test_dyconv_is_its_definition():
    net = layer("dyconv", bias=True).double()
    nn.init.normal_(net.bias)
    net.temperature.fill_(3)
    inputs, attention = x(dtype=torch.float64), net.attention
    for b in range(3):
        pooled = inputs[b].mean((1, 2))
        alpha = ((attention.expand.weight @ F.relu(attention.reduce.weight @ pooled) + attention.expand.bias) / 3).softmax(0)
        kernel, bias = (torch.einsum("k,k...->...", alpha, t) for t in (net.weight, net.bias))
        torch.testing.assert_close(net(inputs)[b : b + 1], F.conv2d(inputs[b : b + 1], kernel, bias, padding=1))


def test_odconv_is_its_definition():
    net = layer("odconv").double()
    inputs, attention = x(dtype=torch.float64), net.attention
    h = F.relu(attention.norm(attention.reduce(inputs.mean((2, 3)))))
    channel, filters, spatial = (head(h).sigmoid() for head in (attention.channel, attention.filter, attention.spatial))
    alpha = attention.kernel(h).softmax(-1)
    net.attention.norm.reset_running_stats()
    y = net(inputs)
    for b in range(3):
        kernel = (alpha[b][:, None, None, None, None] * spatial[b].view(3, 3) * net.weight).sum(0)
        kernel = kernel * channel[b][None, :, None, None] * filters[b][:, None, None, None]
        torch.testing.assert_close(y[b : b + 1], F.conv2d(inputs[b : b + 1], kernel, padding=1))


def test_initialisers():
    torch.manual_seed(0)
    wide = DynamicConv2d(256, 128, 3)
    assert wide.weight.std(dim=(1, 2, 3, 4)).tolist() == pytest.approx([math.sqrt(2 / (9 * 128))] * 4, rel=0.01)
    assert wide.attention.reduce.weight.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.05)
    assert DynamicConv2d(4096, 1, 1).attention.expand.weight.std().item() == pytest.approx(math.sqrt(2 / 4), rel=0.1)
    assert not wide.attention.expand.bias.any()
    depthwise = DynamicConv2d(512, 512, 3, groups=512)
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.03)  # not divided by groups
    cond = CondConv2d(64, 64, 3)
    assert cond.weight.abs().amax(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1 / math.sqrt(576)] * 4, rel=0.01)
    assert DynamicConv2d(4, 4, 3).attention.reduce.out_features == 1 and DynamicConv2d(64, 4, 3, reduction=4).attention.reduce.out_features == 16
    assert ODConv2d(64, 64, 3).attention.reduce.out_features == 16


def test_temperature_is_set_everywhere_and_saved():
    net = nn.Sequential(layer("dyconv"), nn.ReLU(), layer("odconv", channels=12), layer("condconv", channels=12))
    assert net[0].temperature == 31
    assert set_temperature(net, 7.5) == 2
    assert net.state_dict()["0.temperature"] == 7.5
    fresh = nn.Sequential(layer("dyconv"), nn.ReLU(), layer("odconv", channels=12), layer("condconv", channels=12))
    fresh.load_state_dict(net.state_dict())
    assert fresh[2].temperature == 7.5
    with pytest.raises(ValueError, match="temperature=0 must be positive and finite"):
        set_temperature(net, 0)


def test_the_schedule_refuses():
    with pytest.raises(ValueError, match="step=-1"):
        annealed_temperature(-1, 10)
    assert annealed_temperature(10**9, 10) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_and_autocast(kind):
    net = layer(kind, bias=True).eval()
    want = net(x())
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(x())
    half = net.to(torch.bfloat16)(x(dtype=torch.bfloat16))
    for got in (cast, half):
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.03 * want.norm()
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modes", [False, True])
def test_channels_last(kind, modes):
    net = nn.Sequential(nn.Conv2d(8, 8, 1), layer(kind)).double().eval()
    if modes:
        net[1].partition(torch.rand(12, 8, 3, 3) < 0.5)
    inputs, nets = x(dtype=torch.float64), [net, compact(net), compact(net, expand=True)] if modes else [net]
    for each in nets:
        want = each(inputs)
        each.to(memory_format=torch.channels_last)
        torch.testing.assert_close(each(inputs.to(memory_format=torch.channels_last)), want)
        assert all(t.is_contiguous() for t in (*each[1].parameters(), *each[1].buffers()))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    torch._dynamo.reset()  # graphs of other tests in this process count towards its limit
    net = layer(kind, bias=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), net(x()))
    compiled(x()).square().mean().backward()
    set_temperature(net, 2.0)  # a buffer: the compiled graph sees it
    net.eval()
    torch.testing.assert_close(compiled(x()), net(x()))


def test_odconv_trains_on_a_batch_of_one(caplog, monkeypatch):
    monkeypatch.setattr(dynamic_conv, "_logged", set())
    net = layer("odconv").train()
    before = net.attention.norm.running_mean.clone()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            net(x(B=1)).square().mean().backward()
    assert [r.message for r in caplog.records] == ["ODConv: a training batch of one sample; the attention's batch norm uses its running statistics for it"]
    assert torch.equal(net.attention.norm.running_mean, before) and net.weight.grad.isfinite().all()
    net(x(B=2))
    assert not torch.equal(net.attention.norm.running_mean, before)


@pytest.mark.parametrize("make", [
    (lambda: DynamicConv2d(8, 8, 3, num_kernels=0), r"DynamicConv2d\(8, 8, 3\): numbers of channels, num_kernels=0 and reduction=16 must be"),
    (lambda: CondConv2d(8, 9, 3, groups=4), r"groups=4 must divide both numbers of channels"),
    (lambda: ODConv2d(8, 8, 3, form="best"), "form='best' is unknown; allowed: auto, loop"),
    (lambda: DynamicConv2d(8, 8, 3, padding="same"), "padding='same' must be given in numbers"),
    (lambda: DynamicConv2d(8, 8, (3, 3, 3)), "must be an int or two"),
    (lambda: DynamicConv2d(8, 4, 0), r"DynamicConv2d\(8, 4, 0\): 0 must be an int or two, at least 1"),
    (lambda: DynamicConv2d(8, 4, 3, stride=0), "0 must be an int or two, at least 1"), (lambda: DynamicConv2d(8, 4, 3, padding=-1), "-1 must be .* at least 0"),
    (lambda: DynamicConv2d(8, 4, 3, num_kernels=2.5), "num_kernels=2.5 and reduction=16 must be integers, at least 1"),
    (lambda: DynamicConv2d(8, 4, 3)(torch.zeros(8, 5, 5)), r"DynamicConv2d takes \[B, 8, H, W\]; got \[8, 5, 5\]"),
    (lambda: ODConv2d(8, 4, 3)(torch.zeros(2, 4, 5, 5)), r"ODConv2d takes \[B, 8, H, W\]; got \[2, 4, 5, 5\]"),
], ids=["kernels", "groups", "form", "padding", "size", "no size", "no stride", "negative padding", "half a kernel", "three axes", "channels"])
def test_errors(make):
    with pytest.raises(ValueError, match=make[1]):
        make[0]()


@pytest.mark.parametrize(("arguments", "settings", "words"), [
    ((8, 8, 3), dict(temperature=0.0), "temperature=0.0 must be positive"), ((8, 8, 3), dict(temperature=float("nan")), "temperature=nan"),
    ((8, 0, 3), {}, "numbers of channels")])
def test_layers_that_cannot_be(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        DynamicConv2d(*arguments, **settings)


@pytest.mark.parametrize("kind", ["dyconv", "condconv", "odconv"])
def test_entropy_of_the_attention(kind):
    torch.manual_seed(0)
    net = make_dynamic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 16, 3), nn.Conv2d(16, 8, 3)), kind, start="fresh").train()
    images, heads = torch.randn(5, 3, 9, 9), {"dyconv": "expand", "odconv": "kernel"}
    attention = net[2].attention if kind == "condconv" else getattr(net[2].attention, heads[kind])
    nn.init.zeros_(attention.weight)
    nn.init.zeros_(attention.bias)
    found = attention_entropy(net, images)
    assert list(found) == ["2", "3"] and found["2"] == pytest.approx(1.0) and 0 < found["3"] < 1
    assert net.training and int(net[1].num_batches_tracked) == 0 and all(p.requires_grad for p in net.parameters())
    alpha = net[3].eval().alpha(net.eval()[:3](images)).double().detach()
    alpha = alpha / alpha.sum(1, keepdim=True)
    assert found["3"] == pytest.approx((-(alpha * alpha.log()).sum(1) / math.log(4)).mean().item(), rel=1e-4)
    set_temperature(net, 1e6)
    assert attention_entropy(net, images)["3"] == pytest.approx(1.0) or kind == "condconv"
    assert attention_entropy(nn.Sequential(nn.Conv2d(3, 4, 3)), images) == {}
    net[3].skipped = DynamicConv2d(3, 4, 3)  # a branch of training alone
    assert attention_entropy(net, images).keys() == found.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_no_error(kind):
    """As `nn.Conv2d` has it."""
    layer = KINDS[kind](4, 6, 3, padding=1, bias=True).eval()
    assert layer(torch.zeros(0, 4, 5, 5)).shape == (0, 6, 5, 5)
