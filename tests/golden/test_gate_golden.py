"""The specification's golden facts about combining experts (1-6, 9) and about gate statistics (17-24), in float64 unless
the fact is about a sample. Facts about partitions and parameter counts have their own files."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dyn.core import routing
from dyn.nn.experts import Gate
from dyn.ops.experts import experts
from dyn.ops.route import route

RELEASED = [(16, 4, 4.0), (16, 2, 8.0), (8, 2, 4.0)]  # N, k, c of the released models
BACKENDS = pytest.mark.parametrize("backend", ["eager", "torch"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moe_and_dense(N, D=12, width=5, T=9):
    """Tokens, N experts with unit-variance weights, and the output of the dense network whose neurons they hold."""
    x, gate_up, down = normal(T, D), normal(N, 2 * width, D, seed=1), normal(N, D, width, seed=2)
    gate, up = gate_up.chunk(2, dim=1)
    h = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
    return x, gate_up, down, F.linear(h, down.transpose(0, 1).flatten(1))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# the algebra of the split -----------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("N", [8, 16])
def test_facts_1_2_3_all_experts_with_equal_scores(backend, N):
    x, gate_up, down, dense = moe_and_dense(N)
    idx, equal = route(torch.zeros(len(x), N, dtype=torch.float64), N)
    assert relative(experts(x, gate_up, down, idx, torch.ones_like(equal), backend), dense) <= 1e-12
    assert relative(N * experts(x, gate_up, down, idx, equal, backend), dense) <= 1e-12
    assert relative(experts(x, gate_up, down, idx, equal, backend), dense / N) <= 1e-12


def test_fact_4_renormalised_scores():
    logits = normal(500, 16)
    for k in (1, 2, 4, 16):
        _, weight = route(logits, k)
        top = logits.softmax(-1).topk(k).values
        assert (weight - top / top.sum(-1, keepdim=True)).abs().max() <= 1e-12
        assert (weight.sum(-1) - 1).abs().max() <= 1e-12


@BACKENDS
@pytest.mark.parametrize("N, k, c, share", [(*r, s) for r, s in zip(RELEASED, (0.25, 0.5, 0.5), strict=True)])
def test_fact_5_mean_over_all_k_subsets(backend, N, k, c, share):
    """Exact, by taking every subset once, where the specification samples them."""
    x, gate_up, down, dense = moe_and_dense(N, T=1)
    subsets = torch.tensor(list(itertools.combinations(range(N), k)))
    assert len(subsets) == math.comb(N, k)
    weight = torch.full(subsets.shape, 1 / k, dtype=torch.float64)
    y = c * experts(x.expand(len(subsets), -1), gate_up, down, subsets, weight, backend)
    assert relative(y.mean(0, keepdim=True), c / N * dense) <= 1e-12
    assert c / N == share


@BACKENDS
@pytest.mark.parametrize("N, k, c, ratio", [(*r, s) for r, s in zip(RELEASED, (0.5, 2**0.5, 1.0), strict=True)])
def test_fact_6_norm_ratio_of_incoherent_experts(backend, N, k, c, ratio):
    """Experts whose outputs are orthogonal and of one norm: each writes into a coordinate of its own."""
    x, gate_up, down, _ = moe_and_dense(N, D=N, T=1)
    gate, up = gate_up.chunk(2, dim=1)
    h = F.silu(gate @ x[0]) * (up @ x[0])
    down = torch.diag_embed(torch.ones(N, dtype=torch.float64))[:, :, None] * (h / h.square().sum(-1, keepdim=True))[:, None]
    every, some = torch.arange(N)[None], torch.arange(k)[None]
    dense = experts(x, gate_up, down, every, torch.ones(1, N, dtype=torch.float64), backend)
    y = c * experts(x, gate_up, down, some, torch.full((1, k), 1 / k, dtype=torch.float64), backend)
    assert (y.norm() / dense.norm()).item() == pytest.approx(c / math.sqrt(k * N), rel=1e-12)
    assert c / math.sqrt(k * N) == pytest.approx(ratio, rel=1e-12)


@BACKENDS
def test_fact_9_renumbering_experts_and_gate_rows(backend):
    x, gate_up, down, _ = moe_and_dense(16)
    gate, order = normal(16, 12, seed=3), torch.randperm(16, generator=torch.Generator().manual_seed(4))
    y = experts(x, gate_up, down, *route(x @ gate.T, 4), backend)
    renumbered = experts(x, gate_up[order], down[order], *route(x @ gate[order].T, 4), backend)
    assert (renumbered - y).abs().max() <= 2e-13 * y.abs().max()


# gate statistics --------------------------------------------------------------------------------------------------------


def test_fact_17_noise_at_initialisation(monkeypatch):
    seen = []
    soft_load = routing.soft_load
    monkeypatch.setattr(routing, "soft_load", lambda c, n, std, *a, **kw: (seen.append(std), soft_load(c, n, std, *a, **kw))[1])
    Gate(12, 16, 4, kind="mlp", noise=True).double().train()(normal(9, 12))
    assert (seen[0] - 0.7031471805599453).abs().max() <= 1e-15


@pytest.mark.parametrize("E, used, value", [(16, 16, 0.0), (16, 1, 16.0), (8, 1, 8.0), (16, 4, 3.2), (16, 2, 7.466667), (8, 2, 3.428571)])
def test_fact_18_cv_squared_table(E, used, value):
    load = torch.zeros(E, dtype=torch.float64)
    load[:used] = 32768 / used
    assert routing.cv_squared(load).item() == pytest.approx(value, abs=5e-7)


def test_fact_19_worst_equal_share():
    idx = torch.arange(4).expand(1000, 4)
    weight = torch.full((1000, 4), 0.25, dtype=torch.float64)
    loss = 0.01 * routing.importance_load_loss(routing.importance(idx, weight, 16), routing.hard_load(idx, 16))
    assert loss.item() == pytest.approx(0.064, rel=1e-6)
    assert 32 * loss.item() == pytest.approx(2.048, rel=1e-6)


def noisy_gate(offset, T=32768):
    """Logits of standard deviation 0.5 around an offset, with the noise that a gate has at initialisation."""
    clean = 0.5 * normal(T, 16) + offset
    std = torch.full_like(clean, 0.7031471805599453)
    return clean, clean + std * normal(T, 16, seed=1), std


@pytest.mark.parametrize("offset, legacy", [(0.0, 3.96), (2.0, 3.69), (-2.0, 4.635)])
def test_fact_20_total_load(offset, legacy):
    clean, noisy, std = noisy_gate(offset)
    assert routing.soft_load(clean, noisy, std, 4).sum().item() / len(clean) == pytest.approx(4, rel=0.01)
    assert routing.soft_load(clean, noisy, std, 4, legacy=True).sum().item() / len(clean) == pytest.approx(legacy, abs=0.03)


def test_fact_21_a_constant_on_all_logits():
    (clean, noisy, std), (shifted, shifted_noisy, _) = noisy_gate(0.0), noisy_gate(2.0)
    T = len(clean)
    assert (route(noisy, 4)[1] - route(shifted_noisy, 4)[1]).abs().max() <= 1e-14
    assert (routing.soft_load(clean, noisy, std, 4) - routing.soft_load(shifted, shifted_noisy, std, 4)).abs().max() / T <= 1e-15
    legacy = routing.soft_load(clean, noisy, std, 4, legacy=True) - routing.soft_load(shifted, shifted_noisy, std, 4, legacy=True)
    assert 0.014 <= legacy.abs().max().item() / T <= 0.02


def test_fact_22_evaluation_is_deterministic_and_counts():
    gate = Gate(12, 16, 4, kind="mlp", noise=True).double().eval()
    x = normal(300, 12)
    first, second = gate(x), gate(x)
    assert torch.equal(first.idx_TK, second.idx_TK) and torch.equal(first.weight_TK, second.weight_TK)
    assert torch.equal(first.balance_loss, second.balance_loss)
    assert first.load_E.sum() == 4 * 300
    assert torch.equal(first.load_E, first.idx_TK.flatten().bincount(minlength=16).to(first.load_E.dtype))
    assert not torch.equal(gate.train()(x).weight_TK, first.weight_TK)  # training does draw noise


def top_1(logits):
    return logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize(("E", "most"), [(16, 2560), (8, 5120)])
def test_fact_23_switch_capacity(E, most):
    T = 32_768
    assert routing.capacity(T, E, 1.25) == most
    g = torch.Generator().manual_seed(0)
    chosen = torch.cat([torch.zeros(most + 7, dtype=torch.int64), torch.randint(1, E, (T - most - 7,), generator=g)])
    kept = routing.within_capacity(chosen, most)
    assert torch.equal(torch.bincount(chosen[kept], minlength=E), torch.bincount(chosen, minlength=E).clamp(max=most)) and not kept.all()


@pytest.mark.parametrize("E", [8, 16])
def test_fact_23_switch_loss(E):
    uniform = torch.zeros(64, E, dtype=torch.float64)
    for idx in (top_1(uniform), torch.arange(64)[:, None] % E):  # uniform P: 1 whoever is chosen
        assert routing.switch_loss(uniform, idx).item() == pytest.approx(1, rel=1e-12)
    collapsed = uniform.clone()
    collapsed[:, 3] = 1e3
    assert routing.switch_loss(collapsed, top_1(collapsed)).item() == pytest.approx(E, rel=1e-12)


def test_fact_23_switch_loss_may_fall_below_one():
    probs = torch.tensor([[0.51, 0.49]] * 60 + [[0.01, 0.99]] * 40, dtype=torch.float64)
    assert routing.switch_loss(probs.log(), top_1(probs)).item() == pytest.approx(0.924, rel=1e-12)


def official_v2_loss(logits_TE, k):
    """The balance loss of the LLaMA-MoE-v2 code, restated: softmax over the k chosen logits, averaged over the k slots."""
    E = logits_TE.shape[1]
    top, idx = logits_TE.topk(k)
    scores = top.softmax(-1).mean(-1)  # always 1/k
    share_E = F.one_hot(idx, E).to(logits_TE.dtype).mean((0, 1))
    return E * (share_E * scores.mean()).sum()


@pytest.mark.parametrize("E, k", [(8, 2), (8, 1), (7, 1), (64, 8), (16, 4)])
def test_fact_24_the_official_v2_loss_is_a_constant_and_ours_is_not(E, k):
    logits = normal(2000, E).requires_grad_()
    legacy = official_v2_loss(logits, k)
    assert legacy.item() == pytest.approx(E / k, rel=1e-12)
    assert torch.autograd.grad(legacy, logits)[0].abs().max() <= 7e-10
    skewed = logits + 3 * torch.arange(E)
    assert official_v2_loss(skewed, k).item() == pytest.approx(E / k, rel=1e-12)
    idx, _ = route(skewed, k)
    ours = routing.switch_loss(skewed, idx)
    assert ours.item() > 1.05
    assert torch.autograd.grad(routing.switch_loss(logits, route(logits, k)[0]), logits)[0].norm() > 1e-5


def test_fact_24_corrected_loss():
    uniform = torch.zeros(100, 8, dtype=torch.float64)
    assert routing.switch_loss(uniform, route(uniform, 2)[0]).item() == pytest.approx(1, rel=1e-12)
    one = uniform.clone()
    one[:, 5] = 1e3
    assert routing.switch_loss(one, route(one, 1)[0]).item() == pytest.approx(8, rel=1e-12)
    two = uniform.clone()
    two[:, 2:4] = 1e3
    assert routing.switch_loss(two, route(two, 2)[0]).item() == pytest.approx(4, rel=1e-12)
