"""Balanced assignment: N rows to E columns, exactly N/E rows each (or as many as is said), at the least total cost.

The transport problem has one price per column as its dual: at the right prices every row simply takes its cheapest
column and the sizes come out right. So the work is done on E prices, not on N rows: Newton steps on the smoothed dual
bring the sizes close, then shortest augmenting paths on the graph of E columns move the few rows that are left over.
Every row keeps its cheapest column at the current prices throughout, which is what makes the result optimal.

Shapes: N rows, E columns, M rows of one column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def balanced(cost_NE: Tensor, prices_E: Tensor | None = None, sizes_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Assign N/E rows, or sizes_E, to every column with the least total cost; exact up to float64 rounding.

    cost_NE: [N, E], finite, any device.
    prices_E: [E] float64, a warm start such as the prices of the previous, similar call.
    sizes_E: [E] int64, sums to N; None: N/E each, and N must be a multiple of E (both asserted: callers report it to their users).
    Returns labels_N [N] int64 on the device of the costs, and prices_E [E] float64 on the CPU, the dual certificate:
    cost[n, e] + prices[e] is smallest at e = labels[n] for every row.

    Deterministic: ties go to the lowest column, and tied rows move in ascending order.
    """
    rows, columns = cost_NE.shape
    if sizes_E is None:
        assert rows % columns == 0, (rows, columns)
        sizes_E = torch.full((columns,), rows // columns)
    assert sizes_E.sum() == rows and len(sizes_E) == columns, (sizes_E, rows)
    # Hundreds of small dependent steps: a CPU does them faster than the launches on an accelerator would.
    cost_EN = cost_NE.detach().to("cpu", torch.float64).T.contiguous()
    # Smoothing only has to be finer from where a warm start stands, not to find the way there.
    sharpness = 4 if prices_E is None else 256
    prices_E = -cost_EN.median(1).values if prices_E is None else prices_E
    prices_E = _anneal(cost_EN, prices_E, sizes_E, sharpness)
    labels_N = (cost_EN + prices_E[:, None]).argmin(0)
    _augment(cost_EN, prices_E, labels_N, sizes_E)
    return labels_N.to(cost_NE.device), prices_E


def _anneal(cost_EN: Tensor, prices_E: Tensor, sizes_E: Tensor, sharpness: float) -> Tensor:
    """Prices at which the sizes come out nearly right: damped Newton on the dual, its minimum smoothed less and less.

    Row n splits over the columns by softmax(-(cost + price) / width), the gradient is each column's mass - its size.
    Coordinate ascent (an auction) needs hundreds of sweeps when all rows rank the columns alike; Newton does not.
    """
    columns, size = len(prices_E), sizes_E.sum().item() / len(prices_E)
    spread = (cost_EN + prices_E[:, None]).aminmax(dim=0)
    spread = (spread.max - spread.min).mean().item()
    best, best_E = torch.inf, prices_E

    def smooth(prices_E: Tensor, width: float) -> tuple[Tensor, Tensor]:
        z_EN = (cost_EN + prices_E[:, None]) / -width
        log_N = z_EN.logsumexp(0)
        return z_EN.sub_(log_N).exp_(), -width * log_N.sum() - (sizes_E * prices_E).sum()

    budget = 80  # evaluations; 5 to 30 are usual, many copies of the same rows would take hundreds
    while spread > 0 and sharpness < 1e9 and budget > 0:
        width = spread / sharpness
        mass_EN, value = smooth(prices_E, width)
        budget -= 1
        damping = 1.0
        while budget > 0 and damping > 0.01:
            gradient_E = mass_EN.sum(1) - sizes_E
            if (gradient_E.abs() <= (sizes_E / 256).clamp(min=1)).all():
                break
            hessian_EE = mass_EN.sum(1).diag() - mass_EN @ mass_EN.T
            hessian_EE += size / columns  # the prices are free up to one constant
            hessian_EE.diagonal().add_(1e-6 * size)  # columns that nobody takes
            step_E = width * torch.linalg.solve(hessian_EE, gradient_E)
            for damping in (1, 0.5, 0.25, 0.1, 0.03, 0.01):
                mass_EN, new = smooth(prices_E + damping * step_E, width)
                budget -= 1
                if new >= value + 0.1 * damping * (gradient_E @ step_E):
                    break
            prices_E, value = prices_E + damping * step_E, new
        excess = _excess((cost_EN + prices_E[:, None]).argmin(0), sizes_E).clamp(min=0).sum().item()
        if excess < best:
            best, best_E = excess, prices_E
        if best <= 2 * columns:  # fewer rows than this move faster one path at a time
            break
        sharpness *= 8
    return best_E.clone()


def _augment(cost_EN: Tensor, prices_E: Tensor, labels_N: Tensor, sizes_E: Tensor) -> None:
    """Even the sizes out along shortest paths from over-full to under-full columns; labels and prices in place.

    An edge a -> b weighs what the cheapest move of one of a's rows to b costs. At the current prices no edge is
    negative; lowering the prices by the path lengths keeps it so (Johnson's potentials), hence no cycle of moves can
    ever gain. Rows that are tied for the cheapest move go together, which settles integer costs in few rounds.
    """
    columns = len(prices_E)
    costs, labels = cost_EN.numpy(), labels_N.numpy()  # the same memory: thousands of small gathers cost arrays less than tensors

    def moves(a: int) -> tuple[Any, Any]:
        rows_M = (labels == a).nonzero()[0]
        return rows_M, costs[:, rows_M] - costs[a, rows_M]

    def cheapest(a: int) -> Tensor:
        rows_M, delta_EM = moves(a)
        return torch.from_numpy(delta_EM.min(1)) if len(rows_M) else torch.full_like(prices_E, torch.inf)

    cheapest_EE = torch.stack([cheapest(a) for a in range(columns)])
    while (excess_E := _excess(labels_N, sizes_E)).any():
        weight_EE = (cheapest_EE + prices_E - prices_E[:, None]).clamp(min=0)  # below zero only by rounding
        length_E = torch.zeros_like(prices_E).masked_fill(excess_E <= 0, torch.inf)
        parent_E = torch.full_like(excess_E, -1)
        while True:  # Bellman-Ford; with no negative edge the parents cannot form a cycle
            through_E, via_E = (length_E[:, None] + weight_EE).min(0)
            shorter_E = through_E < length_E
            if not shorter_E.any():
                break
            length_E, parent_E = torch.where(shorter_E, through_E, length_E), torch.where(shorter_E, via_E, parent_E)
        goal = length_E.masked_fill(excess_E >= 0, torch.inf).argmin().item()
        prices_E -= length_E.clamp(max=length_E[goal].item())

        path, parents = [goal], parent_E.tolist()
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        steps = []
        for b, a in zip(path, path[1:], strict=False):
            rows_M, delta_EM = moves(a)
            steps.append((b, rows_M[delta_EM[b] == cheapest_EE[a, b].item()]))
        count = min(excess_E[path[-1]].item(), -excess_E[goal].item(), *(len(rows) for _, rows in steps))
        for b, rows in steps:
            labels[rows[:count]] = b
        for a in path:
            cheapest_EE[a] = cheapest(a)


def _excess(labels_N: Tensor, sizes_E: Tensor) -> Tensor:
    """Rows above (positive) or below (negative) the size asked for, per column [E]."""
    return labels_N.bincount(minlength=len(sizes_E)) - sizes_E
