"""Training-free conversion of one feed-forward layer: groups of neurons and a linear gate that fit each other, and a ridge refit of the down projection.

T tokens, N neurons, D hidden size, E routed experts of F neurons, K of them a token, S shared neurons (always on).

The energy of neuron n on token t is omega_t (h_tn - mean_n)^2 |w_n|^2: what its leaving out would add to the squared error of the layer's output, were
the others' outputs orthogonal to it. Groups are good when a gate that sees only x can tell on which tokens they carry much energy; therefore groups
follow the choices of a gate from the first step on, and not the choices of an ideal one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dyn.core.assign import balanced

DOMINANT = 0.2  # share of a token's squared stream
SEED_ROUNDS = 10  # of spherical k-means over tokens, which only starts the alternation
GATE_STEPS, GATE_BATCH, GATE_RATE = 100, 4096, 0.06  # of `fit_gate`; the rate is relative to the deviation of the starting weights


def token_weights(stream_TD: Tensor) -> Tensor:
    """omega [T]: 1 / |residual stream|^2. The next norm divides by it, so that an error counts in proportion; without it a few tokens with massive
    activations (20,000 where others have 150) decide every regression."""
    return 1.0 / stream_TD.float().square().sum(1).clamp(min=1e-12)


def dominant(h_TN: Tensor, omega_T: Tensor, norm_N: Tensor, most: int) -> Tensor:
    """Neurons, at most `most`, that alone make up more than a fifth of the squared stream of some token, the strongest first.

    They write the massive activations of attention sinks: seldom, so that they carry little energy in all, but a sequence whose sink is missing is lost.
    Hence they must always be on."""
    peak_N = (h_TN.square() * omega_T[:, None]).amax(0) * norm_N.square()
    order_N = peak_N.argsort(descending=True, stable=True)
    return order_N[: min(most, int((peak_N > DOMINANT).sum()))]


def energies(h_TN: Tensor, omega_T: Tensor, norm_N: Tensor) -> Tensor:
    """Energy of every neuron on every token [T, N] from activations h and the norms of the down projection's columns. `h_TN` is overwritten."""
    mean_N = (omega_T @ h_TN) / omega_T.sum()
    return h_TN.sub_(mean_N).square_().mul_(omega_T[:, None]).mul_(norm_N.square())


def top_mask(score_TE: Tensor, k: int) -> Tensor:
    """1.0 at the k largest of every row, else 0.0."""
    return torch.zeros_like(score_TE).scatter_(1, score_TE.topk(k, 1).indices, 1.0)


def threshold(score_TE: Tensor, k: int) -> Tensor:
    """Between the k-th largest of every row and the next: [T, 1]. On a CPU numpy sorts short rows much faster than torch finds their largest."""
    if score_TE.device.type == "cpu":
        ascending_TE = score_TE.detach().clone(memory_format=torch.contiguous_format)
        ascending_TE.numpy().sort(axis=1)
        return ascending_TE[:, -k - 1: ascending_TE.shape[1] - k + 1].mean(1, keepdim=True)
    return score_TE.topk(k + 1, 1).values[:, -2:].mean(1, keepdim=True)


def fit_gate(x_TD: Tensor, energy_TE: Tensor, k: int, *, start_ED: Tensor | None = None, steps: int = GATE_STEPS,
             generator: torch.Generator | None = None) -> Tensor:
    """A linear gate [E, D] without bias whose top k gather as much of the experts' energy [T, E] as it can.

    A logistic loss in every expert's distance from the threshold between the k-th and the next logit, weighted by what a wrong decision costs: the
    expert's distance in energy from the token's ideal threshold. Starts from `start_ED`, or from least squares on the square roots of energies.

    Args:
        x_TD: what the gate sees.
        energy_TE: energy of each expert on each token.
        k: experts a token, 1 <= k < E.
        steps: of Adam, on batches of 4,096 tokens.
        generator: of the batches, on the CPU.
    """
    if start_ED is None:
        root_TE = energy_TE.sqrt()
        fit = Ridge(x_TD.shape[1], energy_TE.shape[1], x_TD)
        fit.add(x_TD, root_TE - root_TE.mean(1, keepdim=True))
        start_ED = fit.solve(ridge=1e-2).T
        start_ED = start_ED / (x_TD @ start_ED.T).std().clamp(min=1e-12)
    gate_ED = start_ED.clone()
    cost_TE = energy_TE - threshold(energy_TE, k)
    cost_TE = cost_TE / cost_TE.abs().mean().clamp(min=1e-30)
    # Adam by hand: a few lines, and no graph, whatever the caller's gradient mode is.
    first_ED, second_ED = torch.zeros_like(gate_ED), torch.zeros_like(gate_ED)
    rate = GATE_RATE * start_ED.std()
    for step in range(steps):
        rows_B = torch.randint(len(x_TD), (min(GATE_BATCH, len(x_TD)),), generator=generator, device="cpu").to(x_TD.device)
        x_BD, cost_BE = x_TD.index_select(0, rows_B), cost_TE.index_select(0, rows_B)
        score_BE = x_BD @ gate_ED.T
        margin_BE = score_BE - threshold(score_BE, k)
        # d/dmargin of |cost| softplus(-sign(cost) margin)
        slope_BE = -cost_BE * torch.sigmoid(-cost_BE.sign() * margin_BE) / cost_BE.numel()
        gradient_ED = slope_BE.T @ x_BD
        first_ED.mul_(0.9).add_(gradient_ED, alpha=0.1)
        second_ED.mul_(0.999).addcmul_(gradient_ED, gradient_ED, value=0.001)
        unbiased_ED = (second_ED / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-12)
        gate_ED -= rate * (1 - step / steps) / (1 - 0.9 ** (step + 1)) * first_ED / unbiased_ED
    return gate_ED


