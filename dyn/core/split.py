"""Split the N neurons of a feed-forward network into E groups of F, one an expert (llama_moe sections 1.2 to 1.8).

Independent (each neuron in exactly one group): random, kmeans, coactivation, gradient. Sharing: sharing_inner (groups
may overlap, neurons may be lost), sharing_inter (some neurons go to shared experts first). Groups are LongTensors
[E, F], rows ascending, on the device of the data; chance comes from the generator alone.

Shapes: N units, E groups, F units per group, D features, T tokens, S shared units.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dyn.core.cluster import graph_labels, group_units, kmeans_labels, sparsify, unit_rows

KERNELS = {"identity": lambda x: x, "abs": torch.abs, "square": torch.square}


def random(num_units: int, num_groups: int, *, generator: torch.Generator) -> Tensor:
    """Uniformly random groups [E, F] of equal size (section 1.2), on the generator's device.

    Raises ValueError when num_groups does not divide num_units.
    """
    group_size = _group_size(num_units, num_groups)
    order_N = torch.randperm(num_units, generator=generator, device=generator.device)
    return order_N.view(num_groups, group_size).sort(1).values


def kmeans(
    features_ND: Tensor, num_groups: int, *, generator: torch.Generator, restarts: int = 10, iterations: int = 500
) -> Tensor:
    """Balanced k-means on L2-normalised rows (section 1.3): groups [E, F] of exactly equal size.

    features_ND: [N, D], one row per neuron, such as the rows of the up projection; rows of zeros are allowed and stay
    zero. Every restart begins with k-means++ and alternates exact balanced assignment (squared Euclidean) with means
    until no neuron changes group, `iterations` at most; the restart with the least inertia wins.
    Raises ValueError for other shapes, values that are not finite, or num_groups that does not divide N.
    """
    _check_matrix("features_ND", features_ND, "[units, features]")
    _group_size(len(features_ND), num_groups)
    _check_counts(restarts=restarts, iterations=iterations)
    labels_N, _ = kmeans_labels(unit_rows(features_ND), num_groups, generator, restarts, iterations)
    return group_units(labels_N, num_groups)


def inertia(features_ND: Tensor, groups_EF: Tensor) -> float:
    """Sum of squared distances of L2-normalised rows to the mean of their group: what kmeans makes small."""
    rows = (unit_rows(features_ND[group_F]) for group_F in groups_EF)
    return sum((x_FD - x_FD.mean(0)).double().square().sum().item() for x_FD in rows)


def coactivate(
    h_TN: Tensor, *, kernel: Literal["identity", "abs", "square"] = "identity", clamp: float = 1.0
) -> Tensor:
    """One batch's contribution to the co-activation adjacency, min(k(H)^T k(H), clamp) (section 1.4 steps 2 and 3).

    h_TN: [T, N] neuron outputs (or silu of the gate) without padding positions. kernel is applied to h first; h of a
    SwiGLU keeps its sign under "identity". Returns [N, N] float32, to be summed over batches.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}; allowed: {', '.join(map(repr, KERNELS))}")
    _check_matrix("h_TN", h_TN, "[tokens, units]")
    h_TN = KERNELS[kernel](h_TN.detach().float())
    return (h_TN.T @ h_TN).clamp_(max=clamp)


def coactivation(
    adjacency_NN: Tensor, num_groups: int, *, generator: torch.Generator, restarts: int = 4, iterations: int = 50
) -> Tensor:
    """Groups [E, F] of neurons that are active together: a balanced partition with heavy groups (section 1.4).

    adjacency_NN: [N, N] sums of `coactivate`, symmetric, not changed. It is sparsified as in step 4; in place of METIS
    and a random repair of the sizes: spectral and random starts (`restarts` in all), balanced label propagation
    (`iterations` at most), pairwise swaps. Sizes are exact throughout. Holds one more N x N float32 matrix.
    Raises ValueError for other shapes, values that are not finite, a matrix that is not symmetric or has no positive
    entry, or num_groups that does not divide N.
    """
    _check_matrix("adjacency_NN", adjacency_NN, "[units, units]")
    if adjacency_NN.shape[0] != adjacency_NN.shape[1]:
        raise ValueError(f"adjacency_NN has shape {list(adjacency_NN.shape)}; expected a square [units, units]")
    _group_size(len(adjacency_NN), num_groups)
    _check_counts(restarts=restarts, iterations=iterations)
    labels_N, _ = graph_labels(sparsify(adjacency_NN.detach()), num_groups, generator, restarts, iterations)
    return group_units(labels_N, num_groups)


