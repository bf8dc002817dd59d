"""Attention over parameter sets, and what a gate's decisions cost and how evenly they fall: load statistics and balance losses. Selection is in ops/route.

T tokens, E experts, K experts a token; a name ends in the shape of its tensor. Everything is computed in float32,
float64 input in float64. `mask_T` (bool, True = counts) leaves tokens, padding above all, out of every sum and mean.
Ids are in [0, E). Section numbers are those of the LLaMA-MoE specification; beyond it: Shazeer et al. 2017, Fedus et al.
2022 (switch), Zoph et al. 2022 (z-loss), DeepSeek-V3 (bias).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def attend(logits_BK: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Softmax over K parameter sets at a temperature, [B, K] in float32 (PAD-Net section 1.2). A high temperature makes it uniform."""
    return (_float(logits_BK) / temperature).softmax(-1)


def annealed_temperature(step: int, total_steps: int, start: float = 30.0) -> float:
    """1 + max(0, (start - 1) (N - i) / N): from `start` at step 0 straight to 1 at step N = total_steps and after it (PAD-Net section 1.3).

    Raises ValueError for a negative step, no steps, or a start below 1.
    """
    if step < 0 or total_steps < 1 or start < 1:
        raise ValueError(f"annealed_temperature: step={step}, total_steps={total_steps}, start={start}; step >= 0, total_steps >= 1 and start >= 1 are needed")
    return 1 + max(0.0, (start - 1) * (total_steps - step) / total_steps)


def cv_squared(u_E: Tensor) -> Tensor:
    """Squared coefficient of variation, Var_unbiased(u) / (mean(u)^2 + 1e-10), scalar; 0 for one expert (2.2)."""
    u_E = _float(u_E)
    if u_E.numel() == 1:
        return u_E.new_zeros(())
    return u_E.var() / (u_E.mean() ** 2 + 1e-10)


def importance(idx_TK: Tensor, weight_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Sum of the scores that each expert got, [E]; differentiable in the scores (section 2.2)."""
    weight_TK = _float(weight_TK)
    if mask_T is not None:
        weight_TK = torch.where(_mask(mask_T, weight_TK), weight_TK, 0)
    return weight_TK.new_zeros(len(idx_TK), num_experts).scatter_add(1, idx_TK.long(), weight_TK).sum(0)


def hard_load(idx_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Number of tokens that chose each expert, float32 [E]; no gradient."""
    return importance(idx_TK, torch.ones(idx_TK.shape, device=idx_TK.device), num_experts, mask_T)


def soft_load(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int, mask_T: Tensor | None = None, *, legacy: bool = False
) -> Tensor:
    """Expected number of tokens that choose each expert, were only its own noise drawn again, [E] (section 2.2).

    P(stay in the top k) = Phi((clean - threshold) / std), where the threshold is what an expert must beat: the (k+1)-th
    largest noisy logit for one that is selected, else the k-th. Gradients flow through clean, std and, as in the
    official code, through the thresholds (which are some expert's noisy logits).

    Args:
        clean_TE, noisy_TE, std_TE: logits without noise, with it, and the noise's standard deviation.
        k: experts a token, 1 <= k < E. With k = E every expert is chosen: use `hard_load`.
        legacy: the official code's estimator, for parity only. It takes an expert for selected when its noise alone,
            not its noisy logit, exceeds the threshold, so that the load changes with a constant added to all logits.

    Raises ValueError for k out of range.
    """
    num_experts = clean_TE.shape[-1]
    if not 1 <= k < num_experts:
        raise ValueError(f"soft_load: k={k} with {num_experts} experts; allowed: 1 to {num_experts - 1}")
    clean_TE, noisy_TE, std_TE = _float(clean_TE), _float(noisy_TE), _float(std_TE)
    top = noisy_TE.topk(k + 1, dim=-1).values
    to_enter_T1, to_stay_T1 = top[:, k - 1, None], top[:, k, None]
    selected_TE = (noisy_TE - clean_TE if legacy else noisy_TE) > to_stay_T1
    z_TE = (clean_TE - torch.where(selected_TE, to_stay_T1, to_enter_T1)) / std_TE
    stay_TE = 0.5 * (1 + torch.erf(z_TE / math.sqrt(2)))
    if mask_T is not None:
        stay_TE = torch.where(_mask(mask_T, stay_TE), stay_TE, 0)
    return stay_TE.sum(0)


def importance_load_loss(importance_E: Tensor, load_E: Tensor) -> Tensor:
    """CV^2(importance) + CV^2(load), scalar; the caller multiplies by its weight, 0.01 in the paper (section 2.2)."""
    return cv_squared(importance_E) + cv_squared(load_E)


def switch_loss(logits_TE: Tensor, idx_TK: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e, scalar (section 7.4); the caller multiplies by its weight.

    f_e is the share of the T*K assignments that went to e (no gradient), P_e the mean of the softmax over all experts. 1
    for uniform P, E when top-1 collapses, less than 1 when f and P disagree, 0 without tokens.
    """
    probs_TE = _float(logits_TE).softmax(-1)
    num_experts = probs_TE.shape[-1]
    load_E = hard_load(idx_TK, num_experts, mask_T).to(probs_TE.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    return num_experts * (share_E * masked_mean(probs_TE, mask_T)).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, scalar: keeps the logits from drifting (ST-MoE). 0 without tokens."""
    return masked_mean(_float(logits_TE).logsumexp(-1, keepdim=True) ** 2, mask_T).squeeze(0)


def update_bias(bias_E: Tensor, load_E: Tensor, rate: float = 1e-3) -> Tensor:
    """The selection bias after a step of balancing without a loss: b + rate * sign(mean(load) - load) (DeepSeek-V3)."""
    load_E = _float(load_E)
    return bias_E + rate * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)


def capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """Tokens that an expert takes at most, floor(factor * T / E) (section 2.5); exact in the factor's decimal digits."""
    return math.floor(Fraction(str(factor)) * num_tokens / num_experts)


def within_capacity(idx_T: Tensor, capacity: int, mask_T: Tensor | None = None) -> Tensor:
    """Which tokens their expert has room for, bool [T]: `capacity` of those that chose it, drawn by chance from torch's global generator; tokens that do not
    count (`mask_T`) come last."""
    draw_T = torch.rand(len(idx_T), dtype=torch.float32, device=idx_T.device)
    order_T = (draw_T if mask_T is None else draw_T + ~_mask(mask_T, draw_T)[:, 0]).argsort()
    sorted_T, by_expert_T = idx_T[order_T].sort(stable=True)  # in the drawn order inside each expert
    place_T = torch.arange(len(idx_T), device=idx_T.device) - torch.searchsorted(sorted_T, sorted_T)
    return torch.empty_like(idx_T, dtype=torch.bool).scatter(0, order_T[by_expert_T], place_T < capacity)


def _float(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _mask(mask_T: Tensor, like: Tensor) -> Tensor:
    if mask_T.shape != like.shape[:1]:
        raise ValueError(f"mask_T has shape {list(mask_T.shape)}; with {len(like)} tokens it must be {[len(like)]}")
    return mask_T.bool()[:, None]


def masked_mean(values_TX: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the tokens that count, 0 if none does. `where`, not a product: padding may hold anything, NaN too."""
    if mask_T is None:
        return values_TX.sum(0) / max(len(values_TX), 1)
    mask_T1 = _mask(mask_T, values_TX)
    return torch.where(mask_T1, values_TX, 0).sum(0) / mask_T1.sum().clamp(min=1)
