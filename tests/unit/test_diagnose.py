"""Diagnostics of conversions: ceilings that meet the dense model where they must, exact counts, and nothing changed afterwards."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyn.models import llama_moe_diagnose as diagnose
from dyn.models.llama_moe import from_dense

BATCHES = [torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).double().eval()
    for layer in model.model.layers:  # large enough to matter beside the residual stream
        layer.mlp.down_proj.weight.data *= 40
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCHES[0], use_cache=False).logits


def mixture(dense=None, **changes):
    settings = dict(num_experts=4, num_experts_per_tok=2, score_scale="k") | changes
    return from_dense(tiny() if dense is None else dense, batches=BATCHES, **settings)


def test_oracle_with_every_neuron_is_the_dense_model_exactly():
    dense = tiny()
    before = logits(dense)
    with diagnose.neuron_oracle(dense, 1):
        assert torch.equal(logits(dense), before)
    with diagnose.neuron_oracle(dense, 0.25):
        assert not torch.allclose(logits(dense), before)
    assert torch.equal(logits(dense), before)


@pytest.mark.parametrize(("keep", "count"), [(Fraction(1, 4), 6), (0.5, 12), (1 / 3, 8), (0.9, 22), (0.03, 1)])
def test_oracle_counts_are_exact(keep, count):
    dense, seen = tiny(), []
    with diagnose.neuron_oracle(dense, keep):
        hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in dense.model.layers]
        logits(dense)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 and all(((h != 0).sum(-1) == count).all() for h in seen)


def test_oracle_takes_the_largest_effects():
    dense = tiny(num_hidden_layers=1)
    down, seen = dense.model.layers[0].mlp.down_proj, []
    hook = lambda _, args: seen.append(args[0])  # noqa: E731
    for keep in (1, 0.5):
        with diagnose.neuron_oracle(dense, keep):
            handle = down.register_forward_pre_hook(hook)
            logits(dense)
            handle.remove()
    full, kept = seen
    effect = full.abs() * down.weight.norm(dim=0)
    least = effect.where(kept != 0, torch.inf).amin(-1)
    most = effect.where(kept == 0, -torch.inf).amax(-1)
    assert (least >= most).all() and torch.equal(kept[kept != 0], full[kept != 0])


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, math.nan])
def test_oracle_refuses_a_keep_outside(keep):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"), diagnose.neuron_oracle(tiny(), keep):
        pass


def test_oracle_refuses_other_models_and_no_neurons():
    with pytest.raises(ValueError, match="leaves none of the 24 neurons of layer 0"), diagnose.neuron_oracle(tiny(), 0.01):
        pass
    with pytest.raises(ValueError, match="got LlamaMoeForCausalLM"), diagnose.neuron_oracle(mixture(), 0.5):
        pass


@pytest.mark.parametrize("criterion", ["norm", "residual"])
def test_ideal_routing_over_everything_is_the_dense_model(criterion):
    dense = tiny()
    moe = mixture(dense, num_experts_per_tok=4, gate="uniform", score_scale="n")
    with diagnose.ideal_routing(moe, criterion):
        torch.testing.assert_close(logits(moe), logits(dense))


@pytest.mark.parametrize("changes", [dict(), dict(gate="mlp"), dict(num_shared_experts=2), dict(balance="bias")])
def test_ideal_routing_with_every_expert_is_the_model_itself(changes):
    moe = mixture(num_experts_per_tok=4, **changes)
    before = logits(moe)
    with diagnose.ideal_routing(moe):
        torch.testing.assert_close(logits(moe), before)
    assert torch.equal(logits(moe), before)


def test_ideal_routing_weighs_as_the_gate_would():
    """Experts chosen ideally get the weights that the gate gives them when its logits make it choose them."""
    moe = mixture(num_experts_per_tok=2)
    x_TD = torch.randn(9, 16, dtype=torch.float64)
    mlp = moe.model.layers[0].mlp
    with diagnose.ideal_routing(moe):
        routed = mlp.gate(x_TD)
    picked = routed.logits_TE.gather(1, routed.idx_TK)
    torch.testing.assert_close(routed.weight_TK, picked.softmax(-1))
    assert routed.load_E.tolist() == torch.bincount(routed.idx_TK.flatten(), minlength=4).tolist()
    norms = diagnose.contributions(mlp.experts, x_TD)
    torch.testing.assert_close(norms.gather(1, routed.idx_TK), norms.sort(dim=-1, descending=True).values[:, :2])


def test_contributions_are_the_norms_of_single_experts():
    mlp = mixture().model.layers[0].mlp
    x_TD = torch.randn(5, 16, dtype=torch.float64)
    norms = diagnose.contributions(mlp.experts, x_TD)
    for e in range(4):
        alone = mlp.experts(x_TD, torch.full((5, 1), e), torch.ones(5, 1))
        torch.testing.assert_close(norms[:, e], alone.norm(dim=-1).float())


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_the_greedy_criterion_is_no_worse_than_the_largest(chunk, monkeypatch):
    monkeypatch.setattr(diagnose, "CHUNK", chunk)
    experts = mixture().model.layers[0].mlp.experts
    x_TD = torch.randn(64, 16, dtype=torch.float64)
    y_TED = torch.stack([experts(x_TD, torch.full((64, 1), e), torch.ones(64, 1)) for e in range(4)], dim=1)
    error = lambda idx_TK: (y_TED.sum(1) - y_TED.gather(1, idx_TK[..., None].expand(-1, -1, 16)).sum(1)).norm(dim=-1)  # noqa: E731
    greedy, largest = (error(diagnose.ideal_experts(experts, x_TD, 1, name)) for name in ("residual", "norm"))
    best = torch.stack([error(torch.full((64, 1), e)) for e in range(4)]).amin(0)
    torch.testing.assert_close(greedy, best, atol=1e-5, rtol=1e-5)
    assert (greedy <= largest + 1e-5).all()
    every = diagnose.ideal_experts(experts, x_TD, 4, "residual")
    assert every.sort(dim=-1).values.tolist() == [[0, 1, 2, 3]] * 64


def test_ideal_routing_refusals():
    with pytest.raises(ValueError, match="got LlamaForCausalLM"), diagnose.ideal_routing(tiny()):
        pass
    with pytest.raises(ValueError, match=r"criterion='best'.*norm, residual"), diagnose.ideal_routing(mixture(), "best"):
        pass


def test_routing_statistics_of_a_gate_that_takes_everything():
    found = diagnose.routing_statistics(mixture(num_experts_per_tok=4, gate="uniform"), BATCHES)
    assert found["accuracy"] == [1.0, 1.0] and found["captured"] == pytest.approx([1.0, 1.0])
    assert found["mean_entropy"] == pytest.approx([1.0, 1.0]) and found["token_entropy"] == pytest.approx([1.0, 1.0])
    assert found["load_entropy"] == pytest.approx([1.0, 1.0])
    assert found["load"] == [[288] * 4] * 2 and found["chance"] == [1.0, 1.0]


def test_routing_statistics_stream_and_agree_with_the_ideal():
    entropy_of = lambda load: float(torch.distributions.Categorical(torch.tensor(load, dtype=torch.float64)).entropy())  # noqa: E731
    moe = mixture()
    whole, parts = diagnose.routing_statistics(moe, [torch.cat(BATCHES)]), diagnose.routing_statistics(moe, BATCHES)
    for name, values in whole.items():
        for a, b in zip(values, parts[name], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    for layer in range(2):
        assert sum(whole["load"][layer]) == 2 * 6 * 48
        assert 0 < whole["accuracy"][layer] < 1 and 0 < whole["captured"][layer] < 1
        assert whole["load_entropy"][layer] == pytest.approx(entropy_of(whole["load"][layer]) / math.log(4))
        assert 0 <= whole["token_entropy"][layer] <= whole["mean_entropy"][layer] <= 1 + 1e-9
    with diagnose.ideal_routing(moe):  # its hooks run before those of the statistics, which then see ideal choices
        ideal = diagnose.routing_statistics(moe, BATCHES)
    assert ideal["accuracy"] == [1.0, 1.0] and ideal["captured"] == pytest.approx([1.0, 1.0])


def test_a_gate_that_prefers_one_expert():
    moe = mixture(num_experts_per_tok=1)
    for layer in moe.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.logits = lambda x_TD: torch.tensor([9.0, 0.0, 0.0, 0.0]).expand(len(x_TD), 4)
    found = diagnose.routing_statistics(moe, BATCHES)
    assert found["load"] == [[288, 0, 0, 0]] * 2 and found["load_entropy"] == [0.0, 0.0] and found["mean_entropy"][0] < 0.01
    assert found["mean_entropy"] == pytest.approx(found["token_entropy"])


def test_statistics_refuse_wrong_ids():
    with pytest.raises(ValueError, match="vocab_size=61"):
        diagnose.routing_statistics(mixture(), [torch.full((1, 8), 61)])
    with pytest.raises(ValueError, match="got LlamaForCausalLM"):
        diagnose.routing_statistics(tiny(), BATCHES)


def test_contributions_of_layers():
    dense = tiny()
    moe = mixture(dense)
    states = [copy.deepcopy(m.state_dict()) for m in (dense, moe)]
    seen = []
    found = diagnose.layer_contributions(moe, dense, BATCHES, seen.append)
    assert seen == [0, 1] and {len(v) for v in found.values()} == {2}
    for model, state in zip((dense, moe), states, strict=True):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()) and state.keys() == model.state_dict().keys()
    loss = lambda model: diagnose.domain_losses(model, {"a": BATCHES})["a"]  # noqa: E731
    mixed = copy.deepcopy(dense)  # both layers converted, by hand: the second on top of the first
    mixed.model.layers[0].mlp = diagnose._AsDense(moe.model.layers[0].mlp)
    assert found["alone"][0] == pytest.approx(loss(mixed) - loss(dense))
    assert found["restored"][1] == pytest.approx(loss(moe) - loss(mixed))


def test_contributions_of_a_conversion_that_changes_nothing():
    dense = tiny()
    found = diagnose.layer_contributions(mixture(dense, num_experts_per_tok=4, gate="uniform", score_scale="n"), dense, BATCHES)
    assert found["alone"] + found["restored"] == pytest.approx([0.0] * 4, abs=1e-9)


def test_contributions_of_a_smaller_dense_model():
    dense, small = tiny(), tiny(intermediate_size=12)
    assert len(diagnose.layer_contributions(small, dense, BATCHES)["restored"]) == 2
    with pytest.raises(ValueError, match="number of layers: 1 in the converted model, 2"):
        diagnose.layer_contributions(tiny(num_hidden_layers=1), dense, BATCHES)


def test_domain_losses_weigh_tokens():
    dense = tiny()
    dense.train()
    found = diagnose.domain_losses(dense, {"a": BATCHES[:1], "b": [BATCHES[0][:1, :5], BATCHES[1]]})
    with torch.no_grad():
        parts = [dense(input_ids=b, labels=b).loss for b in (BATCHES[0], BATCHES[0][:1, :5], BATCHES[1])]
    assert found["a"] == pytest.approx(float(parts[0]), rel=1e-5)
    assert found["b"] == pytest.approx(float((4 * parts[1] + 44 * parts[2]) / 48), rel=1e-5)
    assert dense.training and all(p.requires_grad for p in dense.parameters())
    with pytest.raises(ValueError, match="batches is empty"):
        diagnose.domain_losses(dense, {"a": []})
