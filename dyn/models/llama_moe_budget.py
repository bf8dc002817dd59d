"""How many neurons each layer needs: budgets by layer from measured losses. T tokens, N neurons, D hidden size, U layers, B levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyn.core.calibrate import allocate, routed_activations
from dyn.models.llama_moe_calibrate import LayerFit, activations, active_neurons, fit_layers
from dyn.models.llama_moe_construct import METHODS
from dyn.models.llama_moe_convert import moe_config
from dyn.models.llama_moe_diagnose import domain_losses, placed
from dyn.models.llama_moe_measure import check_batches


def layer_budgets(dense: PreTrainedModel, *, num_experts: int = 32, num_experts_per_tok: int = 16, batches: Iterable[Tensor], held_out: Iterable[Tensor],
                  construction: str = "calibrated", levels: Sequence[int] | None = None, seed: int = 0,
                  on_layer: Callable[[int, int], object] = lambda level, layer: None) -> list[int]:
    """num_experts_per_tok for each layer, with the mean that was asked for: what `from_dense` takes as a list.

    Each layer alone is converted at each level and its loss is measured in the dense model; `dyn.core.calibrate.allocate` then chooses. Costs a conversion for
    each level, and a pass over `held_out` for each layer and level.

    Args:
        dense: a dense decoder, on its device; it stays as it is.
        num_experts, num_experts_per_tok: k/N is the share of neurons that a token passes through, in the mean over layers.
        batches: calibration text, ids [B, L].
        held_out: text to measure on, ids [B, L]: other text than `batches`, and other than what the result is reported on.
        construction: one that needs activations (calibrated, cmoe, expert_weaver).
        levels: values of num_experts_per_tok to choose from, ascending and evenly spaced; None: five around the mean.
        on_layer: called with (level, layer) when it is measured.

    Raises:
        ValueError: a construction without activations, levels that do not allow the mean or are no whole numbers of neurons, text that does not fit.
    """
    if construction not in METHODS or METHODS[construction].needs != "activations":
        allowed = ", ".join(name for name, method in METHODS.items() if method.needs == "activations")
        raise ValueError(f"construction={construction!r} has no budgets to measure; allowed: {allowed}")
    n, k, batches, held_out = num_experts, num_experts_per_tok, list(batches), list(held_out)
    levels = around(k, n) if levels is None else list(levels)
    layers, width = dense.config.num_hidden_layers, dense.config.intermediate_size
    configs = [moe_config(dense.config, construction, num_experts=n, num_experts_per_tok=level) for level in levels]
    cost, [mean] = active_neurons(width, n, levels), active_neurons(width, n, [k])
    allocate(torch.zeros(layers, len(levels)), cost, layers * mean)  # refuses before the work what it would refuse after
    check_batches(held_out, dense.config.vocab_size)
    loss_UB = torch.zeros(layers, len(levels))
    for b, config in enumerate(configs):
        for u, fit in enumerate(fit_layers(dense, batches, METHODS[construction], config, seed, alone=True)):
            layer = dense.model.layers[u]
            with placed(layer, _Fitted(layer.mlp, fit, config.of_layer("num_experts_per_tok", u))):
                loss_UB[u, b] = domain_losses(dense, {"": held_out})[""]
            on_layer(b, u)
    return [levels[b] for b in allocate(loss_UB, cost, layers * mean)]


def around(k: int, n: int) -> list[int]:
    """Up to five evenly spaced numbers about k within 1..n, k in the middle."""
    room = min(k - 1, n - k)
    step = max(1, room // 3)
    return [k + i * step for i in range(-2, 3) if abs(i) * step <= room]


class _Fitted(nn.Module):
    """A converted feed-forward in the dense order of neurons, where a dense one is expected: all are computed, and those not chosen count nothing."""

    def __init__(self, mlp: nn.Module, fit: LayerFit, k: int) -> None:
        super().__init__()
        self.mlp, self.fit, self.k = mlp, fit, k

    def forward(self, x: Tensor) -> Tensor:
        x_TD, fit = x.flatten(0, -2), self.fit
        phi_TN = routed_activations(activations(self.mlp, x_TD), x_TD.float(), fit.shared_S, fit.groups_EF, fit.gate_ED, self.k)
        return (phi_TN @ fit.down_DN.float().T).to(x.dtype).view_as(x)
