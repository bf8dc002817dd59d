"""What each split promises beyond the laws: structure it finds, errors, determinism, devices."""

import pytest
import torch

from dyn.core import split
from dyn.core.assign import balanced
from dyn.core.cluster import percentile, sparsify

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def recovered(groups_EF, truth_N):
    """Share of units whose group's majority has their true label."""
    return sum(truth_N[group_F].bincount().max().item() for group_F in groups_EF) / len(truth_N)


def within(weights_NN, groups_EF):
    return sum(weights_NN[g_F][:, g_F].sum().item() for g_F in groups_EF)


def planted_clusters(device="cpu", units=96, groups=8, dim=16):
    truth_N = torch.randperm(units, generator=rng(1)) % groups
    centre_ED = torch.eye(groups, dim)
    length_N1 = torch.rand(units, 1, generator=rng(3)) * 5 + 0.1  # must not matter: rows are normalised
    x_ND = (centre_ED[truth_N] + 0.1 * torch.randn(units, dim, generator=rng(2))) * length_N1
    return x_ND.to(device), truth_N


def planted_graph(device="cpu", units=256, groups=8, inside=0.4, outside=0.05):
    truth_N = torch.randperm(units, generator=rng(1)) % groups
    chance_NN = torch.where(truth_N[:, None] == truth_N, inside, outside)
    upper_NN = (torch.rand(units, units, generator=rng(2)) < chance_NN).float().triu(1)
    return (upper_NN + upper_NN.T + torch.eye(units)).to(device), truth_N


@pytest.mark.parametrize("device", DEVICES)
def test_kmeans_finds_planted_clusters(device):
    x_ND, truth_N = planted_clusters(device)
    groups_EF = split.kmeans(x_ND, 8, generator=rng(), restarts=3)
    assert groups_EF.device == x_ND.device and groups_EF.shape == (8, 12) and groups_EF.dtype == torch.int64
    assert recovered(groups_EF.cpu(), truth_N) == 1.0


def test_kmeans_improves_with_iterations_and_restarts():
    x_ND = torch.randn(240, 12, generator=rng(4))
    scores = [
        split.inertia(x_ND, split.kmeans(x_ND, 6, generator=rng(), restarts=r, iterations=i))
        for r, i in ((1, 1), (1, 500), (8, 500))
    ]
    random = split.inertia(x_ND, split.random(240, 6, generator=rng()))
    assert random > scores[0] > scores[1] >= scores[2]


def test_kmeans_is_locally_optimal():
    x_ND = torch.nn.functional.normalize(torch.randn(120, 6, generator=rng(5), dtype=torch.float64))
    groups_EF = split.kmeans(x_ND, 4, generator=rng(), restarts=1)
    centre_ED = torch.stack([x_ND[g].mean(0) for g in groups_EF])
    cost_NE = torch.cdist(x_ND, centre_ED).square()
    best = cost_NE.gather(1, balanced(cost_NE)[0][:, None]).sum()
    assert split.inertia(x_ND, groups_EF) == pytest.approx(best.item(), rel=1e-12)


def test_inertia_of_the_definition():
    x_ND = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    assert split.inertia(x_ND, torch.tensor([[0, 1], [2, 3]])) == pytest.approx(1.0 + 0.5)


@pytest.mark.parametrize(
    "x_ND",
    [torch.zeros(12, 3), torch.ones(12, 3), torch.cat((torch.zeros(7, 3), torch.randn(5, 3, generator=rng())))],
    ids=["zeros", "equal", "some zeros"],
)
def test_kmeans_takes_rows_of_zeros_and_copies(x_ND):
    groups_EF = split.kmeans(x_ND, 4, generator=rng(), restarts=2)
    assert groups_EF.flatten().sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("device", DEVICES)
def test_coactivation_finds_planted_communities(device):
    adjacency_NN, truth_N = planted_graph(device)
    groups_EF = split.coactivation(adjacency_NN, 8, generator=rng())
    assert groups_EF.device == adjacency_NN.device
    assert recovered(groups_EF.cpu(), truth_N) > 0.98
    random_EF = split.random(256, 8, generator=rng())
    assert within(adjacency_NN, groups_EF) > 3 * within(adjacency_NN, random_EF)


def test_coactivation_from_neurons_that_fire_together():
    truth_N = torch.randperm(64, generator=rng(1)) % 4
    topic_T = torch.randint(0, 4, (512,), generator=rng(2))
    fires_TN = torch.rand(512, 64, generator=rng(3)) < torch.where(topic_T[:, None] == truth_N, 0.5, 0.05)
    h_TN = fires_TN * torch.randn(512, 64, generator=rng(4))
    adjacency_NN = sum(split.coactivate(h, kernel="abs", clamp=20.0) for h in h_TN.split(128))
    before = adjacency_NN.clone()
    assert recovered(split.coactivation(adjacency_NN, 4, generator=rng()), truth_N) == 1.0
    assert torch.equal(adjacency_NN, before)


