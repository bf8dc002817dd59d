"""From a gate's logits to each token's experts and their weights.

T tokens, E experts, K experts a token; a name ends in the shape of its tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dyn.ops import triton_launch, triton_route
from dyn.ops.arguments import check_devices, given, pick

_log = logging.getLogger(__name__)
_logged: set[str] = set()
_MANY = 1 << 20  # logits from which on one kernel is faster than torch's three; before, a launch of Triton's costs more than theirs (H200, results/benchmarks)


def route(
    logits_TE: Tensor,
    k: int,
    *,
    renormalise: bool = True,
    scale: float = 1.0,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best experts of every token, best first, and their weights (LLaMA-MoE specification, section 2.2).

    Args:
        logits_TE: the gate's output, floating.
        k: experts a token, 1 <= k <= E.
        renormalise: make the weights of a token sum to `scale`. With softmax: the softmax over the chosen logits.
        scale: factor on the weights (section 2.3).
        score: "softmax" over the experts, or "sigmoid" of each logit.
        bias_E: added to the scores for the choice alone, not for the weights (DeepSeek-V3's balancing). No gradient.
        backend: "eager", "triton" (one kernel, on a CUDA device or in Triton's interpreter; not for float64), or "auto":
            "triton" on CUDA for 2**20 logits or more where it can run, else "eager".

    Returns idx_TK (int64) and weight_TK (float32; float64 for float64 logits, so that exact tests stay exact), with
    gradients from the weights to the logits. Where scores tie, "triton" takes the lowest id. Elsewhere torch.topk
    decides: the same on every run of one machine, but not always the lowest id and not the same on every device.

    Raises ValueError for logits that are not a floating [T, E], k out of range, an unknown score or backend, a backend that cannot run here,
    or a bias of another length or device.
    """
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"route needs floating logits [T, E]; {given({'logits': logits_TE})}")
    num_experts = logits_TE.shape[1]
    tensors = {"logits": logits_TE} | ({} if bias_E is None else {"bias_E": bias_E})
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt) or not 1 <= k <= num_experts:
        raise ValueError(f"route: k={k!r} with {num_experts} experts; allowed: 1 to {num_experts}; {given(tensors)}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score={score!r} is unknown; allowed: softmax, sigmoid; {given(tensors)}")
    if bias_E is not None:
        if bias_E.shape != (num_experts,):
            raise ValueError(f"route: bias_E must be [{num_experts}]; {given(tensors)}")
        check_devices("route", tensors)
    able = logits_TE.is_cuda and logits_TE.dtype != torch.float64 and triton_launch.HAS_TRITON
    best = "triton" if able and logits_TE.numel() >= _MANY else "eager"
    backend = pick("route", backend, _BACKENDS, best, tensors, _log, _logged, " for as many logits as these")
    return _BACKENDS[backend](logits_TE, k, renormalise, scale, score, bias_E)


def _eager(
    logits_TE: Tensor, k: int, renormalise: bool, scale: float, score: str, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    local = score == "softmax" and renormalise  # the chosen scores over their sum, without a pass over all experts
    score_TE = None if local and bias_E is None else logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
    # Scores rise with logits, so without a bias the logits choose: tiny scores underflow to ties, their logits do not.
    choice_TE = logits_TE if bias_E is None else score_TE + bias_E.to(logits_TE.dtype)
    idx_TK = choice_TE.detach().topk(k, dim=-1).indices
    if local:
        weight_TK = logits_TE.gather(-1, idx_TK).softmax(-1)
    else:
        weight_TK = score_TE.gather(-1, idx_TK)
        if renormalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
    return idx_TK, weight_TK if scale == 1 else weight_TK * scale


_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"eager": _eager, "triton": triton_route.route_triton}
