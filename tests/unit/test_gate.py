"""Gate and MoeFeedForward: what each kind chooses, weighs and reports."""

import math

import pytest
import torch

from dyn.nn.experts import GATES, Experts, Gate, GateKind, MoeFeedForward, statistics_of_layers

T, D, E, K = 64, 16, 6, 2


def gate(kind="linear", **changes):
    torch.manual_seed(0)
    k = (GATES[kind].only_k(E) if kind in GATES else None) or K
    return Gate(D, E, changes.pop("k", k), kind, **changes)


def x(dtype=torch.float32):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", GATES)
def test_weights_are_float32_and_sum_to_one_where_the_kind_says_so(kind):
    for dtype in (torch.float32, torch.bfloat16):
        routed = gate(kind).to(dtype)(x(dtype))
        assert routed.weight_TK.dtype == torch.float32 and routed.idx_TK.dtype == torch.int64
        assert (routed.weight_TK.sum(-1) - 1).abs().lt(1e-6).all() == GATES[kind].sums_to_one
        assert (routed.idx_TK.sort(-1).values.diff(dim=-1) > 0).all(), "no expert twice"
        assert routed.load_E.sum() == T * routed.idx_TK.shape[1]


def test_the_selection_bias_stays_in_float32():
    made = gate(balance="bias").to(torch.bfloat16)
    made.selection_bias.fill_(0.5)
    for _ in range(100):
        made.update_bias(torch.tensor([9.0, 1, 1, 1, 1, 1]))
    assert made.weight.dtype == torch.bfloat16
    torch.testing.assert_close(made.selection_bias, torch.tensor([0.4, *[0.6] * 5]), atol=1e-4, rtol=0)
    assert gate(balance="bias").double().selection_bias.dtype == torch.float64


def test_gates_are_left_alone_by_what_replaces_linears():
    """Their weights are read, not called: what would be put in a Linear's place would not be asked."""
    for kind in GATES:
        noisy = GATES[kind].noise is not None
        assert not any(isinstance(m, torch.nn.Linear) for m in gate(kind, noise=noisy).modules())


def test_padding_may_hold_anything():
    mask = torch.arange(T) < 40
    nan = x().masked_fill(~mask[:, None], torch.nan)
    assert gate()(nan, mask).dropped_mass == gate()(x(), mask).dropped_mass


def test_no_token_that_counts_drops_nothing():
    one = gate().eval()
    for tokens, mask in ((x()[:0], None), (x(), torch.zeros(T, dtype=torch.bool))):
        assert one(tokens, mask).dropped_mass == 0
    numbers = torch.arange(T) % 2
    assert torch.equal(one(x(), numbers).dropped_mass, one(x(), numbers.bool()).dropped_mass)


def test_linear_gate_is_top_k_of_the_logits_with_a_softmax_over_the_chosen():
    made = gate()
    top, index = (x() @ made.weight.T).topk(K)
    routed = made(x())
    assert torch.equal(routed.idx_TK, index)
    torch.testing.assert_close(routed.weight_TK, top.softmax(-1))


def test_arithmetic_is_float32_under_autocast_and_in_bfloat16_models():
    made = gate().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(x(torch.bfloat16)).logits_TE
    torch.testing.assert_close(logits, x(torch.bfloat16).float() @ made.weight.float().T)


def test_switch_weighs_with_the_probability_among_all_experts():
    made = gate("switch", noise=True, balance="switch").eval()
    one, two = made(x()), made(x())
    assert torch.equal(one.idx_TK, two.idx_TK), "no noise in evaluation"
    probabilities = (x() @ made.weight.T).softmax(-1)
    torch.testing.assert_close(one.weight_TK[:, 0], probabilities.max(-1).values)
    made.train()
    assert not torch.equal(made(x()).idx_TK, one.idx_TK), "Gumbel noise in training"


def test_an_expert_takes_as_many_tokens_as_its_capacity_in_training_and_all_in_evaluation():
    made, most = gate("switch", balance="switch", capacity_factor=0.5), int(0.5 * T / E)
    free = made.eval()(x())
    limited = made.train()(x())
    kept = limited.weight_TK != 0
    assert torch.equal(limited.idx_TK, free.idx_TK) and torch.equal(limited.weight_TK[kept], free.weight_TK[kept]) and (free.weight_TK != 0).all()
    assert torch.equal(torch.bincount(limited.idx_TK[kept], minlength=E), free.load_E.clamp(max=most).long()) and free.load_E.max() > most
    assert torch.equal(limited.load_E, free.load_E) and torch.equal(limited.balance_loss, free.balance_loss), "who was chosen, not who had room"
    torch.testing.assert_close(limited.dropped_mass, 1 - limited.weight_TK.sum() / T)
    assert not torch.equal(made(x()).weight_TK, limited.weight_TK), "drawn by chance"
    block = MoeFeedForward(made, Experts(E, D, 8))
    torch.manual_seed(5)
    y, routed = block(x())
    assert torch.equal((y != 0).any(-1), routed.weight_TK[:, 0] != 0), "nothing comes out for tokens without room"
    mask = torch.arange(T) < 8  # few enough for every expert
    assert (made(x(), mask).weight_TK[:most] != 0).all(), "padding takes no room from real tokens"


