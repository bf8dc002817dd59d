"""PAD-Net: the golden facts of the specification's section 8 about convolutions (1-22, 29-31), at full size.

The networks are built on the meta device; where masks count, their memory is left uninitialised (a random partition does not read it).
"""

from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import dyn.models.resnet
from dyn.core.mixture import scale_factors
from dyn.core.partition import kept_count
from dyn.core.rounds import kept_counts
from dyn.core.routing import annealed_temperature
from dyn.nn.bank import Banked
from dyn.nn.count import count_parameters, macs_per_image
from dyn.nn.dynamic_conv import DynamicConv2d
from dyn.nn.partial import PartialConv2d, compact, make_partial, switches

P_DYNAMIC = {"resnet10": 4_890_624, "resnet18": 11_157_504, "resnet50": 23_445_504, "mobilenetv2_100": 2_188_896, "mobilenetv2_075": 1_328_136,
             "mobilenetv2_050": 668_704}


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@cache
def stored(name):
    return count_parameters(meta(name))["stored"]


def layers(model):
    return [m for m in model.modules() if isinstance(m, Banked)]


def randomly(model, keep):
    return make_partial(model.to_empty(device="cpu"), None, None, keep=keep, rounds=1, method="random")


@pytest.mark.parametrize(("name", "total", "macs"), [
    ("resnet50", 25_557_032, 4.0892e9), ("resnet18", 11_689_512, 1.8141e9), ("mobilenetv2_100", 3_504_872, 300.8e6), ("mobilenetv2_075", 2_636_424, 209.1e6),
    ("mobilenetv2_050", 1_968_680, 97.1e6),
])
def test_static_networks(name, total, macs):
    model = meta(name)
    assert count_parameters(model)["total"] == total
    assert macs_per_image(model) == pytest.approx(macs, abs=0.05e6)  # half a unit of the last digit that is given


def test_resnet10_is_ours():
    model = dyn.models.resnet.resnet10()
    assert count_parameters(model)["total"] == 5_418_792 and macs_per_image(model) == pytest.approx(0.8892e9, abs=0.05e6)


@pytest.mark.parametrize(("name", "reduction", "total", "convs", "attention"), [
    ("resnet10", 16, 20_123_956, 11, 33_292), ("resnet18", 16, 45_239_348, 19, 77_324), ("resnet50", 16, 97_138_424, 52, 1_244_880),
    ("mobilenetv2_100", 16, 10_653_944, 51, 582_384), ("mobilenetv2_075", 16, 6_951_732, 51, 330_900), ("mobilenetv2_050", 16, 4_122_588, 51, 147_796),
    ("resnet10", 4, 20_223_700, 11, None), ("resnet18", 4, 45_471_092, 19, None), ("resnet50", 4, 100_872_440, 52, None),
    ("mobilenetv2_100", 4, 12_400_596, 51, None),
])
def test_dynamic_networks(name, reduction, total, convs, attention):
    model = meta(f"dyconv_{name}", num_kernels=4, reduction=reduction)
    counts, dynamic = count_parameters(model), layers(model)
    assert counts["total"] == counts["stored"] == total and len(dynamic) == convs
    assert sum(m.weight[0].numel() for m in dynamic) == P_DYNAMIC[name] and counts["dynamic"] == 4 * P_DYNAMIC[name]
    assert attention is None or counts["gate"] == attention
    assert isinstance(model.get_classifier(), nn.Linear) and next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 3
    padnet = count_parameters(meta(f"padnet_{name}", num_kernels=4, reduction=reduction))
    assert padnet["total"] == total + convs and padnet["stored"] == total and padnet["active"] == count_parameters(meta_static(name))["total"]


def meta_static(name):
    with torch.device("meta"):
        return dyn.models.resnet.BACKBONES[name]()