def gradient(scores_EN: Tensor) -> Tensor:
    """Greedy assignment by importance (section 1.6): groups [E, F]; every neuron goes to one group.

    scores_EN: [E, N], importance of every neuron for every expert, such as `saliency.taylor` on the data of each.
    Largest score first: it gives its neuron to its expert, unless that neuron is taken or that expert full. Ties: the
    highest expert id, then the lowest neuron. For the criterion "min" pass negated scores.
    Raises ValueError for other shapes, values that are not finite, or E that does not divide N.
    """
    _check_matrix("scores_EN", scores_EN, "[groups, units]")
    num_groups, num_units = scores_EN.shape
    group_size = _group_size(num_units, num_groups)
    # One pass over all sorted pairs is the paper's "best head of the lists": experts reversed, the sort stable.
    order = scores_EN.detach().cpu().flip(0).flatten().argsort(descending=True, stable=True).tolist()
    owner, room, left = [-1] * num_units, [group_size] * num_groups, num_units
    for pair in order:
        unit = pair % num_units
        if owner[unit] >= 0 or not room[expert := num_groups - 1 - pair // num_units]:
            continue
        owner[unit], room[expert], left = expert, room[expert] - 1, left - 1
        if not left:
            break
    return group_units(torch.tensor(owner, device=scores_EN.device), num_groups)


def sharing_inner(scores_EN: Tensor, group_size: int) -> Tensor:
    """Each expert's `group_size` most important neurons (section 1.7): groups [E, F] that may overlap.

    Neurons in no group are lost, see `selection_counts`. Ties go to the lowest neuron.
    Raises ValueError for other shapes, values that are not finite, or group_size outside 1..N.
    """
    _check_matrix("scores_EN", scores_EN, "[groups, units]")
    if not 1 <= group_size <= scores_EN.shape[1]:
        raise ValueError(f"group_size={group_size} for {scores_EN.shape[1]} units; allowed: 1 to {scores_EN.shape[1]}")
    return _ranked(scores_EN)[:, :group_size].sort(1).values


def sharing_inter(scores_EN: Tensor, *, num_shared: int, group_size: int, overlap: bool) -> tuple[Tensor, Tensor]:
    """Neurons that many experts want become shared ones, the rest is split (section 1.8).

    Rounds: of the first `group_size` neurons of every expert's list, those in the most lists become shared, ascending,
    until there are S = num_shared * group_size; they leave all lists. Then overlap=True ("sharing on") gives every
    routed expert the first `group_size` of what is left of its list, overlap=False assigns what is left as `gradient`.

    scores_EN: [E, N], E routed experts. Returns shared_S [S] in the order of choice (consecutive chunks of group_size
    are the paper's residual experts) and groups_EF [E, F], rows ascending. Ties in a list go to the lowest neuron.
    Raises ValueError for other shapes, values that are not finite, or sizes that do not add up.
    """
    _check_matrix("scores_EN", scores_EN, "[groups, units]")
    num_groups, num_units = scores_EN.shape
    num_wanted = num_shared * group_size
    if num_shared < 0 or group_size < 1:
        raise ValueError(f"num_shared={num_shared}, group_size={group_size}; allowed: at least 0 and at least 1")
    if overlap and num_wanted + group_size > num_units:
        raise ValueError(
            f"(num_shared={num_shared} + 1) * group_size={group_size} is more than the {num_units} units; "
            f"allowed: group_size up to {num_units // (num_shared + 1)}"
        )
    if not overlap and (num_groups + num_shared) * group_size != num_units:
        hint = _group_size(num_units, num_groups + num_shared, f"{num_groups} routed + {num_shared} shared experts")
        raise ValueError(
            f"overlap=False: ({num_groups} routed + {num_shared} shared) * group_size={group_size} is not the "
            f"{num_units} units; allowed: group_size={hint}"
        )
    ranked_EN = _ranked(scores_EN)[:, : num_wanted + group_size]  # no list is ever read further
    free_N = torch.ones(num_units, dtype=torch.bool, device=scores_EN.device)
    shared_S = torch.empty(0, dtype=torch.long, device=scores_EN.device)
    while len(shared_S) < num_wanted:
        heads = _heads(ranked_EN, free_N, group_size)
        votes_N = heads.flatten().bincount(minlength=num_units)
        chosen = (votes_N == votes_N.max()).nonzero().squeeze(1)[: num_wanted - len(shared_S)]
        shared_S = torch.cat((shared_S, chosen))
        free_N[chosen] = False
    if overlap:
        return shared_S, _heads(ranked_EN, free_N, group_size).sort(1).values
    rest = free_N.nonzero().squeeze(1)
    return shared_S, rest[gradient(scores_EN[:, rest])]


def overlap_matrix(groups_EF: Tensor, num_units: int | None = None) -> Tensor:
    """Pairwise overlap |S_i and S_j| / F [E, E] float32; the identity for a partition."""
    num_units = int(groups_EF.max()) + 1 if num_units is None else num_units
    member_EN = torch.zeros(len(groups_EF), num_units, device=groups_EF.device).scatter_(1, groups_EF, 1.0)
    return member_EN @ member_EN.T / groups_EF.shape[1]


def selection_counts(groups_EF: Tensor, num_units: int) -> Tensor:
    """How many of the units are in exactly r groups, for r = 0..E: [E + 1] int64, sums to num_units."""
    return groups_EF.flatten().bincount(minlength=num_units).bincount(minlength=len(groups_EF) + 1)


def _ranked(scores_EN: Tensor) -> Tensor:
    """Every expert's neurons by falling importance [E, N]; ties in ascending order."""
    return scores_EN.detach().argsort(dim=1, descending=True, stable=True)


def _heads(ranked_EN: Tensor, free_N: Tensor, count: int) -> Tensor:
    """The first `count` free neurons of every list [E, count]."""
    free_EN = free_N[ranked_EN]
    return ranked_EN[free_EN & (free_EN.cumsum(1) <= count)].view(len(ranked_EN), count)


def _group_size(num_units: int, num_groups: int, given: str = "") -> int:
    if num_groups >= 1 and num_units >= 1 and num_units % num_groups == 0:
        return num_units // num_groups
    raise ValueError(f"{given or f'num_groups={num_groups}'} does not divide {num_units} units; nearest: {nearest_divisors(num_units, num_groups)}")


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors next to a wanted one, below and above, for messages: (10, 3) -> "2, 5"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]))


def _check_matrix(name: str, x: Tensor, shape: str) -> None:
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {shape}, not empty")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; expected a floating type")
    # The sum of a matrix with such an entry is not finite; only then is the mask worth its memory.
    if not x.detach().sum().isfinite():
        bad = (~x.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"{name} has {len(bad)} values that are not finite, the first at {bad[0].tolist()}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}; allowed: at least 1")
