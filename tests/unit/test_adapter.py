"""attach, set_active, detach, merge: flags, presets, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dyn.nn.adapter import adapter_parameters, adapters, attach, detach, fusion_penalty, head_parameters, merge, set_active, unmerge
from dyn.nn.adapter_modules import Bottleneck, Fusion, LoRA
from dyn.nn.adapter_sites import adapter_modules
from dyn.nn.count import macs_per_sentence
from dyn.nn.masking import drop_masks, prune


def first(model):
    return next(iter(adapter_modules(model).values()))


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("adapter", {}, "kind='adapter' is unknown; allowed: 'houlsby', 'pfeiffer'"),
    ("houlsby", {"alpha": 8}, "houlsby has no flag 'alpha'; it has r, layer_norm"),
    ("houlsby", {"r": 0}, "r=0 must be an int of at least 1"),
    ("houlsby", {"r": 2.5}, "r=2.5 must be an int"),
    ("houlsby", {"layer_norm": "pre"}, "layer_norm='pre' is unknown; allowed: 'none', 'in', 'out'"),
    ("houlsby", {"init": "zero"}, "init='zero' is unknown; allowed: 'bert', 'lora', 'zero_up'"),
    ("pfeiffer", {"activation": "swish"}, "activation='swish' is unknown"),
    ("parallel", {"scale": "learned"}, "scale='learned' must be a number or 'learnable'"),
    ("parallel", {"scale": float("nan")}, "scale=nan must be a number"),
    ("parallel", {"scale": True}, "scale=True must be a number"),
    ("lora", {"alpha": "8"}, "alpha='8' must be a number above 0"),
    ("lora", {"alpha": 0}, "alpha=0 must be a number above 0"),
    ("lora", {"dropout": "0.1"}, r"dropout='0.1' must lie in \[0, 1\)"),
    ("parallel", {"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ("lora", {"where": "queries"}, "where='queries' is unknown; allowed: 'query', 'key', 'value', 'output', 'ffn'"),
    ("lora", {"where": ()}, "names no projection"),
    ("houlsby", {"name": "a.b"}, "name='a.b'"),
    ("houlsby", {"name": "pop"}, "name='pop'"),
    ("houlsby", {"name": "active"}, "name='active'"),
    ("houlsby", {"name": "delta"}, "name='delta'"),
    ("houlsby", {"name": "there"}, "an adapter 'there' is attached already"),
    ("houlsby", {"layers": [2]}, r"layers=\[2\] must be indices in 0..1"),
    ("houlsby", {"layers": []}, r"layers=\[\] must be indices"),
    ("fusion", {}, r"members=\(\) must name one or more adapters"),
    ("fusion", {"members": ["x"]}, "no adapter 'x' is attached; there are there"),
    ("fusion", {"members": ["there"]}, r"must all be bottleneck adapters .* has there \(LoRA\)"),
])
def test_refused_with_the_reason_and_nothing_done(tiny_host, kind, options, words):
    model = attach(tiny_host(), "lora", 2, "there")
    keys, wanted = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        attach(model, kind, **options)
    assert list(model.state_dict()) == keys and [p.requires_grad for p in model.parameters()] == wanted and list(adapters(model)) == ["there"]


class Int8Linear(nn.Linear):
    """As quantised hosts have it: a weight of integers, a scale beside it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_hosts(tiny_host, tiny_text):
    model = tiny_host()
    for path, module in [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and ".layer." in path]:
        model.set_submodule(path, Int8Linear(module))
    attach(model, "lora", 2)
    attach(model, "houlsby", 2, "second")
    assert all(p.dtype == torch.float32 for name in ("default", "second") for p in adapter_parameters(model, name).values())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"query.weight is torch.int8: a quantised weight cannot take a LoRA"):
        merge(model, "default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    packed = torch.ao.quantization.quantize_dynamic(tiny_host(), {nn.Linear})
    with pytest.raises(ValueError, match="has no parameters to sit beside; is it quantised"):
        attach(packed, "houlsby", 2)


def test_hosts_that_do_not_fit(tiny_host):
    from transformers import GPT2Config, GPT2Model

    with pytest.raises(ValueError, match="Linear holds no model of transformers; adapters sit on bert, roberta"):
        attach(nn.Linear(2, 2), "houlsby")
    with pytest.raises(ValueError, match=r"GPT2Model .*'gpt2'.* has no layer whose parts are known"):
        attach(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), "houlsby")
    with pytest.raises(ValueError, match="feed-forward block of LlamaMoeForCausalLM has no linear map of its own"):
        attach(tiny_host("llama_moe", "lm"), "lora", where=("query", "ffn"))
    with pytest.raises(ValueError, match=r"fusion: a, b must all be bottleneck adapters .* of the same places"):
        attach(attach(attach(tiny_host(), "houlsby", 2, "a"), "pfeiffer", 2, "b"), "fusion", members=["a", "b"])
    model = tiny_host("llama")
    model.model.layers[1].mlp.sequential = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="LlamaMLP: it has a 'sequential' of its own"):
        attach(model, "houlsby", 2)
    assert not adapter_modules(model)


