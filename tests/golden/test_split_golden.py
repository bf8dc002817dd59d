"""Worked examples and sizes of the LLaMA-MoE specification (sections 1.6 to 1.8; facts 1, 7 and 8)."""

import pytest
import torch
import torch.nn.functional as nnf

from dyn.core import split

V_EN = torch.tensor(
    [
        [9, 8, 7, 1, 2, 3, 0.5, 0.1],
        [8.5, 1, 2, 7.5, 3, 0.2, 6, 5],
        [7, 0.3, 6.5, 0.4, 0.6, 5.5, 2.5, 4],
    ]
)


def test_gradient_example():
    assert split.gradient(V_EN[:2]).tolist() == [[0, 1, 2, 5], [3, 4, 6, 7]]


def test_sharing_inner_example():
    groups_EF = split.sharing_inner(V_EN[:2], 4)
    assert groups_EF.tolist() == [[0, 1, 2, 5], [0, 3, 6, 7]]
    assert split.selection_counts(groups_EF, 8).tolist() == [1, 6, 1]  # neuron 4 lost, neuron 0 duplicated


@pytest.mark.parametrize(("overlap", "expected"), [(True, [[1, 5], [3, 6], [5, 7]]), (False, [[1, 4], [3, 6], [5, 7]])])
def test_sharing_inter_example(overlap, expected):
    shared_S, groups_EF = split.sharing_inter(V_EN, num_shared=1, group_size=2, overlap=overlap)
    assert shared_S.tolist() == [0, 2]
    assert groups_EF.tolist() == expected


@pytest.mark.parametrize(("num_groups", "size"), [(16, 688), (8, 1376)])
def test_sizes_of_llama_2_7b(num_groups, size):
    groups_EF = split.random(11008, num_groups, generator=torch.Generator().manual_seed(0))
    assert groups_EF.shape == (num_groups, size)
    assert torch.equal(groups_EF.flatten().sort().values, torch.arange(11008))


@pytest.mark.parametrize("method", ["random", "kmeans", "coactivation", "gradient", "sharing_inter"])
def test_experts_of_any_partition_add_up_to_the_dense_network(method):
    g = torch.Generator().manual_seed(0)
    gate_ND, up_ND = (torch.randn(128, 24, generator=g, dtype=torch.float64) for _ in range(2))
    down_DN, x_TD = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((24, 128), (64, 24)))
    h_TN = nnf.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)
    scores_EN = torch.stack([part.abs().sum(0) for part in h_TN.chunk(8)])

    def inter():
        shared_S, groups_EF = split.sharing_inter(scores_EN[:7], num_shared=1, group_size=16, overlap=False)
        return torch.cat((shared_S[None], groups_EF))

    groups_EF = {
        "random": lambda: split.random(128, 8, generator=g),
        "kmeans": lambda: split.kmeans(up_ND, 8, generator=g, restarts=2),
        "coactivation": lambda: split.coactivation(split.coactivate(h_TN, kernel="abs", clamp=1e9), 8, generator=g),
        "gradient": lambda: split.gradient(scores_EN),
        "sharing_inter": inter,
    }[method]()
    dense_TD = h_TN @ down_DN.T
    total_TD = sum(
        (nnf.silu(x_TD @ gate_ND[s].T) * (x_TD @ up_ND[s].T)) @ down_DN[:, s].T for s in groups_EF
    )  # fmt: skip
    assert (total_TD - dense_TD).norm() <= 1e-12 * dense_TD.norm()
