"""Clusters of equal size: balanced k-means on vectors, balanced partition of a weighted graph.

Both alternate a matrix product with the exact balanced assignment of assign.py. `split` is the checked front door.

Shapes: N units, D features, E groups, F = N / E units per group, C candidates of a group for a swap.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dyn.core.assign import balanced


def group_units(labels_N: Tensor, num_groups: int) -> Tensor:
    """Labels of a balanced partition [N] -> members [E, F], each row ascending."""
    return labels_N.argsort(stable=True).view(num_groups, -1)


def unit_rows(features_ND: Tensor) -> Tensor:
    """L2-normalised rows, float64 if they were, else float32; rows of zeros stay zero: equally far from all others."""
    dtype = torch.promote_types(features_ND.dtype, torch.float32)
    return nnf.normalize(features_ND.detach().to(dtype))


def kmeans_labels(
    x_ND: Tensor, num_groups: int, generator: torch.Generator, restarts: int, iterations: int
) -> tuple[Tensor, float]:
    """Balanced k-means: labels [N] of the best restart and its inertia (sum of squared distances to the means).

    k-means++ start, then exact balanced assignment and means in turn until no label changes; the inertia never rises.
    """
    energy = torch.linalg.vector_norm(x_ND, dim=1).double().square().sum().item()
    best, best_N = torch.inf, None
    for _ in range(restarts):
        centre_ED, labels_N, prices_E = _plus_plus(x_ND, num_groups, generator), None, None
        for _ in range(iterations):
            # |x|^2 is the same for every column, so it cannot change who goes where.
            cost_NE = centre_ED.square().sum(1) - 2 * (x_ND @ centre_ED.T)
            new_N, prices_E = balanced(cost_NE, prices_E)
            if labels_N is not None and torch.equal(new_N, labels_N):
                break
            labels_N = new_N
            centre_ED = (nnf.one_hot(labels_N, num_groups).to(x_ND.dtype).T @ x_ND) * (num_groups / len(x_ND))
        inertia = energy - len(x_ND) / num_groups * centre_ED.double().square().sum().item()
        if inertia < best:
            best, best_N = inertia, labels_N
    return best_N, best


def _plus_plus(x_ND: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """k-means++ centres [E, D]: each next one is a row drawn in proportion to its squared distance from the chosen."""
    # Drawn on the CPU in float64: the draw is one number from the generator, wherever the data live.
    square_N = torch.linalg.vector_norm(x_ND, dim=1).cpu().double().square()
    near_N = torch.full_like(square_N, torch.inf)
    chosen: list[int] = []
    for _ in range(num_groups):
        chance_N = near_N if chosen and near_N.sum() > 0 else torch.ones_like(near_N)  # all rows equal: any will do
        upto_N = chance_N.cumsum(0)
        draw = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device).item()
        chosen.append(min(int((upto_N <= draw * upto_N[-1]).sum()), len(x_ND) - 1))
        product_N = (x_ND @ x_ND[chosen[-1]]).cpu().double()
        near_N = near_N.minimum((square_N + square_N[chosen[-1]] - 2 * product_N).clamp(min=0))
        near_N[chosen] = 0
    return x_ND[chosen]


def sparsify(adjacency_NN: Tensor) -> Tensor:
    """Integer edge weights [N, N] float32 of a co-activation adjacency (llama_moe section 1.4 step 4).

    The threshold is 0.99 times the first of the 10th, 20th, ... percentile of all entries, diagonal included, that is
    positive; an entry becomes trunc(entry / threshold), 0 below 1 and on the diagonal, 2**24 at most (float32 counts
    no further). The paper's "non-zero" threshold differs where h keeps its sign: a negative one would join the
    neurons that exclude each other.
    Needs one N x N float32 copy. Raises ValueError when the matrix is not symmetric or has no positive entry.
    """
    weights_NN = (adjacency_NN + adjacency_NN.T).float().mul_(0.5)
    for rows, mirrored in zip(adjacency_NN.split(256), weights_NN.split(256), strict=True):
        if not torch.allclose(rows.float(), mirrored, rtol=1e-3, atol=1e-3 * mirrored.abs().max().item()):
            raise ValueError("adjacency_NN is not symmetric; expected sums of coactivate(h_TN)")
    # A percentile lies between two order statistics and is positive only if the upper one is past `rest` others.
    rest = sum((rows <= 0).sum().item() for rows in weights_NN.split(256))
    for percent in range(10, 101, 10):
        upper = percent / 100 * (weights_NN.numel() - 1) + 1
        if upper >= rest and (threshold := 0.99 * percentile(weights_NN, percent)) > 0:
            return weights_NN.div_(threshold).clamp_(0, 2**24).trunc_().fill_diagonal_(0)
    raise ValueError("adjacency_NN has no positive entry: no two units are ever active together")


def percentile(x_NM: Tensor, percent: float) -> float:
    """Exact percentile of all entries of a float32 matrix, linear between order statistics, in chunks of rows.

    torch.quantile refuses more than 2**24 entries, and a sort would copy the matrix three times: so count the upper
    16 bits of the (order-preserving) integer form of every entry, then the lower 16 of those that share the upper.
    """
    rank = percent / 100 * (x_NM.numel() - 1)
    low = int(rank)
    chunks = x_NM.split(256)

    def keys(chunk: Tensor) -> Tensor:
        bits = chunk.contiguous().view(torch.int32).flatten()
        return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def find(counts: Tensor, rank: int) -> tuple[int, int]:
        """The bin that holds a rank, and the rank inside that bin."""
        upto = counts.cumsum(0)
        place = int((upto <= rank).sum())
        return place, rank - int(upto[place] - counts[place])

    upper = sum(((keys(c) >> 16) + 2**15).bincount(minlength=2**16) for c in chunks)
    found = []
    for wanted in (low, min(low + 1, x_NM.numel() - 1)):
        high, inside = find(upper, wanted)
        lower = sum((k[(k >> 16) + 2**15 == high] & 0xFFFF).bincount(minlength=2**16) for k in map(keys, chunks))
        key = torch.tensor(((high - 2**15) << 16) + find(lower, inside)[0], dtype=torch.int32)
        found.append(torch.where(key < 0, key ^ 0x7FFFFFFF, key).view(torch.float32).item())
    return found[0] + (rank - low) * (found[1] - found[0])


def graph_labels(
    weights_NN: Tensor, num_groups: int, generator: torch.Generator, restarts: int, iterations: int
) -> tuple[Tensor, float]:
    """Balanced partition of a symmetric non-negative graph with heavy groups: labels [N] and the weight inside groups.

    The first start is spectral (far ahead where communities are faint), the others random; each is improved by
    propagation, the best one by swaps as well.
    """
    best, best_N = -1.0, None
    for restart in range(restarts):
        start = _shuffled if restart else _spectral
        labels_N = start(weights_NN, num_groups, generator)
        labels_N, within = _propagate(weights_NN, labels_N, num_groups, iterations)
        if within > best:
            best, best_N = within, labels_N
    return _swap(weights_NN, best_N, num_groups)


def _pull(weights_NN: Tensor, labels_N: Tensor, num_groups: int) -> Tensor:
    """Weight between every unit and every group [N, E], float64."""
    return (weights_NN @ nnf.one_hot(labels_N, num_groups).to(weights_NN.dtype)).double()


def _shuffled(weights_NN: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    order_N = torch.randperm(len(weights_NN), generator=generator, device=generator.device)
    return (order_N % num_groups).to(weights_NN.device)


def _spectral(weights_NN: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """Balanced k-means on the leading eigenvectors of the normalised adjacency, by subspace iteration."""
    scale_N1 = weights_NN.sum(1, keepdim=True).clamp(min=1).rsqrt()
    shape = (len(weights_NN), num_groups)
    basis_NE = torch.randn(shape, generator=generator, device=generator.device).to(weights_NN.device)
    for _ in range(15):
        # Adding the identity makes every eigenvalue positive, so "leading" means largest, not largest in size.
        basis_NE = torch.linalg.qr(basis_NE + scale_N1 * (weights_NN @ (scale_N1 * basis_NE))).Q
    return kmeans_labels(unit_rows(basis_NE), num_groups, generator, restarts=3, iterations=50)[0]


def _propagate(weights_NN: Tensor, labels_N: Tensor, num_groups: int, iterations: int) -> tuple[Tensor, float]:
    """All units choose the group that pulls most, sizes held equal by the exact assignment, until nothing improves.

    Moving all at once can overshoot. An extra pull to the present group changes no partition's weight but makes the
    objective convex, and from the largest degree on no step can lose: it is raised whenever a step would.
    """
    pull_NE = _pull(weights_NN, labels_N, num_groups)
    within = pull_NE.gather(1, labels_N[:, None]).sum().item()
    stay, prices_E = 0.0, None
    for _ in range(iterations):
        new_N, prices_E = balanced(-pull_NE - stay * nnf.one_hot(labels_N, num_groups), prices_E)
        if torch.equal(new_N, labels_N):
            break
        new_NE = _pull(weights_NN, new_N, num_groups)
        new = new_NE.gather(1, new_N[:, None]).sum().item()
        if new > within:
            labels_N, pull_NE, within = new_N, new_NE, new
        else:
            stay = max(2 * stay, pull_NE.mean().item())
    return labels_N, within / 2


def _swap(weights_NN: Tensor, labels_N: Tensor, num_groups: int, candidates: int = 64) -> tuple[Tensor, float]:
    """Exchange units between two groups while that gains weight (Kernighan-Lin), pair of groups after pair.

    Exchanging unit i of a with j of b gains pull[i,b] - pull[i,a] + pull[j,a] - pull[j,b] - 2 w[i,j]. Weights are not
    negative, so only the units with the largest differences can gain much and are tried, all against all.
    """
    labels_N, pull_NE = labels_N.clone(), _pull(weights_NN, labels_N, num_groups)
    floor = 1e-6 * pull_NE.max().item()  # smaller gains are rounding
    for _ in range(20):
        gained = False
        for a, b in itertools.combinations(range(num_groups), 2):
            while True:
                sides = []
                for here, there in ((a, b), (b, a)):
                    unit_F = (labels_N == here).nonzero().squeeze(1)
                    best = (pull_NE[unit_F, there] - pull_NE[unit_F, here]).topk(min(candidates, len(unit_F)))
                    sides.append((unit_F[best.indices], best.values))
                (i_C, from_a_C), (j_C, from_b_C) = sides
                gain_CC = from_a_C[:, None] + from_b_C - 2 * weights_NN[i_C[:, None], j_C]
                gain, place = (x.item() for x in gain_CC.flatten().max(0))
                if gain <= floor:
                    break
                gained = True
                i, j = i_C[place // len(j_C)], j_C[place % len(j_C)]
                labels_N[i], labels_N[j] = b, a
                moved_N = (weights_NN[j] - weights_NN[i]).double()
                pull_NE[:, a] += moved_N
                pull_NE[:, b] -= moved_N
        if not gained:
            break
    return labels_N, pull_NE.gather(1, labels_N[:, None]).sum().item() / 2