def test_no_swap_of_two_units_improves_coactivation():
    weights_NN = torch.randint(0, 5, (40, 40), generator=rng(6)).float().triu(1)
    weights_NN = weights_NN + weights_NN.T
    groups_EF = split.coactivation(weights_NN.clone().fill_diagonal_(1), 4, generator=rng(), restarts=2)
    edges_NN = sparsify(weights_NN.clone().fill_diagonal_(1))
    best = within(edges_NN, groups_EF)
    for a in range(4):
        for b in range(a):
            for i in range(10):
                for j in range(10):
                    other = groups_EF.clone()
                    other[a, i], other[b, j] = groups_EF[b, j], groups_EF[a, i]
                    assert within(edges_NN, other) <= best


def test_coactivate_clamps_each_batch_after_the_kernel():
    h_TN = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    assert torch.equal(split.coactivate(h_TN, clamp=1.0), torch.tensor([[1.0, -1.5], [-1.5, 1.0]]))
    assert torch.equal(split.coactivate(h_TN, kernel="abs", clamp=9.0), torch.tensor([[1.25, 2.5], [2.5, 5.0]]))
    assert torch.equal(split.coactivate(h_TN, kernel="square", clamp=2.0), torch.tensor([[1.0625, 2.0], [2.0, 2.0]]))


def test_sparsify_counts_the_diagonal_in_the_percentile_but_makes_no_edge_of_it():
    adjacency_NN = torch.tensor([[9.0, 2.0, 0.5], [2.0, 9.0, 1.0], [0.5, 1.0, 9.0]])
    # the 10th percentile is 0.5, the threshold 0.495
    assert sparsify(adjacency_NN).tolist() == [[0, 4, 1], [4, 0, 2], [1, 2, 0]]
    adjacency_NN = torch.full((4, 4), 3.0).fill_diagonal_(1.0)
    # 4 of 16 entries are 1: the 10th percentile is 1 through the diagonal alone, so edges weigh trunc(3 / .99) = 3
    assert torch.equal(sparsify(adjacency_NN), torch.full((4, 4), 3.0).fill_diagonal_(0.0))


def test_sparsify_skips_percentiles_until_one_is_positive():
    adjacency_NN = torch.full((10, 10), -1.0).fill_diagonal_(1.0)
    adjacency_NN[:4, :4] = 1.0  # 22 of 100 entries positive: the 80th percentile is the first positive one
    edges_NN = sparsify(adjacency_NN)
    assert edges_NN.count_nonzero() == 12 and edges_NN[:4, :4].sum() == 12


def test_sparsify_bounds_huge_weights():
    adjacency_NN = torch.full((6, 6), 1e-20)
    adjacency_NN[0, 1] = adjacency_NN[1, 0] = 1e30
    edges_NN = sparsify(adjacency_NN)
    assert edges_NN[0, 1] == 2**24 and edges_NN[2, 3] == 1
    assert [0, 1] in split.coactivation(adjacency_NN, 3, generator=rng()).tolist()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 7), (513, 33)])
@pytest.mark.parametrize("percent", [0, 10, 37.5, 90, 100])
def test_percentile_is_exact(shape, percent):
    x_NM = torch.randn(shape, generator=rng(7)) * 10.0 ** torch.randint(-20, 20, shape, generator=rng(8))
    x_NM[torch.rand(shape, generator=rng(9)) < 0.3] = 0.0
    expected = torch.quantile(x_NM.double(), percent / 100).item()
    assert percentile(x_NM, percent) == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize(
    "run",
    [
        lambda g: split.random(48, 6, generator=g),
        lambda g: split.kmeans(planted_clusters()[0], 6, generator=g, restarts=2),
        lambda g: split.coactivation(planted_graph(units=64)[0], 4, generator=g),
    ],
    ids=["random", "kmeans", "coactivation"],
)
def test_the_generator_decides_everything(run):
    torch.manual_seed(0)
    first = run(rng(11))
    torch.manual_seed(1)
    assert torch.equal(first, run(rng(11)))
    assert torch.equal(first, first.sort(1).values)


def test_random_depends_on_the_seed_and_is_uniform():
    assert not torch.equal(split.random(48, 6, generator=rng(0)), split.random(48, 6, generator=rng(1)))
    g = rng(2)
    first_N = torch.stack([split.random(8, 2, generator=g)[0] for _ in range(2000)]).flatten().bincount(minlength=8)
    assert (first_N - 1000).abs().max() < 120  # five standard deviations


def test_gradient_ties_go_to_the_highest_expert_then_the_lowest_neuron():
    assert split.gradient(torch.ones(3, 6)).tolist() == [[4, 5], [2, 3], [0, 1]]


