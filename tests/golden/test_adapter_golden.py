"""Golden facts of SparseAdapter's specification (section 8) about adapters: parameter counts on full-size shapes, and how far from its host one starts."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from dyn.nn.adapter import adapter_parameters, attach, detach
from dyn.nn.adapter_modules import Bottleneck
from dyn.nn.adapter_sites import adapter_modules


@pytest.fixture(scope="module")
def backbones():
    with torch.device("meta"):
        return {"bert": BertModel(BertConfig()), "roberta": RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
                "bart": BartModel(BartConfig())}


def counts(model, kind, r, **flags):
    """Parameters and prunable weights of an adapter."""
    attach(model, kind, r, **flags)
    total = sum(p.numel() for p in adapter_parameters(model).values())
    weights = sum(m.get_parameter(key).numel() for m in adapter_modules(model).values() for key in m.prunable)
    detach(model)
    return total, weights


@pytest.mark.parametrize("host", ["bert", "roberta"])
@pytest.mark.parametrize(("kind", "r", "flags", "total", "weights"), [
    ("houlsby", 64, {}, 2_379_264, 2_359_296),
    ("houlsby", 64, {"attention_layer_norm": "in"}, 2_397_696, 2_359_296),
    ("houlsby", 64, {"layer_norm": "in"}, 2_416_128, 2_359_296),
    ("houlsby", 64, {"official": True}, 2_416_128, 2_359_296),
    ("houlsby", 64, {"official": True, "layer_norm": "none"}, 2_397_696, 2_359_296),
    ("houlsby", 64, {"scale": "learnable"}, 2_379_264 + 24, 2_359_296),
    ("houlsby", 16, {}, 608_640, 589_824),
    ("houlsby", 256, {}, 9_461_760, 9_437_184),
    ("houlsby", 512, {}, 18_905_088, 18_874_368),
    ("pfeiffer", 64, {}, 1_189_632, 1_179_648),
    ("pfeiffer", 48, {}, 894_528, 884_736),
    ("lora", 8, {}, 294_912, 294_912),
    ("lora", 10, {}, 368_640, 368_640),
    ("lora", 16, {}, 589_824, 589_824),
    ("lora", 64, {}, 2_359_296, 2_359_296),
    ("lora", 10, {"where": "ffn"}, 921_600, 921_600),
    ("lora", 10, {"where": ("query", "value", "ffn")}, 1_290_240, 1_290_240),
    ("prefix", 16, {}, 294_912, 294_912),
    ("parallel", 16, {}, 304_320, 294_912),
    ("mam", 16, {}, 599_232, 589_824),
    ("prefix", 16, {"reparam": True}, 15_391_520, 0),
])
def test_counts_on_base_models(backbones, host, kind, r, flags, total, weights):
    assert counts(backbones[host], kind, r, **flags) == (total, weights)


@pytest.mark.parametrize(("kind", "r", "flags", "total"), [
    ("houlsby", 64, {}, 7_929_600), ("houlsby", 200, {}, 24_649_440), ("houlsby", 512, {}, 63_006_720), ("pfeiffer", 64, {}, 3_171_840),
    ("parallel", 512, {}, 25_202_688), ("prefix", 30, {}, 2_211_840), ("mam", 512, {"length": 30}, 27_414_528),
])
def test_counts_on_bart_large(backbones, kind, r, flags, total):
    assert counts(backbones["bart"], kind, r, **flags)[0] == total


def test_houlsby_on_bart_large_has_60_blocks(backbones):
    attach(backbones["bart"], "houlsby", 64)
    assert len(adapter_modules(backbones["bart"])) == 60
    detach(backbones["bart"])


@pytest.mark.parametrize(("value", "layer", "total"), [(True, 1_771_008, 21_252_096), (False, 1_771_008 - 768**2, 14_174_208)])
def test_fusion_counts(backbones, value, layer, total):
    model = backbones["bert"]
    for name in ("a", "b"):
        attach(model, "pfeiffer", 64, name)
    attach(model, "fusion", name="both", members=("a", "b"), value=value)
    found = adapter_parameters(model, "both")
    assert sum(p.numel() for p in found.values()) == total
    assert sum(p.numel() for key, p in found.items() if ".layer.0." in key) == layer
    assert not any(p.requires_grad for name in ("a", "b") for p in adapter_parameters(model, name).values())
    for name in ("both", "a", "b"):
        detach(model, name)


def test_a_block():
    def size(**flags):
        return sum(p.numel() for p in Bottleneck(768, 64, device="meta", **flags).parameters())

    assert (size(), size(norm="in"), size(scale="learnable")) == (99_136, 99_136 + 1_536, 99_137)


def test_backbones(backbones):
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in backbones.items()}
    assert sizes == {"bert": 109_482_240, "roberta": 124_645_632, "bart": 406_291_456}
    assert round(100 * 2_379_264 / sizes["roberta"], 4) == 1.9088


def disturbance(r, keep=1.0, draws=8):
    """||A(x)|| / ||x|| of N(0, 0.02^2) matrices under a random mask."""
    found = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        block = Bottleneck(768, r)
        block.draw("bert", generator)
        with torch.no_grad():
            for weight in (block.down.weight, block.up.weight):
                weight *= torch.rand(weight.shape, generator=generator) < keep
            x = torch.randn(64, 768, generator=generator)
            found.append((block(x).norm() / x.norm()).item())
    return sum(found) / draws


@pytest.mark.parametrize(("r", "keep", "expected"), [(64, 1.0, 0.0627), (64, 0.6, 0.0376), (256, 0.25, 0.0314)])
def test_disturbance_at_the_start(r, keep, expected):
    assert disturbance(r, keep) == pytest.approx(expected, rel=0.05)

