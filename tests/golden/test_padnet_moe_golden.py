"""PAD-Net: the golden facts of the specification's section 8 about mixtures of experts (23-28), and the counts of section 2.5, at full size.

Networks are built on the meta device; the compact ones from a configuration that says how many positions are dynamic, as a file's does.
"""

import pytest
import torch
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from dyn.core import routing
from dyn.core.partition import kept_count
from dyn.core.saliency import gradient
from dyn.models.encoder import make_moe, moe_class, moe_layers
from dyn.nn.count import count_parameters
from dyn.nn.experts import Gate
from dyn.nn.linear_experts import LinearExperts
from dyn.nn.partial import switches
from dyn.ops.linear import partial_routed_linear, routed_linear

FEED_FORWARD = 12 * 2 * 768 * 3072
ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ALBERT = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)


def meta(model_class, config, pooler=True):
    with torch.device("meta"):
        return model_class(config, add_pooling_layer=pooler)


def compact(model_class, dense_config, where, keep, pooler=True):
    """The same model with `keep` of its positions dynamic, in compact form."""
    model = make_moe(meta(model_class, dense_config, pooler), where=where)
    sizes = [layer.weight[0].numel() for layer in moe_layers(model).values()]
    config = model.config
    config.moe_form, config.moe_scales, config.moe_dynamic = "compact", "both", [kept_count(size, keep, "up") for size in sizes]
    return meta(moe_class(model_class), config, pooler)


@pytest.mark.parametrize(("pooler", "where", "dense", "moe", "partial"), [
    (True, "both", 109_482_240, 506_903_808, 308_722_944), (True, "out", 109_482_240, 308_317_440, 209_227_008),
    (False, "both", 108_891_648, 506_903_808 - 590_592, 308_722_944 - 590_592),
])
def test_counts_of_bert_base(pooler, where, dense, moe, partial):
    """Fact 26, exactly."""
    model = meta(BertModel, BertConfig(), pooler)
    assert count_parameters(model)["total"] == dense
    counts = count_parameters(make_moe(model, where=where))
    assert counts["total"] == counts["stored"] == counts["trainable"] == moe
    assert counts["gate"] == {"both": 737_280, "out": 12 * 2 * 8 * 3072}[where]
    share = 1 if where == "both" else 0.5
    assert counts["active"] == dense + FEED_FORWARD * share + 12 * (768 + 3072 * (where == "both"))  # two experts a token
    small = count_parameters(compact(BertModel, BertConfig(), where, 0.5, pooler))
    assert small["total"] == small["stored"] == partial


@pytest.mark.parametrize(("model_class", "config", "pooler", "where", "millions"), [
    (RobertaModel, RobertaConfig(**ROBERTA), False, "both", (124.06, 521.48, 323.30)),
    (AlbertModel, AlbertConfig(**ALBERT), True, "both", (11.68, 44.80, 28.29)), (AlbertModel, AlbertConfig(**ALBERT), True, "out", (11.68, 28.25, 20.00)),
])
def test_counts_of_others(model_class, config, pooler, where, millions):
    """Section 2.5, to the digits that it gives; ALBERT shares one layer."""
    dense = meta(model_class, config, pooler)
    found = [count_parameters(dense)["total"]]
    found += [count_parameters(make_moe(dense, where=where))["total"], count_parameters(compact(model_class, config, where, 0.5, pooler))["total"]]
    assert [f"{n / 1e6:.2f}" for n in found] == [f"{m:.2f}" for m in millions]


def test_identical_experts_are_the_dense_linear():
    """Fact 23, for whatever the gate says."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 7, dtype=torch.float64)
    x = torch.randn(50, 12, dtype=torch.float64)
    for gate, k in (("linear", 2), ("mlp", 3), ("uniform", 5), ("random", 2)):
        experts = LinearExperts.from_linear(linear, 5, k, gate=gate, gate_noise=gate in ("linear", "mlp")).train()
        torch.testing.assert_close(experts(x), linear(x), rtol=0, atol=5e-15)


def test_gates():
    """Facts 24 and 25."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    gate = Gate(6, 8, 3, noise=True).double().train()
    choice = gate.choose(x)
    assert choice.idx_TK.shape == (40, 3) and (choice.weight_TK > 0).all()
    torch.testing.assert_close(choice.weight_TK.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(choice.std_TE, torch.full((40, 8), 0.70315, dtype=torch.float64), rtol=0, atol=5e-6)
    whole = Gate(6, 8, 8).double().eval()
    choice = whole.choose(x)
    torch.testing.assert_close(choice.weight_TK, choice.clean_TE.softmax(-1).gather(1, choice.idx_TK))
    assert routing.cv_squared(torch.ones(8)) == 0
    torch.testing.assert_close(routing.cv_squared(torch.eye(8)[0].double()), torch.tensor(8.0, dtype=torch.float64))


def test_the_factorisation():
    """Fact 27."""
    g = torch.Generator().manual_seed(0)
    x, static, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((30, 9), (5, 9), (4, 5, 9)))
    mask = torch.rand(5, 9, generator=g) < 0.4
    scores, idx = torch.rand(30, 4, generator=g, dtype=torch.float64).topk(2)
    forms = [partial_routed_linear(x, weight, static, mask, idx, scores, dynamic_scale=1.3, static_scale=0.7, form=form) for form in ("merged", "factorised")]
    one = routed_linear(x, torch.where(mask, 1.3 * weight, 0.7 * static), idx, scores)
    for form in forms:
        torch.testing.assert_close(form, one, rtol=0, atol=1e-13)


def test_upcycled_saliency():
    """Fact 28: the mode switch of copies says nothing; of copies with noise it does, and so does their removal."""
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (4, 9))

    def loss(model, batch):
        return model(batch).last_hidden_state.sin().sum()

    for noise, silent in ((0.0, True), (0.05, False)):
        torch.manual_seed(1)
        model = make_moe(BertModel(config).double(), 4, 2, noise=noise)
        layers = moe_layers(model)
        for layer in layers.values():
            layer.add_partial()
            layer.partial.hold(torch.ones_like(layer.weight[0], dtype=torch.bool), layer.weight.detach().mean(0))
        switch, removal = switches(model, layers, [ids], loss)
        largest = max(s.abs().max().item() for s in switch.values())
        assert (largest < 1e-13) is silent
        assert min(r.abs().max().item() for r in removal.values()) > 1e-4
        found = gradient(model, [ids], loss, [f"{name}.weight" for name in layers])  # removal is sum_e W_e dL/dW_e
        for name, layer in layers.items():
            torch.testing.assert_close(removal[name], (layer.weight * found[f"{name}.weight"]).sum(0), rtol=1e-9, atol=1e-12)