def test_sharing_ties_go_to_the_lowest_neuron():
    assert split.sharing_inner(torch.ones(2, 5), 2).tolist() == [[0, 1], [0, 1]]
    shared_S, groups_EF = split.sharing_inter(torch.ones(2, 6), num_shared=1, group_size=2, overlap=True)
    assert shared_S.tolist() == [0, 1] and groups_EF.tolist() == [[2, 3], [2, 3]]


def test_sharing_inter_without_shared_experts_is_the_plain_split():
    scores_EN = torch.rand(4, 24, generator=rng(12))
    shared_S, groups_EF = split.sharing_inter(scores_EN, num_shared=0, group_size=6, overlap=False)
    assert not len(shared_S) and torch.equal(groups_EF, split.gradient(scores_EN))
    shared_S, groups_EF = split.sharing_inter(scores_EN, num_shared=0, group_size=5, overlap=True)
    assert not len(shared_S) and torch.equal(groups_EF, split.sharing_inner(scores_EN, 5))


def test_overlap_statistics():
    groups_EF = torch.tensor([[0, 1, 2, 5], [0, 3, 6, 7]])
    assert split.overlap_matrix(groups_EF).tolist() == [[1, 0.25], [0.25, 1]]
    assert split.overlap_matrix(groups_EF, 10).tolist() == [[1, 0.25], [0.25, 1]]
    assert split.selection_counts(groups_EF, 8).tolist() == [1, 6, 1]  # neuron 4 lost, neuron 0 twice


GOOD = torch.rand(2, 12)
KMEANS, GRAPH, INTER = split.kmeans, split.coactivation, split.sharing_inter
BAD_INPUT = [
    (split.random, (1536, 7), {}, "num_groups=7 does not divide 1536 units; nearest: 6, 8"),
    (split.random, (8, 9), {}, "num_groups=9 does not divide 8 units; nearest: 8"),
    (split.random, (8, 0), {}, "num_groups=0 does not divide 8 units; nearest: 1"),
    (KMEANS, (torch.rand(10, 2), 4), {}, "num_groups=4 does not divide 10 units; nearest: 2, 5"),
    (KMEANS, (torch.rand(8), 4), {}, "features_ND has shape [8]; expected [units, features]"),
    (KMEANS, (torch.rand(8, 0), 4), {}, "features_ND has shape [8, 0]"),
    (KMEANS, (torch.ones(8, 2).int(), 4), {}, "features_ND is torch.int32; expected a floating"),
    (KMEANS, (torch.rand(8, 2), 4), {"restarts": 0}, "restarts=0; allowed: at least 1"),
    (KMEANS, (torch.tensor([[1], [torch.nan]]), 2), {}, "1 values that are not finite, the first at [1, 0]"),
    (split.coactivate, (GOOD,), {"kernel": "l1"}, "kernel='l1'; allowed: 'identity', 'abs', 'square'"),
    (GRAPH, (torch.rand(4, 6), 2), {}, "adjacency_NN has shape [4, 6]; expected a square"),
    (GRAPH, (torch.eye(4).roll(1, 0), 2), {}, "not symmetric"),
    (GRAPH, (torch.zeros(4, 4), 2), {}, "no positive entry"),
    (split.gradient, (torch.rand(5, 12),), {}, "num_groups=5 does not divide 12 units; nearest: 4, 6"),
    (split.gradient, (GOOD / 0,), {}, "24 values that are not finite, the first at [0, 0]"),
    (split.sharing_inner, (GOOD, 13), {}, "group_size=13 for 12 units; allowed: 1 to 12"),
    (split.sharing_inner, (GOOD, 0), {}, "group_size=0 for 12 units"),
    (INTER, (GOOD,), {"num_shared": 1, "group_size": 7, "overlap": True}, "allowed: group_size up to 6"),
    (INTER, (GOOD,), {"num_shared": 1, "group_size": 5, "overlap": False}, "allowed: group_size=4"),
    (INTER, (GOOD,), {"num_shared": 3, "group_size": 2, "overlap": False}, "does not divide 12 units; nearest: 4, 6"),
    (INTER, (GOOD,), {"num_shared": -1, "group_size": 4, "overlap": True}, "num_shared=-1"),
]


@pytest.mark.parametrize(("function", "args", "options", "message"), BAD_INPUT)
def test_errors_say_what_is_allowed(function, args, options, message):
    if function in (split.random, KMEANS, GRAPH):
        options = {"generator": rng()} | options
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    assert message in str(error.value)


def test_large_values_are_not_mistaken_for_infinite_ones():
    big = torch.finfo(torch.float32).max
    assert split.sharing_inner(torch.tensor([[big, big, 1.0]]), 2).tolist() == [[0, 1]]
