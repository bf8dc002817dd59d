"""Identities: the assignment is optimal, groups are exact partitions, experts add up to the dense network."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dyn.core import split
from dyn.core.assign import balanced
from dyn.core.cluster import graph_labels, kmeans_labels, unit_rows

seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(1, 8), st.integers(1, 9))  # groups, units per group


def rng(seed):
    return torch.Generator().manual_seed(seed)


def costs(kind, rows, columns, g):
    normal = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return {
        "normal": lambda: normal,
        "ties": lambda: (normal * 1.5).round(),
        "zero": lambda: normal * 0,
        "one order": lambda: normal[:, :1] * normal[:1],  # all rows rank the columns alike
        "two scales": lambda: normal * torch.where(torch.arange(rows) % 2 == 0, 1.0, 1e-7)[:, None],
        "copies": lambda: normal[torch.arange(rows) // 4],
        "offset": lambda: normal + 1e6 * torch.arange(columns),
        "heavy": lambda: (4 * normal).exp(),
    }[kind]()


KINDS = ["normal", "ties", "zero", "one order", "two scales", "copies", "offset", "heavy"]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(KINDS), sizes, seeds)
def test_balanced_assignment_is_optimal(kind, size, seed):
    columns, each = size
    cost_NE = costs(kind, columns * each, columns, rng(seed))
    labels_N, prices_E = balanced(cost_NE)
    assert labels_N.bincount(minlength=columns).tolist() == [each] * columns
    seats = cost_NE.repeat_interleave(each, 1).numpy()
    best = seats[linear_sum_assignment(seats)].sum()
    scale = cost_NE.abs().sum().item()
    assert cost_NE.gather(1, labels_N[:, None]).sum().item() == pytest.approx(best, abs=1e-12 * scale)
    priced_NE = cost_NE + prices_E  # the certificate: nobody would rather go elsewhere
    assert (priced_NE.gather(1, labels_N[:, None]) - priced_NE.amin(1, keepdim=True)).max() <= 1e-12 * scale


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), seeds)
def test_columns_of_different_sizes_are_filled_at_the_least_cost(kind, wanted, seed):
    sizes_E = torch.tensor(wanted)
    cost_NE = costs(kind, sum(wanted), len(wanted), rng(seed))
    labels_N, _ = balanced(cost_NE, sizes_E=sizes_E)
    assert labels_N.bincount(minlength=len(wanted)).tolist() == wanted
    seats = cost_NE.repeat_interleave(sizes_E, 1).numpy()
    best = seats[linear_sum_assignment(seats)].sum()
    assert cost_NE.gather(1, labels_N[:, None]).sum().item() == pytest.approx(best, abs=1e-12 * cost_NE.abs().sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_assignment_is_optimal_at_size(kind):
    cost_NE = costs(kind, 1536, 16, rng(0))
    labels_N, prices_E = balanced(cost_NE)
    assert labels_N.bincount().tolist() == [96] * 16
    dual = (cost_NE + prices_E).amin(1).sum() - 96 * prices_E.sum()  # no assignment can cost less than this
    total = cost_NE.gather(1, labels_N[:, None]).sum()
    assert (total - dual).abs() <= 1e-12 * cost_NE.abs().sum()


@settings(max_examples=25, deadline=None)
@given(sizes, seeds)
def test_warm_start_changes_no_total(size, seed):
    columns, each = size
    g = rng(seed)
    cost_NE = costs("normal", columns * each, columns, g)
    labels_N, _ = balanced(cost_NE)
    warm_N, _ = balanced(cost_NE, 10 * torch.randn(columns, generator=g, dtype=torch.float64))
    totals = [cost_NE.gather(1, x[:, None]).sum().item() for x in (labels_N, warm_N)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-9, abs=1e-9)


def partitions(num_units, num_groups, seed):
    """Every way to put each unit in exactly one place: name -> list of groups."""
    g = rng(seed)
    scores_EN = torch.rand(num_groups, num_units, generator=g)
    h_TN = torch.randn(2 * num_units, num_units, generator=g)
    found = {
        "random": split.random(num_units, num_groups, generator=g),
        "kmeans": split.kmeans(torch.randn(num_units, 5, generator=g), num_groups, generator=g, restarts=2),
        "coactivation": split.coactivation(split.coactivate(h_TN, kernel="abs", clamp=9e9), num_groups, generator=g),
        "gradient": split.gradient(scores_EN),
    }
    found = {name: list(groups_EF) for name, groups_EF in found.items()}
    if num_groups > 1:
        shared_S, groups_EF = split.sharing_inter(
            scores_EN[1:], num_shared=1, group_size=num_units // num_groups, overlap=False
        )
        found["sharing_inter"] = [shared_S.sort().values, *groups_EF]
    return found


@settings(max_examples=20, deadline=None)
@given(sizes, seeds)
def test_partitions_are_exact_and_experts_add_up(size, seed):
    num_groups, each = size
    num_units = num_groups * each
    g = rng(seed)
    gate_ND, up_ND = (torch.randn(num_units, 6, generator=g, dtype=torch.float64) for _ in range(2))
    down_DN, x_TD = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, num_units), (10, 6)))

    def feed_forward(units):
        return (nnf.silu(x_TD @ gate_ND[units].T) * (x_TD @ up_ND[units].T)) @ down_DN[:, units].T

    dense_TD = feed_forward(slice(None))
    for name, groups in partitions(num_units, num_groups, seed).items():
        assert [len(group) for group in groups] == [each] * num_groups, name
        assert torch.equal(torch.cat(groups).sort().values, torch.arange(num_units)), name
        assert all(torch.equal(group, group.sort().values) for group in groups), name
        assert (sum(map(feed_forward, groups)) - dense_TD).norm() <= 1e-12 * dense_TD.norm(), name
        assert torch.equal(split.overlap_matrix(torch.stack(groups)), torch.eye(num_groups)), name


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 3), seeds)
def test_gradient_is_the_pointer_walk_of_the_paper(size, levels, seed):
    num_groups, each = size
    num_units = num_groups * each
    scores_EN = torch.randn(num_groups, num_units, generator=rng(seed))
    scores_EN = (scores_EN * levels).round() if levels else scores_EN  # few levels: many ties
    lists = [sorted(range(num_units), key=lambda n, e=e: (-scores_EN[e, n].item(), n)) for e in range(num_groups)]
    taken, groups = set(), [[] for _ in range(num_groups)]
    for _ in range(num_units):
        heads = {}
        for e in range(num_groups):
            if len(groups[e]) < each:
                lists[e] = [n for n in lists[e] if n not in taken]
                heads[e] = scores_EN[e, lists[e][0]].item()
        best = max(heads, key=lambda e: (heads[e], e))
        groups[best].append(lists[best][0])
        taken.add(lists[best][0])
    assert split.gradient(scores_EN).tolist() == [sorted(group) for group in groups]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 6), seeds)
def test_sharing_inter_is_the_rounds_of_the_paper(num_groups, num_shared, size, spare, seed):
    num_units = (num_shared + 1) * size + spare
    scores_EN = torch.rand(num_groups, num_units, generator=rng(seed))
    lists, shared = scores_EN.argsort(1, descending=True).tolist(), []
    while len(shared) < num_shared * size:
        votes = [n for units in lists for n in units[:size]]
        most = max(votes.count(n) for n in votes)
        shared += sorted({n for n in votes if votes.count(n) == most})[: num_shared * size - len(shared)]
        lists = [[n for n in units if n not in shared] for units in lists]
    shared_S, groups_EF = split.sharing_inter(scores_EN, num_shared=num_shared, group_size=size, overlap=True)
    assert shared_S.tolist() == shared
    assert groups_EF.tolist() == [sorted(units[:size]) for units in lists]
    assert split.selection_counts(groups_EF, num_units) @ torch.arange(num_groups + 1) == num_groups * size


@settings(max_examples=20, deadline=None)
@given(sizes, seeds)
def test_reported_objectives_are_those_of_the_labels(size, seed):
    num_groups, each = size
    g = rng(seed)
    x_ND = unit_rows(torch.randn(num_groups * each, 4, generator=g, dtype=torch.float64))
    labels_N, inertia = kmeans_labels(x_ND, num_groups, g, restarts=2, iterations=20)
    groups_EF = labels_N.argsort(stable=True).view(num_groups, each)
    assert split.inertia(x_ND, groups_EF) == pytest.approx(inertia, abs=1e-9)
    upper_NN = torch.randint(0, 4, (num_groups * each,) * 2, generator=g).float().triu(1)
    labels_N, weight = graph_labels(upper_NN + upper_NN.T, num_groups, g, restarts=2, iterations=20)
    assert weight == upper_NN[labels_N[:, None] == labels_N].sum().item()
    assert labels_N.bincount(minlength=num_groups).tolist() == [each] * num_groups
