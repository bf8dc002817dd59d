"""How many neurons each layer needs: budgets by layer from measured divergences. T tokens, N neurons, D hidden size, V vocabulary, U layers, B levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyn.core.calibrate import allocate, routed_activations
from dyn.models.llama_moe_calibrate import LayerFit, activations, active_neurons, check_enough, fit_layers, walk
from dyn.models.llama_moe_construct import METHODS, fitted
from dyn.models.llama_moe_convert import check_ints, moe_config
from dyn.models.llama_moe_dense import causal, plain_arithmetic
from dyn.models.llama_moe_measure import check_batches, placed, summed_divergence
from dyn.models.llama_moe_prune import keep_neurons
from dyn.nn.probe import for_statistics

EXPONENT = 2.0  # of the divergence in the share of neurons that are left out, where a single level was measured
LEAST = 3 / 8  # of the mean: no layer gets fewer neurons, for the curve that was measured near the mean does not reach so far


@plain_arithmetic()
def layer_budgets(dense: PreTrainedModel, *, num_experts: int = 32, num_experts_per_tok: int = 16, batches: Iterable[Tensor], held_out: Iterable[Tensor],
                  construction: str = "calibrated", levels: Sequence[int] | None = None, seed: int = 0,
                  on_layer: Callable[[int, int], object] = lambda level, layer: None) -> list[int]:
    """num_experts_per_tok for each layer, with the mean that was asked for: what `from_dense` (and `prune_dense`, over num_experts) takes as a list.

    Each layer alone is converted at each level, and the divergence of the dense model with it from the dense model is measured: it is less noisy than a
    loss. Between levels it follows a power of the share of neurons that are left out, which is nothing where none are. `dyn.core.calibrate.allocate` chooses
    among all numbers from 3/8 of the mean to num_experts. Costs a conversion for each level, and a pass over `held_out` for each layer and level.

    Args:
        dense: a dense decoder, on its device; it stays as it is.
        num_experts, num_experts_per_tok: k/N is the share of neurons that a token passes through, in the mean over layers.
        batches: calibration text, ids [B, L]; a sixth of what a conversion takes is enough.
        held_out: text to measure on, ids [B, L]: other text than `batches`, and other than what the result is reported on.
        construction: one that needs activations (calibrated, cmoe, expert_weaver), or prune.
        levels: values of num_experts_per_tok that are measured, ascending, under num_experts; None: the mean alone, and a power of 2.
        on_layer: called with (level, layer) when it is measured.

    Raises:
        ValueError: a construction without activations, levels that are out of range or no whole numbers of neurons, text that does not fit.
    """
    if not isinstance(dense, nn.Module):
        raise ValueError(f"layer_budgets measures a network, got {type(dense).__name__}; load it first")
    dense = causal(dense)
    prune = construction == "prune"
    if not prune and construction not in fitted():
        raise ValueError(f"construction={construction!r} has no budgets to measure; allowed: {', '.join(fitted())}, prune")
    n, k, batches, held_out = num_experts, num_experts_per_tok, list(batches), list(held_out)
    levels = [k] if levels is None else list(levels)
    check_ints(num_experts=n, num_experts_per_tok=k, **{f"levels[{i}]": level for i, level in enumerate(levels)})
    if not 1 <= k <= n:
        raise ValueError(f"num_experts_per_tok={k} must be between 1 and num_experts={n}")
    layers, width = dense.config.num_hidden_layers, dense.config.intermediate_size
    if k == n:
        return [n] * layers
    if not levels or levels != sorted(set(levels)) or not 1 <= levels[0] <= levels[-1] < n:
        raise ValueError(f"levels={levels} must be ascending numbers from 1 to num_experts - 1 = {n - 1}")
    actives = active_neurons(width, n, levels)
    choices = list(range(max(1, math.ceil(LEAST * k)), n + 1))
    cost = active_neurons(width, n, choices)
    check_batches(held_out, dense.config.vocab_size)
    check_enough(batches, dense, actives[-1])
    loss_UB = torch.zeros(layers, len(levels))
    with for_statistics(dense), torch.no_grad():
        stream = [dense.model(input_ids=ids.to(dense.device), use_cache=False)[0] for ids in held_out]
        for b, (level, active) in enumerate(zip(levels, actives, strict=True)):
            if prune:
                chosen, fits = 0, walk(dense, batches, keep_neurons([active] * layers), refit=True, seed=seed, alone=True)
            else:
                config = moe_config(dense.config, construction, num_experts=n, num_experts_per_tok=level)
                chosen, fits = config.of_layer("num_experts_per_tok", 0), fit_layers(dense, batches, METHODS[construction], config, seed, alone=True)
            for u, fit in enumerate(fits):
                layer = dense.model.layers[u]
                with placed(layer, _Fitted(layer.mlp, fit, chosen)):
                    loss_UB[u, b] = divergence(dense, held_out, stream)
                on_layer(level, u)
    return [choices[b] for b in allocate(between(loss_UB, levels, choices, n), cost, layers * active_neurons(width, n, [k])[0])]


def between(loss_UB: Tensor, levels: Sequence[int], choices: Sequence[int], n: int) -> Tensor:
    """Losses [U, C] at `choices` out of n from those at `levels` [U, B] below n: straight lines in the logarithms of loss and idle share n - k, which go on
    beyond both ends; the power EXPONENT where there is one level, zero where nothing is idle."""
    log_B = torch.tensor([math.log(n - k) for k in levels], dtype=torch.float64).flip(0)  # ascending
    loss_UB = loss_UB.double().clamp(min=1e-12).log().flip(1)
    log_C = torch.tensor([math.log(max(n - k, 0.5)) for k in choices], dtype=torch.float64)
    if len(levels) == 1:
        found_UC = loss_UB + EXPONENT * (log_C - log_B)
    else:
        left_C = torch.searchsorted(log_B, log_C).clamp(1, len(levels) - 1) - 1
        slope_UB = (loss_UB.diff(dim=1) / log_B.diff()).clamp(min=1.0)  # it never pays to leave out less of one layer for more of an equal one
        found_UC = loss_UB[:, left_C] + slope_UB[:, left_C] * (log_C - log_B[left_C])
    return torch.where(torch.tensor([k == n for k in choices]), 0.0, found_UC.exp()).float()


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Tensor], hidden: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence, in nats a token of `batches`, of a decoder's predictions from those that its head makes of other last hidden states."""
    total = 0.0
    for ids, theirs in zip(batches, hidden, strict=True):
        ours = model.model(input_ids=ids.to(model.device), use_cache=False)[0]
        for one, two in zip(ours, theirs, strict=True):  # a sequence at a time: the vocabulary is wide
            total += float(summed_divergence(model.lm_head(one), model.lm_head(two)))
    return total / sum(ids.numel() for ids in batches)


class _Fitted(nn.Module):
    """A converted feed-forward in the dense order of neurons, where a dense one is expected: all are computed, and those not chosen count nothing."""

    def __init__(self, mlp: nn.Module, fit: LayerFit, k: int) -> None:
        super().__init__()
        self.mlp, self.fit, self.k = mlp, fit, k

    def forward(self, x: Tensor) -> Tensor:
        x_TD, fit = x.flatten(0, -2), self.fit
        h_TN, down_DN = activations(self.mlp, x_TD), fit.down_DN.float()
        if fit.gate_ED is None:
            phi_TN, down_DN = h_TN[:, fit.shared_S], down_DN[:, fit.shared_S]
        else:
            phi_TN = routed_activations(h_TN, x_TD.float(), fit.shared_S, fit.groups_EF, fit.gate_ED, self.k)
        return (phi_TN @ down_DN.T).to(x.dtype).view_as(x)