@pytest.mark.parametrize(("kind", "r"), [("houlsby", 64), ("pfeiffer", 64), ("parallel", 64), ("lora", 8), ("prefix", 16), ("mam", 16)])
def test_defaults(tiny_host, kind, r):
    config = adapters(attach(tiny_host(), kind))["default"]
    assert config.flags["r"] == r and config.head and config.flags.get("dropout") == 0.0


def test_flags_reach_the_modules(tiny_host):
    block = first(attach(tiny_host(), "parallel", 6, layer_norm="out", activation="gelu", init="zero_up", scale="learnable", dropout=0.3))
    assert (block.down.out_features, block.norm_at, block.activation, block.dropout) == (6, "out", "gelu", 0.3)
    assert block.scale.shape == (1,) and block.scale.item() == 1 and not block.up.weight.any() and 0.01 < block.down.weight.std() < 0.04
    x = torch.randn(3, 32)
    with torch.no_grad():
        block.up.weight.normal_()
        block.scale.fill_(2.0)
        expected = block.norm(2 * (torch.nn.functional.gelu(x @ block.down.weight.T) @ block.up.weight.T))
        assert torch.allclose(block.eval()(x), expected, atol=1e-5)
    lora = first(attach(tiny_host(), "lora", 4, alpha=6.0, where=("output",), dropout=0.2))
    assert isinstance(lora, LoRA) and (lora.scaling, lora.dropout) == (1.5, 0.2) and lora.A.weight.abs().max() <= 32**-0.5 and not lora.B.weight.any()
    mam = attach(tiny_host(), "mam", 4, length=6)
    assert {m.length for m in adapter_modules(mam).values() if m.kind == "prefix"} == {6}


def test_official(tiny_host):
    model = attach(tiny_host(hidden_dropout_prob=0.25), "houlsby", 4, official=True, scale=3.0, init="lora", layer_norm="out")
    blocks = {path: m for path, m in adapter_modules(model).items() if ".0." in path}
    attention, ffn = blocks.values()
    assert list(blocks) == [f"bert.encoder.layer.0.{place}.sequential.default" for place in ("attention.output.dense", "output.dropout")]
    assert (attention.norm_at, attention.scale, attention.dropout, ffn.norm_at, ffn.scale) == ("in", 1.0, 0.25, "out", 3.0)
    assert attention.up.weight.any() and not ffn.up.weight.any()
    assert not head_parameters(model) and not model.classifier.weight.requires_grad
    assert first(attach(tiny_host(), "lora", 4, official=True)).B.weight.any()
    assert first(attach(tiny_host("bart"), "pfeiffer", 4, official=True)).norm_at == "in"


def test_the_seed_alone_decides(tiny_host):
    found = []
    for noise in (1, 2):
        model = tiny_host()
        torch.manual_seed(noise)
        attach(model, "mam", 4, seed=7)
        assert torch.initial_seed() == noise and torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(noise)))
        found.append(adapter_parameters(model))
    assert all(torch.equal(p, found[1][key]) for key, p in found[0].items())


@pytest.mark.parametrize(("family", "task", "parts"), [
    ("bert", "classify", {"classifier"}), ("roberta", "classify", {"classifier"}), ("electra", "classify", {"classifier"}),
    ("albert", "classify", {"classifier"}), ("distilbert", "classify", {"pre_classifier", "classifier"}),
    ("bart", "classify", {"classification_head"}), ("llama", "classify", {"score"}),
    ("bert", "qa", {"qa_outputs"}), ("llama", "qa", {"qa_outputs"}), ("llama", "lm", set()), ("bart", "lm", set()), ("bert", "base", set()),
])
def test_the_last_head_trains(tiny_host, family, task, parts):
    model = attach(tiny_host(family, task), "pfeiffer", 4)
    assert {key.split(".")[0] for key in head_parameters(model)} == parts
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == set(head_parameters(model)) | set(adapter_parameters(model)) and not any("pooler" in key for key in trained)
    assert not head_parameters(attach(tiny_host(family, task), "pfeiffer", 4, head=False))


def test_a_head_that_is_free_again_trains_alone(tiny_host):
    model = attach(attach(tiny_host(), "pfeiffer", 4, "a"), "pfeiffer", 4, "b")
    attach(detach(model, "a"), "pfeiffer", 4, "c")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "c")) | set(head_parameters(model, "c"))
    assert set(head_parameters(model, "c")) == {"classifier.weight", "classifier.bias"}


def test_attaching_freezes_the_others(tiny_host):
    model = attach(attach(tiny_host(), "pfeiffer", 4, "a"), "pfeiffer", 4, "b")
    assert not any(p.requires_grad for p in (*adapter_parameters(model, "a").values(), *head_parameters(model, "a").values()))
    assert all(p.requires_grad for p in (*adapter_parameters(model, "b").values(), *head_parameters(model, "b").values()))
    assert set(head_parameters(model, "b")) == {"classifier.heads.b.weight", "classifier.heads.b.bias"}
    detach(model, "a")
    attach(model, "pfeiffer", 4, "c")
    assert set(head_parameters(model, "c")) == {"classifier.weight", "classifier.bias"}


