"""Conversion of any CNN's convolutions, timm's registry included."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

from dyn.models.resnet import ENTRIES, make_network
from dyn.nn import convert_conv
from dyn.nn.bank import Banked
from dyn.nn.convert_conv import DOWN_SAMPLE
from dyn.nn.dynamic_conv import KINDS, DynamicConv2d
from dyn.nn.surgery import count_parameters, make_dynamic, make_partial


def names(model):
    return [n for n, m in model.named_modules() if isinstance(m, Banked)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same", stride=1), nn.ReLU(),
                         nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=False), nn.ReLU(),
                         nn.Conv2d(16, 16, 3, groups=16, dilation=2, bias=False)).double().eval()


def test_convolutions_that_share_a_weight_stay_static(caplog):
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(4)))
    model[2].weight = model[1].weight
    make_dynamic(model, start="fresh")
    assert names(model) == ["3"] and model[1].weight is model[2].weight and "2 convolutions stay static" in caplog.text


def test_a_weight_shared_with_another_kind_of_layer_stays_shared():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, bias=False), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 8, 3, bias=False))
    model[3].weight = model[1].weight
    make_dynamic(model)
    assert names(model) == ["2"] and model[3].weight is model[1].weight


def test_a_convolution_that_was_cut_by_hand_stays_static():
    model = network()
    model[4].weight = nn.Parameter(model[4].weight[:12])
    make_dynamic(model)
    assert names(model) == ["2", "6"]


def test_all_layers_or_none(monkeypatch):
    model, made, dynamic = network(), [], convert_conv._dynamic

    def fails(conv, *args):
        made.append(conv)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return dynamic(conv, *args)

    monkeypatch.setattr(convert_conv, "_dynamic", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_dynamic(model)
    assert len(made) == 3 and not names(model)


@pytest.mark.parametrize("scales", ["both", "s", "d", "none"])
def test_networks_are_made_on_meta(scales):
    with torch.device("meta"):
        model = timm.create_model("padnet_resnet10", scales=scales)
    assert all(p.is_meta for p in model.parameters())


def test_convolutions_that_others_hang_on_stay_static(caplog):
    conv = lambda: nn.Conv2d(4, 4, 3)  # noqa: E731
    normed = nn.utils.spectral_norm(conv()), nn.utils.parametrizations.weight_norm(conv())
    model = nn.Sequential(conv(), *normed, conv(), conv(), conv(), conv().to(torch.complex64))
    prune.random_unstructured(model[3], "weight", 0.5)
    handle = model[4].register_forward_hook(lambda *_: None)
    make_dynamic(model, start="fresh")
    assert names(model) == ["5"] and "5 convolutions stay static" in caplog.text and "or others hang on them: 1, 2, 3, 4, 6" in caplog.text
    handle.remove()


def test_inner_classifiers_stay_static():
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    assert {name for name, _ in make_dynamic(model, num_kernels=2).named_modules() if name in ("classifier.4", "aux_classifier.4")}.isdisjoint(names(model))
    wrapped = nn.ModuleDict({"backbone": torchvision.models.squeezenet1_1(), "neck": nn.Conv2d(10, 10, 1)})
    assert {"backbone.classifier.1", "neck"} & set(names(make_dynamic(wrapped))) == {"neck"}


def test_features_are_traced_around_dynamic_layers():
    found = timm.create_model("dyconv_resnet10", num_kernels=2, features_only=True, feature_cls="fx", out_indices=(1, 2))(torch.randn(1, 3, 32, 32))
    assert [f.shape[1] for f in found] == [64, 128]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_kernels", [1, 4])
def test_carried_weights_keep_the_function(kind, num_kernels):
    x = torch.randn(2, 3, 13, 13, dtype=torch.float64)
    want = network()(x)
    exact = make_dynamic(network(), kind, num_kernels, noise=0.0)
    torch.testing.assert_close(exact(x), want, rtol=1e-9, atol=1e-9)
    noisy = make_dynamic(network(), kind, num_kernels)
    assert 0 < (noisy(x) - want).norm() < 0.05 * want.norm()
    for name in names(noisy):
        kernel, spread = exact.get_submodule(name).weight, noisy.get_submodule(name).weight - exact.get_submodule(name).weight
        assert spread.std().item() == pytest.approx(0.01 * kernel[0].std().item(), rel=0.2)
    static = make_partial(make_dynamic(network(), kind, num_kernels, noise=0.0), None, None, keep=0.0)  # what turns static goes on from there
    torch.testing.assert_close(static(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_starts(kind):
    weight = network()[2].weight
    one, fresh = (make_dynamic(network(), kind, start=start)[2] for start in ("one_copy", "fresh"))
    torch.testing.assert_close(one.weight[0], KINDS[kind](8, 8, 3).carry()[0] * weight)
    assert not torch.allclose(one.weight[1], one.weight[0]) and not torch.allclose(one.weight[1], one.weight[2])
    assert not any(torch.allclose(fresh.weight[k], weight) for k in range(4))
    assert torch.equal(one.bias, network()[2].bias.expand(4, 8))


@pytest.mark.parametrize("build", [lambda: timm.create_model("resnet18"), lambda: torchvision.models.resnet18(num_classes=1000)], ids=["timm", "torchvision"])
@pytest.mark.parametrize(("kind", "count"), [("dyconv", 19), ("condconv", 16), ("odconv", 16)])
def test_resnets_of_both_libraries(build, kind, count):
    with torch.device("meta"):
        found = names(make_dynamic(build(), kind))
    assert len(found) == count and "conv1" not in found and any("downsample" in n for n in found) == (kind == "dyconv")


@pytest.mark.parametrize(("name", "count"), [("mobilenet_v2", 51), ("squeezenet1_1", 24), ("densenet121", 119), ("mnasnet0_5", 51)])
def test_other_networks_run(name, count):
    with torch.device("meta"):
        model = make_dynamic(torchvision.models.get_model(name, num_classes=10)).eval()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 10)
    assert len(names(model)) == count
    assert not any(n.startswith("classifier") for n in names(model))


def test_skip():
    with torch.device("meta"):
        model = make_dynamic(timm.create_model("resnet18"), skip=[r"layer1\.", "downsample"])
    assert len(names(model)) == 12 and not any("layer1" in n or "downsample" in n for n in names(model))
    with pytest.raises(ValueError, match="skip='layer9' finds none of the 20 convolutions of ResNet: conv1, "), torch.device("meta"):
        make_dynamic(timm.create_model("resnet18"), skip="layer9")


@pytest.mark.parametrize(("name", "down"), [
    ("layer2.0.downsample.0", True), ("stage.shortcut", True), ("level2.project.0", True), ("block1.skip", True), ("features.conv2_1.c1x1_w_s2.conv", True),
    ("trunk_output.block1.block1-0.proj.0", True), ("blocks.0.attn.proj", False), ("layer1.0.conv1", False), ("projection.conv", False),
])
def test_down_sample_paths_of_other_libraries(name, down):
    """timm's ResNet, RegNet, DLA, Xception and DPN, torchvision's RegNet."""
    assert bool(DOWN_SAMPLE.search(name)) == down


def test_shared_modules_flags_and_unfit_convolutions(caplog):
    shared = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    odd = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, shared, odd, nn.Conv2d(4, 4, 2, padding="same")).eval()
    make_dynamic(model)
    assert model[1] is model[2] and isinstance(model[1], DynamicConv2d) and model[3] is odd and not model[1].training
    assert not model[1].weight.requires_grad and not model[1].bias.requires_grad and model[1].attention.reduce.weight.requires_grad
    assert "2 convolutions stay static" in caplog.text and "3, 4" in caplog.text


def conv(*channels):
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels)))


@pytest.mark.parametrize(("model", "static"), [
    (lambda: nn.ModuleDict({"stem": conv(3, 4, 4), "body": conv(4, 4, 4, 4), "head": conv(4, 2)}), {"stem.0", "stem.1", "head.0"}),
    (lambda: nn.Sequential(nn.Identity(), nn.ModuleDict({"features": conv(3, 4, 4, 4), "classifier": conv(4, 2)})), {"1.features.0", "1.classifier.0"}),
    (lambda: nn.ModuleDict({"features": conv(3, 4, 4, 4, 4)}), {"features.0"}),
    (lambda: timm.create_model("resnet26d"), {"conv1.0", "conv1.3", "conv1.6"}),
], ids=["a stem of two", "behind a wrapper", "one trunk", "resnet26d"])
def test_stem_and_classifier_stay(model, static):
    made = make_dynamic(model(), num_kernels=2)
    assert {name for name, m in made.named_modules() if isinstance(m, nn.Conv2d)} == static


@pytest.mark.parametrize(("model", "kwargs", "message"), [
    (nn.Linear(3, 4), dict(), r"Linear has no convolution \(nn.Conv2d\) to make dynamic"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(), "Sequential has no convolution left to make dyconv: the first of 0 is the stem's"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(kind="dcd"), "kind='dcd' is unknown; allowed: dyconv, condconv, odconv"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(start="zeros"), "start='zeros' is unknown; allowed: copies, one_copy, fresh"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(noise=-1), "noise=-1 must be a number, not negative"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(noise=float("nan")), "noise=nan must be a number"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), dict(skip="["), r"skip='\[' is no regular expression"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), DynamicConv2d(4, 4, 3)), dict(), "Sequential is dynamic already"),
], ids=str)
def test_errors(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_dynamic(model, **kwargs)


def test_the_registry():
    assert set(ENTRIES) <= set(timm.list_models()) and len(ENTRIES) == 32
    for name in ("padnet_resnet10", "condconv_mobilenetv2_050"):
        model = timm.create_model(name, num_classes=7, in_chans=1, num_kernels=2, reduction=4).eval()
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
        assert all(m.num_kernels == 2 and m.reduction == 4 for m in model.modules() if isinstance(m, Banked))
    assert model.pretrained_cfg["mean"] == timm.create_model("mobilenetv2_050").pretrained_cfg["mean"]
    counts = count_parameters(timm.create_model("padnet_resnet10", scales="none"))
    assert counts["total"] == counts["stored"] == 20_123_956
    with pytest.raises(ValueError, match="resnet10 has no pre-trained weights"):
        timm.create_model("padnet_resnet10", pretrained=True)


def test_stems_and_starts_of_the_family():
    small = timm.create_model("dyconv_resnet10", stem="stride2", num_classes=7)
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (2, 2) and isinstance(small.maxpool, nn.Identity)
    assert small.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert timm.create_model("odconv_mobilenetv2_050", stem="stride1").conv_stem.stride == (1, 1)
    norms = [m for m in make_network("resnet50").modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and all(bool((m.weight == 1).all()) for m in norms)  # else mode partition sees nothing inside residual branches
    assert not make_network("resnet10", zero_init_last=True).layer1[0].bn2.weight.any()


@pytest.mark.parametrize(("backbone", "settings", "message"), [
    ("resnet5", {}, "backbone='resnet5' is unknown; nearest: 'resnet50'"),
    ("vgg11", {"stem": "stride1"}, "stem='stride1' is for ResNets and MobileNets"),
    ("resnet10", {"stem": "tiny"}, "stem='tiny' is unknown; allowed: imagenet, stride1, stride2"),
    ("mixer_s32_224", {"kind": "dyconv"}, "has no convolution left to make dyconv")])
def test_networks_that_cannot_be(backbone, settings, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_network(backbone, **settings)


def test_registration_waits_for_timm():
    """Language models do not pay for timm; whoever imports it afterwards finds our names. (dyn.models itself is left out: it imports transformers.)"""
    code = ("import sys, types\npackage = types.ModuleType('dyn.models'); package.__path__ = ['dyn/models']; sys.modules['dyn.models'] = package\n"
            "from dyn.models import after_timm\nafter_timm.register()\nfrom importlib.util import find_spec; find_spec('timm')\nprint('timm' in sys.modules)\n"
            "import timm\nprint(timm.is_model('padnet_resnet50'), [f for f in sys.meta_path if type(f).__name__ == '_AfterTimm'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.stdout.split("\n")[:2] == ["False", "True []"], done.stderr
