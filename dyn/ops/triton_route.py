"""The router in Triton: the k best experts of every token and their weights, in one pass over the logits.

T tokens, E experts, K experts a token; a name ends in the shape of its tensor. `dyn.ops.route` has the specification. Here a
tie goes to the lowest id, on every device and at every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyn.ops.arguments import given
from dyn.ops.triton_launch import Kernel, blocks, power_of_two, require

tl: Any = None  # triton.language, once a kernel has been launched

_LOGITS = 4096  # logits that one program holds


def route_triton(
    logits_TE: Tensor, k: int, renormalise: bool, scale: float, score: str, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`route` on Triton: int64 ids and float32 weights, with gradients from the weights to the logits.

    Raises ValueError for float64 logits, and where Triton cannot run.
    """
    if logits_TE.dtype == torch.float64:
        raise ValueError(f"backend='triton' of route computes in float32; for float64 logits use backend='eager'; {given({'logits': logits_TE})}")
    weight_TK, idx_TK = _route(logits_TE, bias_E, k, renormalise, float(scale), score == "sigmoid")
    return idx_TK, weight_TK


@torch.library.custom_op("dyn::route_triton", mutates_args=())
def _route(logits_TE: Tensor, bias_E: Tensor | None, k: int, renormalise: bool, scale: float, sigmoid: bool) -> tuple[Tensor, Tensor]:
    require("route", {"logits": logits_TE})
    with torch.cuda.device_of(logits_TE):
        return launch_router(logits_TE, bias_E, k, renormalise, scale, sigmoid)


def launch_router(logits_TE: Tensor, bias_E: Tensor | None, k: int, renormalise: bool, scale: float, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Float32 weights and int64 ids [T, k] of the chosen experts."""
    T, E = logits_TE.shape
    weight_TK = torch.empty(T, k, dtype=torch.float32, device=logits_TE.device)
    idx_TK = torch.empty(T, k, dtype=torch.int64, device=logits_TE.device)
    bins = power_of_two(E)
    tokens = max(1, min(_LOGITS // bins, power_of_two(T)))
    if T:
        router_kernel[(blocks(T, tokens),)](
            logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), idx_TK, weight_TK, T, E, *logits_TE.stride(), scale,
            K=k, SLOTS=power_of_two(k), BIASED=bias_E is not None, SIGMOID=sigmoid, RENORMALISE=renormalise,
            TOKENS=tokens, BINS=bins, num_warps=4,
        )
    return weight_TK, idx_TK


@_route.register_fake
def _(logits_TE, bias_E, k, renormalise, scale, sigmoid):
    shape = (logits_TE.shape[0], k)
    return logits_TE.new_empty(shape, dtype=torch.float32), logits_TE.new_empty(shape, dtype=torch.int64)


def _setup(ctx, inputs, output) -> None:
    logits_TE, _, _, ctx.renormalise, ctx.scale, ctx.sigmoid = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, output[1])


def _differentiate(ctx, dweight_TK, _didx):
    if dweight_TK is None:
        return (None,) * 6
    logits_TE, idx_TK = ctx.saved_tensors
    d_TK, z_TE = dweight_TK * ctx.scale, logits_TE.float()
    z_TK = z_TE.gather(-1, idx_TK)
    dlogits_TE = torch.zeros_like(z_TE)
    if ctx.sigmoid:
        score_TK = z_TK.sigmoid()
        if ctx.renormalise:
            sum_T1 = score_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            d_TK = (d_TK - (d_TK * score_TK / sum_T1).sum(-1, keepdim=True)) / sum_T1
        d_TK = d_TK * score_TK * (1 - score_TK)
    elif ctx.renormalise:
        p_TK = z_TK.softmax(-1)
        d_TK = p_TK * (d_TK - (p_TK * d_TK).sum(-1, keepdim=True))
    else:
        p_TE = z_TE.softmax(-1)
        d_TK = d_TK * p_TE.gather(-1, idx_TK)
        dlogits_TE = -p_TE * d_TK.sum(-1, keepdim=True)
    return dlogits_TE.scatter_add(-1, idx_TK, d_TK).to(logits_TE.dtype), None, None, None, None, None


_route.register_autograd(_differentiate, setup_context=_setup)


@Kernel
def router_kernel(
    logits_ptr, bias_ptr, idx_ptr, weight_ptr, num_tokens, num_experts, stride_t, stride_e, scale,
    K: tl.constexpr, SLOTS: tl.constexpr, BIASED: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    TOKENS: tl.constexpr, BINS: tl.constexpr,
):
    """TOKENS rows of logits in registers: K times the largest that is still open, then the weights of what was chosen."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, BINS)
    is_token, is_expert = tokens < num_tokens, experts < num_experts
    is_open = is_token[:, None] & is_expert[None, :]
    at = logits_ptr + tokens.to(tl.int64)[:, None] * stride_t + experts[None, :] * stride_e
    logits = tl.load(at, mask=is_open, other=float("-inf")).to(tl.float32)
    choice = logits  # scores rise with logits, so without a bias the logits choose
    if BIASED:
        bias = tl.load(bias_ptr + experts, mask=is_expert, other=0).to(tl.float32)
        if SIGMOID:
            choice = 1 / (1 + tl.exp(-logits)) + bias[None, :]
        else:
            exps = tl.exp(logits - tl.max(logits, 1)[:, None])
            choice = exps / tl.sum(exps, 1)[:, None] + bias[None, :]
    choice = tl.where(choice == choice, choice, float("inf"))  # NaN first, as torch.topk has it: it equals nothing, so no pass would find it
    slots = tl.arange(0, SLOTS)
    chosen = tl.zeros([TOKENS, SLOTS], dtype=tl.int32)
    value = tl.full([TOKENS, SLOTS], float("-inf"), dtype=tl.float32)
    for k in range(K):
        best = tl.max(tl.where(is_open, choice, float("-inf")), 1)
        ties = is_open & (choice == best[:, None])
        expert = tl.min(tl.where(ties, experts[None, :], BINS), 1)
        is_chosen = experts[None, :] == expert[:, None]
        chosen = tl.where((slots == k)[None, :], expert[:, None], chosen)
        value = tl.where((slots == k)[None, :], tl.sum(tl.where(is_chosen, logits, 0.0), 1)[:, None], value)
        is_open = is_open & (experts[None, :] != expert[:, None])
    if SIGMOID:
        weight = tl.where((slots < K)[None, :], 1 / (1 + tl.exp(-value)), 0.0)
        if RENORMALISE:
            weight = weight / tl.maximum(tl.sum(weight, 1), 1.17549435e-38)[:, None]
    elif RENORMALISE:
        exps = tl.exp(value - tl.max(value, 1)[:, None])
        weight = exps / tl.sum(exps, 1)[:, None]
    else:
        largest = tl.max(logits, 1)[:, None]
        weight = tl.exp(value - largest) / tl.sum(tl.exp(logits - largest), 1)[:, None]
    to = tokens[:, None] * K + slots[None, :]
    mask = is_token[:, None] & (slots < K)[None, :]
    tl.store(idx_ptr + to, chosen.to(tl.int64), mask=mask)
    tl.store(weight_ptr + to, weight * scale, mask=mask)
