"""core/calibrate: energies, gates, groups, ridge regression, budgets."""

import itertools

import pytest
import torch

from dyn.core.calibrate import Ridge, allocate, alternate, dominant, energies, fit_gate, routed_activations, token_weights, top_mask


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(tokens=600, hidden=12, experts=6, size=4, seed=0):
    """Neurons in groups that carry energy where x looks in their group's direction, in shuffled order, and eight that always do."""
    x_TD, direction_ED = draw(tokens, hidden, seed=seed), draw(experts, hidden, seed=seed + 1)
    on_TE = (x_TD @ direction_ED.T).clamp(min=0).square()
    energy_TN = torch.cat([on_TE.repeat_interleave(size, 1), torch.full((tokens, 8), 50.0)], 1) * draw(tokens, experts * size + 8, seed=seed + 2).abs()
    order_N = torch.randperm(energy_TN.shape[1], generator=torch.Generator().manual_seed(seed + 3))
    label_N = torch.cat([torch.arange(experts).repeat_interleave(size), torch.full((8,), -1)])
    return x_TD, energy_TN[:, order_N], label_N[order_N], direction_ED


def test_token_weights_are_inverse_squares():
    torch.testing.assert_close(token_weights(torch.tensor([[3.0, 4.0], [0.0, 10.0]])), torch.tensor([1 / 25, 1 / 100]))


def test_neurons_of_massive_activations_are_found_and_stay_on():
    h_TN, norm_N = 0.01 * draw(600, 32), torch.ones(32)
    h_TN[7, 5], h_TN[9, 20] = 10.0, 20.0  # on one token each, of streams of 10 and 20
    stream_T = torch.ones(600)
    stream_T[7], stream_T[9] = 12.0, 20.0
    omega_T = 1 / stream_T**2
    assert dominant(h_TN, omega_T, norm_N, 8).tolist() == [20, 5] and dominant(h_TN, omega_T, norm_N, 1).tolist() == [20]
    x_TD, energy_TN, *_ = planted()
    quiet_N = energy_TN.sum(0).argsort()[:5]
    shared_S, *_ = alternate(x_TD, energy_TN, num_experts=6, k=2, size=4, rounds=2, generator=torch.Generator().manual_seed(0), always_on=quiet_N)
    assert set(quiet_N.tolist()) <= set(shared_S.tolist())


def test_energies_are_the_weighted_variance_in_output_units():
    h_TN, omega_T, norm_N = draw(50, 3), torch.rand(50, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 2.0, 0.5])
    mean_N = (omega_T[:, None] * h_TN).sum(0) / omega_T.sum()
    torch.testing.assert_close(energies(h_TN.clone(), omega_T, norm_N), omega_T[:, None] * (h_TN - mean_N) ** 2 * norm_N**2)


def test_a_fitted_gate_gathers_more_than_least_squares_and_much_more_than_chance():
    x_TD, direction_ED = draw(2000, 10), draw(8, 10, seed=1)
    energy_TE = (x_TD @ direction_ED.T).clamp(min=0) ** 4
    gathered = lambda gate_ED: ((energy_TE * top_mask(x_TD @ gate_ED.T, 2)).sum() / energy_TE.sum()).item()  # noqa: E731
    start_ED = fit_gate(x_TD, energy_TE, 2, steps=0)
    fitted = gathered(fit_gate(x_TD, energy_TE, 2, generator=torch.Generator().manual_seed(0)))
    assert fitted > gathered(start_ED) and fitted > 2.5 * 2 / 8 and fitted > 0.95 * gathered(direction_ED)


def test_alternation_finds_planted_groups_and_shared_neurons():
    x_TD, energy_TN, label_N, _ = planted()
    shared_S, groups_EF, gate_ED, captured = alternate(x_TD, energy_TN, num_experts=6, k=2, size=4, rounds=8, generator=torch.Generator().manual_seed(0))
    assert (label_N[shared_S] == -1).all() and len(shared_S) == 8 and gate_ED.shape == (6, 12)
    assert torch.cat([shared_S, groups_EF.flatten()]).sort().values.tolist() == list(range(32)) and (groups_EF.diff(dim=1) > 0).all()
    pure = sum((label_N[group_F] == label_N[group_F].mode().values).sum().item() for group_F in groups_EF) / 24
    assert pure > 0.7 and captured[-1] > captured[0]
    static = energy_TN[:, energy_TN.sum(0).topk(16).indices].sum() / energy_TN.sum()
    assert captured[-1] > static  # the same number of active neurons without a gate


def test_alternation_follows_its_seed_only():
    x_TD, energy_TN, *_ = planted()
    run = lambda seed: alternate(x_TD, energy_TN, num_experts=8, k=3, size=2, rounds=2, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    one, two = run(1), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True)) and one[3] == two[3]