def seed_choices(x_TD: Tensor, num_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """Choices [T, E] to start from: every token takes the k nearest of E directions, the means of spherical k-means over tokens."""
    unit_TD = nnf.normalize(x_TD - x_TD.mean(0))
    order_T = torch.randperm(len(unit_TD), generator=generator, device="cpu")[:num_experts].to(x_TD.device)
    centre_ED = unit_TD[order_T]
    for _ in range(SEED_ROUNDS):
        nearest_T = (unit_TD @ centre_ED.T).argmax(1)
        total_ED = torch.zeros_like(centre_ED).index_add_(0, nearest_T, unit_TD)
        centre_ED = torch.where(total_ED.any(1, keepdim=True), nnf.normalize(total_ED), centre_ED)  # one without tokens stays where it is
    return top_mask(unit_TD @ centre_ED.T, k)


def alternate(x_TD: Tensor, energy_TN: Tensor, *, num_experts: int, k: int, size: int, rounds: int, generator: torch.Generator,
              always_on: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Shared neurons, balanced groups and a gate, each fitted to the others in turn.

    Given the gate's choices, the assignment of neurons to shared places and groups that gathers the most energy is exact (`balanced`; a shared neuron
    gathers on every token). Given groups, the gate is refitted from where it stood.

    Args:
        x_TD, energy_TN: what the gate sees, and `energies`.
        num_experts, k, size: E, K < E and F; E F <= N, what is left is shared and must be a multiple of F.
        rounds: of both steps; 4 to 8 are enough.
        generator: on the CPU.
        always_on: neurons that must be shared, no more than there are places.

    Returns:
        shared_S, groups_EF (both sorted), gate_ED, and the captured share of all energy after every round.
    """
    units = energy_TN.shape[1]
    always = (units - num_experts * size) // size
    assert k < num_experts and (num_experts + always) * size == units, (units, num_experts, k, size)
    # Shared places are alike: one column holds them all.
    shared_columns = min(always, 1)
    sizes_E = torch.tensor([always * size] * shared_columns + [size] * num_experts)
    total, whole_N = energy_TN.sum(dtype=torch.float64).item(), energy_TN.sum(0)
    chosen_TE, gate_ED, prices, captured = seed_choices(x_TD, num_experts, k, generator), None, None, []
    for number in range(rounds):
        gain_NE = torch.cat([whole_N[:, None][:, :shared_columns], energy_TN.T @ chosen_TE], 1)
        if always_on is not None:  # no place's price can exceed what the most energetic neuron gains by it
            gain_NE[always_on, :shared_columns] += 2 * whole_N.max()
        labels_N, prices = balanced(-gain_NE, prices, sizes_E)
        # A column a group, shared ones left out.
        member_NE = nnf.one_hot(labels_N, num_experts + shared_columns)[:, shared_columns:].to(energy_TN.dtype)
        energy_TE = energy_TN @ member_NE
        gate_ED = fit_gate(x_TD, energy_TE, k, start_ED=gate_ED, steps=GATE_STEPS * (2 if number + 1 == rounds else 1), generator=generator)
        chosen_TE = top_mask(x_TD @ gate_ED.T, k)
        shared = whole_N[labels_N < shared_columns].sum(dtype=torch.float64).item()
        captured.append((shared + (energy_TE * chosen_TE).sum(dtype=torch.float64).item()) / max(total, 1e-30))
    order_N = labels_N.sort(stable=True).indices  # groups one after the other, ascending inside
    return order_N[: always * size].sort().values, order_N[always * size:].view(num_experts, size), gate_ED, captured


def routed_activations(h_TN: Tensor, x_TD: Tensor, shared_S: Tensor, groups_EF: Tensor, gate_ED: Tensor, k: int) -> Tensor:
    """What the refitted down projection sees [T, N], in the dense order of neurons: activations times K x their expert's softmax weight (0 where it is not
    chosen), shared ones as they are."""
    weight_TK, idx_TK = (x_TD @ gate_ED.T).topk(k, 1)
    weight_TE = torch.zeros(len(x_TD), len(gate_ED), dtype=h_TN.dtype, device=h_TN.device).scatter_(1, idx_TK, k * weight_TK.softmax(1))
    owner_N = torch.full((h_TN.shape[1],), len(gate_ED), device=h_TN.device)
    owner_N[groups_EF.flatten()] = torch.arange(len(gate_ED), device=h_TN.device).repeat_interleave(groups_EF.shape[1])
    return h_TN * torch.cat([weight_TE, torch.ones_like(weight_TE[:, :1])], 1)[:, owner_N]


class Ridge:
    """Weighted ridge regression from running sums: min_W sum_t omega_t |y_t - phi_t W|^2 + ridge * mean(diag G) |W - W_0|^2. Memory: P^2 + P Q."""

    def __init__(self, inputs: int, outputs: int, like: Tensor) -> None:
        self.gram_PP = torch.zeros(inputs, inputs, device=like.device)
        self.cross_PQ = torch.zeros(inputs, outputs, device=like.device)
        self.tokens = 0

    def add(self, phi_TP: Tensor, y_TQ: Tensor, omega_T: Tensor | None = None) -> None:
        """Take in T rows."""
        weighted_TP = phi_TP if omega_T is None else phi_TP * omega_T[:, None]
        self.gram_PP += weighted_TP.T @ phi_TP
        self.cross_PQ += weighted_TP.T @ y_TQ
        self.tokens += len(phi_TP)

    def solve(self, prior_PQ: Tensor | None = None, *, ridge: float, outputs: slice = slice(None)) -> Tensor:
        """W [P, Q] float32 of some outputs, solved in float64; `prior_PQ` is W_0 (None: zeros). ValueError for rows that were not finite."""
        gram_PP, cross_PQ = self.gram_PP.double(), self.cross_PQ[:, outputs].double()
        if not (gram_PP.diagonal().isfinite().all() and cross_PQ.isfinite().all()):
            raise ValueError(f"the regression's {self.tokens} rows hold numbers that are not finite")
        strength = ridge * gram_PP.diagonal().mean().clamp(min=1e-30)
        gram_PP.diagonal().add_(strength)
        if prior_PQ is not None:
            cross_PQ = cross_PQ + strength * prior_PQ.double()
        return torch.cholesky_solve(cross_PQ, torch.linalg.cholesky(gram_PP)).float()


def allocate(loss_UB: Tensor, cost: Sequence[int] | Sequence[Sequence[int]], total: int) -> list[int]:
    """Budgets by unit (a layer's active neurons, the kept weights of one mask of a set) from measured losses, greedily: a level for each unit.

    Every unit starts at its dearest level, and the step down that adds the least measured loss for each unit of cost saved is taken, over and over; losses
    of units add up, which is an assumption.

    Args:
        loss_UB: loss with unit u alone at level b.
        cost: of each level [B], ascending; units of different sizes have each their own [U][B].
        total: what the chosen costs sum to. With costs of one step each, alike for all units, they do so exactly; else steps are taken until they are at
            most `total`, and those that can be taken back then are, the best first.

    Raises:
        ValueError: losses that are not finite; costs that do not fit or are not ascending; equal and evenly spaced ones that no choice of levels sums to
            `total`; a total under the cheapest levels or over the dearest.
    """
    units, levels = loss_UB.shape
    cost_UB = [list(row) for row in cost] if isinstance(cost[0], Sequence) else [list(cost)] * units
    if len(cost_UB) != units or any(len(row) != levels or any(b <= a for a, b in zip(row, row[1:], strict=False)) for row in cost_UB):
        raise ValueError(f"cost={list(cost)} must be {levels} ascending costs, or {units} lists of them")
    if not loss_UB.isfinite().all():
        raise ValueError("measured losses hold numbers that are not finite, which cannot be ranked")
    least, most = (sum(row[end] for row in cost_UB) for end in (0, -1))
    steps = {b - a for row in cost_UB for a, b in zip(row, row[1:], strict=False)}
    if not least <= total <= most or (len(steps) == 1 and (most - total) % next(iter(steps))):
        raise ValueError(f"total={total} cannot be reached by {units} units of {list(cost)}")
    loss, chosen, spent = loss_UB.tolist(), [levels - 1] * units, most

    def rate(u: int, low: int, high: int) -> float:
        return (loss[u][low] - loss[u][high]) / (cost_UB[u][high] - cost_UB[u][low])

    while spent > total:
        # The best jump may be of several levels at once where the measured curve is not convex, but only the first step of it is taken.
        rise = [min((rate(u, b, c) for b in range(c)), default=math.inf) for u, c in enumerate(chosen)]
        u = rise.index(min(rise))
        spent -= cost_UB[u][chosen[u]] - cost_UB[u][chosen[u] - 1]
        chosen[u] -= 1
    while fits := [u for u, c in enumerate(chosen) if c + 1 < levels and spent + cost_UB[u][c + 1] - cost_UB[u][c] <= total]:
        u = max(fits, key=lambda u: rate(u, chosen[u], chosen[u] + 1))
        spent += cost_UB[u][chosen[u] + 1] - cost_UB[u][chosen[u]]
        chosen[u] += 1
    return chosen