def test_a_new_kind_is_an_entry_of_the_dict(monkeypatch):
    def last_k(clean_TE, noisy_TE, x_TD, E, k, bias_E):
        return torch.arange(E - k, E).expand(len(x_TD), k), torch.full((len(x_TD), k), 1 / k)

    monkeypatch.setitem(GATES, "last", GateKind(last_k))
    assert torch.equal(gate("last")(x()).idx_TK, torch.tensor([E - 2, E - 1]).expand(T, 2))
    with pytest.raises(ValueError, match=r"allowed: .*last"):
        gate("first")


def test_noise_is_for_training_only_and_starts_at_one_deviation():
    made = gate(noise=True)
    assert made.noise.weight.abs().max() == 0
    made.train()
    torch.manual_seed(3)
    one = made(x()).idx_TK
    torch.manual_seed(3)
    assert torch.equal(made(x()).idx_TK, one)
    assert not torch.equal(made(x()).idx_TK, one)
    made.eval()
    first, second = made(x()), made(x())
    for a, b in zip(first[:-1], second[:-1], strict=True):
        assert torch.equal(a, b)
    assert first.choice is None and torch.equal(first.load_E, torch.bincount(first.idx_TK.flatten(), minlength=E).float())


def test_losses_have_gradients_for_the_gate_and_none_without_balance():
    for balance in ("importance_load", "switch"):
        made = gate(noise=True, balance=balance).train()
        routed = made(x())
        routed.balance_loss.backward()
        assert made.weight.grad.abs().sum() > 0
    assert gate(balance="none")(x()).balance_loss == 0
    assert gate("uniform")(x()).balance_loss == 0 and gate("random")(x()).balance_loss == 0


def test_masked_tokens_leave_the_statistics_alone():
    made = gate().eval()
    mask = torch.arange(T) < 40
    masked, alone = made(x(), mask), made(x()[:40])
    for name in ("load_E", "importance_E", "balance_loss", "z_loss", "dropped_mass"):
        torch.testing.assert_close(getattr(masked, name), getattr(alone, name), msg=name)


def test_a_selection_bias_moves_the_choice_and_not_the_weights():
    made = gate(balance="bias").eval()
    made.selection_bias[3] = 10.0
    routed = made(x())
    assert (routed.idx_TK == 3).any(-1).all()
    probabilities = routed.logits_TE.softmax(-1).gather(-1, routed.idx_TK)
    torch.testing.assert_close(routed.weight_TK, probabilities / probabilities.sum(-1, keepdim=True))


def test_statistics_only_where_asked_for():
    routed = gate()(x(), stats=False)
    assert routed.load_E is None and routed.balance_loss is None


def test_scale_and_shared_experts():
    torch.manual_seed(0)
    block = MoeFeedForward(gate(), Experts(E, D, 8), shared_width=4, score_scale=3.0, learnable_scale=True)
    plain = MoeFeedForward(block.gate, block.experts)
    y, _ = block(x())
    routed_sum, _ = plain(x())
    torch.testing.assert_close(y, 3.0 * routed_sum + block.shared_experts(x()), atol=1e-6, rtol=1e-5)
    y.sum().backward()
    assert block.score_scale.grad.abs() > 0
    with pytest.raises(ValueError, match="score_scale"):
        MoeFeedForward(gate(), Experts(E, D, 8), score_scale=float("nan"))


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(kind="linear", k=7), "num_experts_per_tok=7"), (dict(kind="linear", k=0), "num_experts_per_tok=0"), (dict(kind="switch", k=2), "switch"),
    (dict(kind="uniform", k=2), "uniform"), (dict(kind="random", noise=True), "no logits"), (dict(kind="top"), "gate='top'"),
    (dict(balance="equal"), "balance='equal'"), (dict(kind="liner"), "did you mean 'linear'"), (dict(capacity_factor=1.0), "num_experts_per_tok=1, got 2"),
    (dict(kind="switch", capacity_factor=0.0), "capacity_factor=0.0"), (dict(kind="switch", capacity_factor=math.nan), "capacity_factor=nan")])
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        gate(**arguments)


@pytest.mark.parametrize("mask", [None, "padding", "nothing"])
@pytest.mark.parametrize("settings", [
    dict(noise=True), dict(), dict(balance="switch"), dict(balance="none"), dict(balance="bias"), dict(noise=True, legacy_load=True), dict(kind="random"),
], ids=str)
def test_statistics_of_layers_together_are_those_of_each(settings, mask):
    gates = [Gate(D, E, k, **settings).train() for k in (2, 1, 2, E)]
    mask_T = None if mask is None else torch.arange(T) < (T // 2 if mask == "padding" else 0)
    choices = [g.choose(x()) for g in gates]
    parameters = [p for g in gates for p in g.parameters()]
    both = []
    for found in (statistics_of_layers(gates, choices, mask_T),
                  [torch.stack(each) for each in zip(*(g.statistics(c, mask_T).stats() for g, c in zip(gates, choices, strict=True)), strict=True)]):
        balance, z, *_ = found
        loss = (balance + 0.1 * z).sum()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
        both.append([*found, *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=False))])
    for together, each in zip(*both, strict=True):
        torch.testing.assert_close(together, each)