def test_albert_shares_with_its_layers(tiny_host):
    model = attach(tiny_host("albert", num_hidden_layers=5), "houlsby", 4)
    assert len(adapter_modules(model)) == 2


def test_multiplications_are_counted_beside_adapters(tiny_host, tiny_text):
    model = attach(tiny_host(), "lora", 4)
    set_active(model, ["default", None])
    assert macs_per_sentence(set_active(model, "default"), 8) > macs_per_sentence(tiny_host(), 8) and model(**tiny_text())[0].isfinite().all()


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_chunked_feed_forward(tiny_host, tiny_text, family, chunk):
    """transformers may run the feed-forward block on parts of the length; adapters there are by position, so nothing changes."""
    batch, found = tiny_text(3, 9), []
    for size in (0, chunk):
        model = attach(tiny_host(family, chunk_size_feed_forward=size), "mam", 4, init="bert", seed=0)
        found.append(model(**batch)[0])
    assert torch.allclose(*found, atol=1e-6)


def test_precision(tiny_host, tiny_text):
    model = attach(tiny_host().bfloat16(), "mam", 4, dtype=torch.float32, init="bert")
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model(**tiny_text())[0].dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(attach(tiny_host().bfloat16(), "houlsby", 4)).values()} == {torch.bfloat16}


def test_what_cannot_be_chosen_or_merged(tiny_host):
    model = attach(attach(tiny_host(), "lora", 4, "a"), "pfeiffer", 4, "b")
    for call, words in (
        (lambda: set_active(model, "c"), "no adapter 'c'; attached: 'a', 'b'"),
        (lambda: set_active(model, ["a", "c"]), "no adapter 'c'"),
        (lambda: set_active(model, []), "names no sample"),
        (lambda: set_active(tiny_host(), "a"), "no adapter 'a'; attached: none"),
        (lambda: merge(model), "of kind pfeiffer, which no weight can express"),
        (lambda: merge(set_active(model, ["a", "b"])), "merge needs one adapter; acting: a, b"),
        (lambda: unmerge(model), "no adapter is merged"),
        (lambda: detach(model, "c"), "no adapter 'c'"),
        (lambda: fusion_penalty(model, "b"), "is no fusion"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    merge(model, "a")
    for call in (lambda: merge(model, "a"), lambda: set_active(model, "b"), lambda: set_active(model, None), lambda: detach(model, "b"),
                 lambda: attach(model, "pfeiffer", 4, "c")):
        with pytest.raises(ValueError, match="'a' is merged into the weights; unmerge first"):
            call()
    attach(detach(unmerge(model), "a"), "fusion", name="f", members=["b"])
    with pytest.raises(ValueError, match="'b' is a member of the fusion 'f'"):
        detach(model, "b")


def test_a_pruned_weight_takes_no_merge(tiny_host, tiny_text):
    for form in ("mask", "flat"):
        model = attach(prune(tiny_host(), None, None, "magnitude", params="query.weight", form=form), "lora", 4)
        before = model(**tiny_text())[0]
        with pytest.raises(ValueError, match=r"query.weight is pruned.*first drop_masks"):
            merge(model)
        assert torch.equal(model(**tiny_text())[0], before)
        merge(drop_masks(model))


def test_fusion_by_hand():
    torch.manual_seed(0)
    fusion, q, outputs = Fusion(8, ["a", "b"]), torch.randn(3, 5, 8), [torch.randn(3, 5, 8) for _ in range(2)]
    fusion.draw()
    assert torch.equal(fusion.value.weight, torch.eye(8) + 1e-6 * (1 - torch.eye(8))) and not fusion.query.bias.any()
    with torch.no_grad():
        for p in fusion.parameters():
            p.normal_()
        scores = torch.stack([(fusion.query(q) * fusion.key(z)).sum(-1) for z in outputs], -1).softmax(-1)
        expected = sum(scores[..., n, None] * fusion.value(z) for n, z in enumerate(outputs))
        assert torch.allclose(fusion(q, outputs), expected, atol=1e-5)
        assert torch.allclose(fusion.penalty(), ((torch.eye(8) - fusion.value.weight) ** 2).sum())


def test_fusion_trains_alone_and_its_penalty(tiny_host, tiny_text):
    model = attach(attach(attach(tiny_host(), "houlsby", 4, "a"), "houlsby", 4, "b"), "fusion", name="f", members=["a", "b"])
    assert len(adapter_parameters(model, "f")) == 4 * 5
    assert fusion_penalty(model, "f").item() == pytest.approx(0.01 * 4 * 32 * 31 * 1e-12, rel=1e-3)
    (model(**tiny_text())[0].sum() + fusion_penalty(model, "f")).backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(adapter_parameters(model, "f") | head_parameters(model, "f"))


def test_r_as_wide_as_the_host(tiny_host, tiny_text):
    """Nothing is told apart by its shape: r == d is a bottleneck like any other."""
    model = attach(tiny_host(), "houlsby", 32)
    assert isinstance(first(model), Bottleneck) and first(model).down.weight.shape == first(model).up.weight.shape
    assert model(**tiny_text())[0].isfinite().all()