@pytest.mark.parametrize(("name", "convs"), [("resnet34", 35), ("resnet101", 103)])
def test_dynamic_networks_without_a_number_follow_the_formula(name, convs):
    model, base = meta(f"dyconv_{name}", num_kernels=4), count_parameters(meta_static(name))["total"]
    hidden = [(m.in_channels, max(1, m.in_channels // 16)) for m in layers(model)]
    assert len(hidden) == convs  # all but the stem: with a down-sample convolution in each stage that needs one
    attention = sum(channels * units + units * 4 + 4 for channels, units in hidden)
    assert count_parameters(model)["total"] == base + 3 * sum(m.weight[0].numel() for m in layers(model)) + attention


@pytest.mark.parametrize(("name", "kernels", "total"), [
    ("resnet18", 1, 11_943_944), ("resnet18", 4, 44_901_640), ("resnet50", 1, 28_635_112), ("resnet50", 4, 90_670_888), ("mobilenetv2_100", 1, 4_940_185),
    ("mobilenetv2_100", 4, 11_512_149), ("mobilenetv2_075", 4, 7_496_013), ("mobilenetv2_050", 4, 4_435_501),
])
def test_odconv_networks(name, kernels, total):
    assert count_parameters(meta(f"odconv_{name}", num_kernels=kernels))["total"] == total


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2_100"])
def test_condconv_networks_follow_the_formula(name):
    """The specification has no number: every convolution but stem and down-sample paths gets K - 1 more kernels and a router of (C + 1) K."""
    model, base = meta(f"condconv_{name}", num_kernels=8), count_parameters(meta(name))["total"]
    more = sum(7 * m.weight[0].numel() + 8 * (m.in_channels + 1) for m in layers(model))
    assert count_parameters(model)["total"] == base + more
    assert len(layers(model)) == {"resnet18": 16, "resnet50": 48, "mobilenetv2_100": 51}[name]


@pytest.mark.parametrize(("name", "keep", "total"), [
    ("resnet50", 0.3, 47_902_868), ("resnet50", 0.1, 33_835_565), ("resnet50", 0.5, 61_970_168), ("resnet18", 0.3, 21_808_592), ("resnet18", 0.1, 15_114_089),
    ("resnet18", 0.5, 28_503_092), ("resnet10", 0.1, 6_919_273), ("resnet10", 0.3, 9_853_648), ("resnet10", 0.5, 12_788_020),
    ("mobilenetv2_100", 0.3, 6_057_263), ("mobilenetv2_100", 0.1, 4_743_926), ("mobilenetv2_100", 0.5, 7_370_600),
])
def test_compact_size_by_the_formula(name, keep, total):
    dynamic = kept_count(P_DYNAMIC[name], keep, "up")
    assert stored(f"padnet_{name}") + 3 * (dynamic - P_DYNAMIC[name]) == total


@pytest.mark.parametrize(("name", "keep", "held", "small_total", "overhead", "macs"), [
    ("resnet18", 0.3, 56_396_871, 21_808_592, 0.3, 1.8275e9), ("mobilenetv2_100", 0.1, 12_842_891, 4_743_926, 0.1, None),
    ("mobilenetv2_100", 0.3, 12_842_891, 6_057_263, 0.3, 304.0e6), ("resnet10", 0.3, 25_014_591, 9_853_648, 0.3, 0.8951e9),
])
def test_partitioned_networks(name, keep, held, small_total, overhead, macs):
    model = randomly(meta(f"padnet_{name}"), keep)
    counts, full = count_parameters(model), meta(f"dyconv_{name}")
    assert counts["total"] == held and counts["stored"] == small_total
    small = compact(model)
    assert sum(p.numel() for p in small.parameters()) == small_total == count_parameters(small)["total"] == count_parameters(small)["stored"]
    assert {k: v for k, v in count_parameters(small).items() if k not in ("total", "trainable")} == {
        k: v for k, v in counts.items() if k not in ("total", "trainable")}
    mixing = 4 * sum(int(m.partial.mask.sum()) for m in layers(model))
    assert macs_per_image(model) == macs_per_image(small) == macs_per_image(full) - 4 * P_DYNAMIC[name] + mixing
    assert mixing == pytest.approx(overhead * 4 * P_DYNAMIC[name], rel=1e-5) and (macs is None or macs_per_image(model) == pytest.approx(macs, abs=0.05e6))


def test_resnet50_partitioned():
    model = randomly(meta("padnet_resnet50"), 0.3)
    counts = count_parameters(model)
    assert counts["total"] == 120_583_980 and counts["stored"] == 47_902_868
    masks = [m.partial.mask for m in layers(model)]
    assert sum(int(m.sum()) for m in masks) == 7_033_652 and sum(int((~m).sum()) for m in masks) == 16_411_852
    assert macs_per_image(model) == pytest.approx(4.1186e9, abs=0.05e6)


@pytest.mark.parametrize(("name", "mixing", "attention", "macs"), [("resnet18", 44.6e6, 0.08e6, 1.8588e9), ("resnet50", 93.8e6, 1.24e6, 4.1842e9),
                                                                   ("resnet10", 19.56e6, 0.033e6, 0.9088e9), ("mobilenetv2_100", 8.756e6, 0.58e6, 310.1e6)])
def test_multiply_adds_of_dynamic_networks(name, mixing, attention, macs):
    model, static = meta(f"dyconv_{name}"), meta_static(name).eval()
    more = macs_per_image(model) - macs_per_image(static)
    assert more == 4 * P_DYNAMIC[name] + sum(m.attention.reduce.weight.numel() + m.attention.expand.weight.numel() for m in layers(model))
    assert 4 * P_DYNAMIC[name] == pytest.approx(mixing, rel=2e-3) and more - 4 * P_DYNAMIC[name] == pytest.approx(attention, rel=0.05)
    assert macs_per_image(model) == pytest.approx(macs, abs=0.05e6)


def test_one_convolution():
    conv = DynamicConv2d(64, 128, 3, padding=1)
    assert conv.weight.numel() == 294_912 and sum(p.numel() for p in conv.attention.parameters()) == 276
    partial = randomly(nn.Sequential(PartialConv2d(64, 128, 3, padding=1)), 0.3)
    mask = partial[0].partial.mask
    assert (int((~mask).sum()), int(mask.sum())) == (51_609, 22_119)
    bank = compact(partial)[0].partial
    assert bank.num_stored == bank.dynamic.numel() + bank.static.numel() == 140_085 and bank.bits.numel() == 73_728 // 8


def test_counts_and_schedules():
    assert 10_007 - kept_count(10_007, 0.3, "up") == 7_004 and kept_count(10_007, 0.3, "up") == 3_003
    assert kept_count(23_445_504, 0.3, "up") == 7_033_652
    million = 10**6
    assert kept_counts(million, 0.3, 3, "exponential", "up") == [669_433, 448_141, 300_000]
    assert kept_counts(million, 0.3, 3, "linear", "up") == [766_667, 533_334, 300_000]
    assert all(kept_counts(10_007, 0.3, rounds, schedule, "up")[-1] == 3_003 for rounds in range(1, 12) for schedule in ("exponential", "linear"))


@pytest.mark.parametrize(("keep", "ratio"), [(0.0, 0.25), (0.1, 0.325), (0.3, 0.475), (0.5, 0.625), (1.0, 1.0)])
def test_ratio_to_the_dynamic_weights(keep, ratio):
    model = make_partial(nn.Sequential(PartialConv2d(64, 128, 3)), None, None, keep=keep, method="random")
    assert compact(model)[0].partial.num_stored / (4 * 73_728) == pytest.approx(ratio, abs=3 / (4 * 73_728))  # D is rounded up


def test_scale_factors():
    phi = torch.linspace(-6, 6, 25, dtype=torch.float64)
    dynamic, static = scale_factors(phi)
    torch.testing.assert_close(dynamic + static, torch.full_like(phi, 2))
    torch.testing.assert_close(static, 2 * torch.sigmoid(-phi))
    assert (dynamic > 0).all() and (dynamic < 2).all() and scale_factors(torch.zeros(()))[0] == scale_factors(torch.zeros(()))[1] == 1


def test_temperature_schedule():
    for epochs, starts, last in [(10, [30.0, 27.1, 24.2, 21.3, 18.4, 15.5, 12.6, 9.7, 6.8, 3.9], 1.00058), (15, [30.0, 28.0667, 26.1333], 1.000386)]:
        steps = epochs * 5005
        assert [annealed_temperature(5005 * e, steps) for e in range(len(starts))] == pytest.approx(starts, abs=1e-4)
        assert annealed_temperature(steps - 1, steps) == pytest.approx(last, abs=1e-6)
    values = [annealed_temperature(i, 500) for i in range(500)]
    assert all(a > b > 1 for a, b in zip(values, values[1:], strict=False)) and annealed_temperature(500, 500) == annealed_temperature(900, 500) == 1


def test_mode_switch_gradient():
    """Fact 10: dL/dM_j = sum_n G_nj (lambda_d sum_k alpha_nk W_kj - lambda_s static_j), against finite differences of the masked layer."""
    torch.manual_seed(0)
    conv = PartialConv2d(3, 4, 3, padding=1).double()
    static = torch.randn(conv.weight.shape[1:], dtype=torch.float64)
    conv.partial.hold(torch.rand(static.shape) > 0.4, static, settled=False)
    conv.partial.phi.data.fill_(0.3)
    model, batch = nn.Sequential(conv), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    target = torch.randn(5, 4, 6, 6, dtype=torch.float64)

    def loss(model, batch):
        return ((model(batch) - target) ** 2).sum()

    switch, _ = switches(model, {"0": conv}, [batch], loss)
    alpha, (dynamic, still) = conv.alpha(batch).detach(), (v.item() for v in conv.partial.scale())
    mixed = torch.einsum("nk,k...->n...", alpha, conv.weight.detach())
    mask = conv.partial.mask.double()

    def total(kernels):
        return ((torch.cat([F.conv2d(batch[n : n + 1], kernels[n], padding=1) for n in range(5)]) - target) ** 2).sum()

    def kernels_of(mask):
        return dynamic * mask * mixed + still * (1 - mask) * static

    kernels = kernels_of(mask).requires_grad_()
    (G,) = torch.autograd.grad(total(kernels), kernels)
    torch.testing.assert_close(switch["0"], (G * (dynamic * mixed - still * static)).sum(0), rtol=1e-9, atol=1e-9)
    for place in torch.randperm(mask.numel())[:8]:
        step = torch.zeros(mask.numel(), dtype=torch.float64)
        step[place] = 1e-4
        step = step.view(mask.shape)
        slope = (total(kernels_of(mask + step)) - total(kernels_of(mask - step))) / 2e-4  # exact but for rounding: the loss is quadratic
        torch.testing.assert_close(switch["0"].flatten()[place], slope, rtol=1e-8, atol=1e-6)