def test_ridge_is_weighted_least_squares_and_streams():
    phi_TP, y_TQ, omega_T = draw(40, 5).double(), draw(40, 3, seed=1).double(), torch.rand(40, generator=torch.Generator().manual_seed(2)).double() + 0.1
    whole, parts = Ridge(5, 3, phi_TP), Ridge(5, 3, phi_TP)
    whole.gram_PP, whole.cross_PQ = whole.gram_PP.double(), whole.cross_PQ.double()
    whole.add(phi_TP, y_TQ, omega_T)
    for i in range(0, 40, 8):
        parts.add(phi_TP[i: i + 8].float(), y_TQ[i: i + 8].float(), omega_T[i: i + 8].float())
    root_T1 = omega_T.sqrt()[:, None]
    expected = torch.linalg.lstsq(phi_TP * root_T1, y_TQ * root_T1).solution.float()
    torch.testing.assert_close(whole.solve(ridge=1e-12), expected)
    torch.testing.assert_close(parts.solve(ridge=1e-12), expected, atol=1e-4, rtol=1e-4)
    prior = draw(5, 3, seed=4)
    torch.testing.assert_close(whole.solve(prior, ridge=1e9), prior, atol=1e-5, rtol=1e-5)
    exact = Ridge(5, 3, phi_TP)
    exact.add(phi_TP.float(), phi_TP.float() @ prior)
    torch.testing.assert_close(exact.solve(prior, ridge=0.1), prior, atol=1e-4, rtol=1e-4)  # a target that the prior meets: it stays


def test_routed_activations_are_those_of_the_mixture():
    h_TN, x_TD, gate_ED = draw(7, 10), draw(7, 4, seed=1), draw(4, 4, seed=2)
    shared_S, groups_EF = torch.tensor([3, 8]), torch.tensor([[0, 9], [1, 2], [4, 5], [6, 7]])
    phi_TN = routed_activations(h_TN, x_TD, shared_S, groups_EF, gate_ED, 2)
    value_TK, idx_TK = (x_TD @ gate_ED.T).topk(2)
    expected = torch.zeros_like(h_TN)
    expected[:, shared_S] = h_TN[:, shared_S]
    for t, j in itertools.product(range(7), range(2)):
        group_F = groups_EF[idx_TK[t, j]]
        expected[t, group_F] = 2 * value_TK[t].softmax(0)[j] * h_TN[t, group_F]
    torch.testing.assert_close(phi_TN, expected)


def test_budgets_are_the_best_ones_where_losses_are_convex():
    loss_UB = torch.tensor([[9.0, 4.0, 1.0, 0.0], [3.0, 1.0, 0.2, 0.0], [1.0, 0.6, 0.3, 0.0]])
    cost_B = [10, 20, 30, 40]
    for total in range(30, 121, 10):
        chosen = allocate(loss_UB, cost_B, total)
        assert sum(cost_B[b] for b in chosen) == total
        best = min(sum(loss_UB[u, b].item() for u, b in enumerate(each)) for each in itertools.product(range(4), repeat=3)
                   if sum(cost_B[b] for b in each) == total)
        assert sum(loss_UB[u, b].item() for u, b in enumerate(chosen)) == pytest.approx(best)


@pytest.mark.parametrize(("cost_B", "total", "words"), [
    ([10, 20, 20], 40, "3 ascending costs"), ([10, 20], 30, "3 ascending costs"), ([[10, 20, 30]], 30, "or 2 lists"),
    ([10, 20, 30], 25, "total=25 cannot be reached"),
    ([10, 20, 30], 70, "total=70")])
def test_budgets_that_cannot_be_are_refused(cost_B, total, words):
    with pytest.raises(ValueError, match=words):
        allocate(torch.zeros(2, 3), cost_B, total)
    with pytest.raises(ValueError, match="not finite"):
        allocate(torch.tensor([[1.0, torch.nan]]), [1, 2], 2)


def test_budgets_of_masks_of_different_sizes():
    """Kept weights of three tensors: never over the total, and what is left over is too little for any step."""
    size_U, share_B = [1000, 300, 40], [0.25, 0.5, 0.75, 1.0]
    cost_UB = [[int(size * share) for share in share_B] for size in size_U]
    loss_UB = torch.tensor([[0.9, 0.5, 0.2, 0.0], [0.9, 0.3, 0.1, 0.0], [0.9, 0.8, 0.7, 0.0]])
    for total in range(335, 1341, 67):
        chosen = allocate(loss_UB, cost_UB, total)
        spent = sum(row[c] for row, c in zip(cost_UB, chosen, strict=True))
        assert spent <= total and all(c == 3 or spent + row[c + 1] - row[c] > total for row, c in zip(cost_UB, chosen, strict=True))
    assert allocate(loss_UB, cost_UB, 1340 - 250) == [2, 3, 3] and allocate(loss_UB, cost_UB, 335) == [0, 0, 0]


def test_a_regression_on_what_is_not_finite_is_refused():
    fit = Ridge(2, 1, torch.zeros(1))
    fit.add(torch.tensor([[1.0, torch.inf]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="1 rows hold numbers that are not finite"):
        fit.solve(ridge=0.1)
