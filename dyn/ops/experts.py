"""The experts' gated feed-forward over routed tokens.

    y_t = sum_j weight_tj * E_idx_tj(x_t),        E_e(x) = (silu(x G_e^T) * (x U_e^T)) D_e^T

T tokens, K experts a token, S = T*K routed rows in expert order, E experts, D hidden size, F expert width. A name ends
in the shape of its tensor: `gate_up_E2FD` is [E, 2F, D], the gate's F rows before the up projection's.

`_eager` is the specification. `_torch` orders the (token, expert) pairs once, runs one matrix product an expert, or for
several neighbours at once, on slices of the ordered rows, and has its own backward. What backward keeps is x, the pre-activations [S, 2F] and the order
of the rows: the weights' gradient is <dL/d(activation), activation>, so the experts' outputs are never kept. `_triton`
does the same in kernels of its own (triton_experts).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn.ops import triton_experts, triton_launch
from dyn.ops.arguments import autocast, check_routed, expert_tensors, given, pick, refuse_negative, unobserved
from dyn.ops.linear import routed_linear as routed_linear
from dyn.ops.rows import (
    CALL,
    arrange,
    chosen_weights,
    clear_skipped,
    gather_sum,
    outer_products,
    places,
    products,
    row_weights,
    rows_needed,
    scratch,
    segments,
    tokens,
    usable,
)

_log = logging.getLogger(__name__)
_logged: set[str] = set()

# For `_all_pay`, of two CPUs: multiplications, not of bfloat16, in the time that one more call of a product takes, and any in that of reading a weight; and how
# many times sooner a call for a single token is done, which needs no sort.
_CALL_ELSE, _READ, _ALONE = 1 << 20, 32, 3

_SHORT, _VECTORS = 512, 64  # of a row, for `_halves`: numbers, and how many torch's elementwise loops take at a time


def experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, backend: str = "auto", recompute: bool = False,
    debug: bool = False,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs for every token (llama_moe section 2.2, without the score scale).

    Args:
        x_TD: tokens, floating; float64 works throughout.
        gate_up_E2FD, down_EDF: stacked expert weights in x's dtype, any strides; gate rows first, then up rows.
        idx_TK: expert ids, int32 or int64. An id >= E means "no expert" and adds nothing. Negative ids raise on CPU;
            elsewhere the check would wait for the device, so they are undefined there unless `debug`.
        weight_TK: floating, often float32. They enter in x's precision ("eager" and "triton": in the wider one); their gradient is summed in float32.
        backend: "eager" (a loop over experts under autograd: the reference), "torch", "triton" (float32 and 16-bit on a
            CUDA device, or in Triton's interpreter), or "auto": "triton" where it can run on CUDA, else "torch".
        recompute: keep no pre-activations and compute them again in backward (bitwise the same gradients).
        debug: look for negative ids on every device, at the price of waiting for it.

    Returns y_TD in x's dtype. Under autocast x and the expert weights are cast first, as a linear layer would, and y
    has the autocast dtype. Results are deterministic. Only "eager" has a second derivative, and gradients by torch.func.

    Raises ValueError for shapes, dtypes or devices that do not fit, for an unknown backend and for one that cannot run here.
    """
    x_TD, gate_up_E2FD, down_EDF = autocast(x_TD, gate_up_E2FD, down_EDF)
    tensors = expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK)
    _check(tensors)
    device = x_TD.device.type
    if debug and idx_TK.numel() and device != "meta":
        if torch.compiler.is_compiling():
            torch._assert_async(idx_TK.min() >= 0, "experts: idx holds a negative id")
        else:
            refuse_negative("experts", idx_TK.min().cpu(), tensors)
    best = "triton" if device == "cuda" and x_TD.dtype in triton_experts.DTYPES and triton_launch.HAS_TRITON else "torch"
    missing = ", since the package triton is not installed" if device == "cuda" and not triton_launch.HAS_TRITON else ""
    backend = pick("experts", backend, _BACKENDS, best, tensors, _log, _logged, missing)
    return _BACKENDS[backend](x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, recompute)


def _check(tensors: dict[str, Tensor]) -> None:
    x_TD, gate_up_E2FD, down_EDF, *_ = tensors.values()
    if x_TD.dim() != 2 or gate_up_E2FD.dim() != 3 or down_EDF.dim() != 3:
        raise ValueError(f"experts needs x [T, D], gate_up [E, 2F, D] and down [E, D, F]; {given(tensors)}")
    E, D, width = down_EDF.shape
    if gate_up_E2FD.shape != (E, 2 * width, D) or x_TD.shape[1] != D:
        raise ValueError(f"experts: beside this down, gate_up must be [{E}, {2 * width}, {D}] and x [T, {D}]; {given(tensors)}")
    check_routed("experts", tensors)


# eager: the specification ---------------------------------------------------------------------------------------------


def _eager(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, _: bool) -> Tensor:
    if idx_TK.numel():
        refuse_negative("experts", idx_TK.min(), expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK))
    sum_dtype = torch.promote_types(x_TD.dtype, weight_TK.dtype)
    y_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
    for e in range(down_EDF.shape[0]):
        token, slot = (idx_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up_E2FD[e]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down_EDF[e])
        y_TD = y_TD.index_add(0, token, out.to(sum_dtype) * weight_TK[token, slot, None].to(sum_dtype))
    return y_TD.to(x_TD.dtype)


# torch: sorted rows, one product an expert ----------------------------------------------------------------------------


def _torch(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, recompute: bool) -> Tensor:
    differentiable = (x_TD, gate_up_E2FD, down_EDF, weight_TK)
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    if not unobserved(*differentiable):
        return _forward(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, keep)[0]
    if _all_pay(*idx_TK.shape, down_EDF):
        return _all_experts(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK)
    if len(x_TD) == 1:
        return _one_token(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK)
    return _run(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, keep)[0]


def _all_pay(T: int, K: int, down_EDF: Tensor) -> bool:
    """Whether few tokens are sooner through all experts than through their own, as in decoding with small experts: two products in place of two an expert.

    What is then done in vain, against what a call of a product costs, both in multiplications: for the rows of other experts, and for weights that no token
    chose, each of which takes about as long to read as `_READ` products with it.
    """
    E, D, F = down_EDF.shape
    if T * K == 0 or K >= E:
        return False
    unread = E * (1 - K / E) ** T  # expected
    in_vain = 3 * D * F * ((E - K) * T + _READ * unread)
    call = (CALL if down_EDF.dtype == torch.bfloat16 else _CALL_ELSE) / (_ALONE if T == 1 else 1)
    return in_vain <= 2 * (E - unread) * call


def _all_experts(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
    refuse_negative("experts", idx_TK.min(), expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK))
    (T, D), E = x_TD.shape, len(down_EDF)
    y_ED = scratch(x_TD, (E + 1) * T, D)  # the last T rows: of no expert
    y_ED[E * T :].zero_()
    gate_ETF, up_ETF = _halves(torch.bmm(x_TD.expand(E, T, D), gate_up_E2FD.transpose(1, 2)))
    torch.bmm(F.silu(gate_ETF).mul_(up_ETF), down_EDF.transpose(1, 2), out=y_ED[: E * T].view(E, T, D))
    row_TK = idx_TK.clamp(max=E) * T + torch.arange(T, device=idx_TK.device)[:, None]
    return F.embedding_bag(row_TK, y_ED, per_sample_weights=chosen_weights(idx_TK, weight_TK.to(x_TD.dtype), E), mode="sum")


def _one_token(x_1D: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_1K: Tensor, weight_1K: Tensor) -> Tensor:
    """Decoding at batch 1: there is nothing to sort, and sorting would take as long as the products."""
    ids = idx_1K[0].tolist()
    refuse_negative("experts", idx_1K.new_tensor(min(ids)), expert_tensors(x_1D, gate_up_E2FD, down_EDF, idx_1K, weight_1K))
    routed = [(slot, e) for slot, e in enumerate(ids) if e < len(down_EDF)]
    gate_up_K2F, y_KD = (x_1D.new_zeros(len(ids), size) for size in (gate_up_E2FD.shape[1], x_1D.shape[1]))
    for slot, e in routed:
        torch.mm(x_1D, gate_up_E2FD[e].t(), out=gate_up_K2F[slot : slot + 1])
    gate_KF, up_KF = gate_up_K2F.chunk(2, dim=-1)
    act_KF = F.silu(gate_KF).mul_(up_KF)
    for slot, e in routed:
        torch.mm(act_KF[slot : slot + 1], down_EDF[e].t(), out=y_KD[slot : slot + 1])
    return weight_1K.to(x_1D.dtype).masked_fill(idx_1K >= len(down_EDF), 0) @ y_KD


def _halves(gate_up_S2F: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's part and the up projection's. On a CPU a short gate that is no whole number of vectors is copied: what a row leaves over goes through its
    exponentials one by one, which takes several times as long as the rest."""
    gate, up = gate_up_S2F.chunk(2, dim=-1)
    return gate.contiguous() if gate.is_cpu and gate.shape[-1] < _SHORT and gate.shape[-1] % _VECTORS else gate, up


def _run(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_TD, the pre-activations [S, 2F] in expert order (no rows unless `keep`), where each expert's rows end [E], and the slot of every row [S]."""
    ends_E, slot_S = arrange("experts", idx_TK, len(down_EDF), expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK),
                           0.75 * x_TD.element_size() * math.prod(down_EDF.shape[1:]))
    ends = usable(ends_E, slot_S, gate_up_E2FD, down_EDF)
    token_S = tokens(slot_S, idx_TK)
    num_rows, double_width = slot_S.numel(), gate_up_E2FD.shape[1]
    y_SD = scratch(x_TD, num_rows, x_TD.shape[1])
    kept_S2F = x_TD.new_empty(num_rows if keep else 0, double_width)
    for some, rows, local in segments(ends, num_rows, max(x_TD.shape[1], double_width) * x_TD.element_size()):
        gate_up = kept_S2F[rows] if keep else x_TD.new_empty(rows.stop - rows.start, double_width)
        products(x_TD.index_select(0, token_S[rows]), gate_up_E2FD[some].transpose(1, 2), local, gate_up)
        gate, up = _halves(gate_up)
        products(F.silu(gate).mul_(up), down_EDF[some].transpose(1, 2), local, y_SD[rows])
    clear_skipped(ends, y_SD, kept_S2F)
    return gather_sum(y_SD, slot_S, chosen_weights(idx_TK, weight_TK.to(x_TD.dtype), len(down_EDF))), kept_S2F, ends_E, slot_S


def _run_backward(
    dy_TD: Tensor, x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor,
    kept_S2F: Tensor, ends_E: Tensor, slot_S: Tensor, need_x: bool, need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down, weight; without elements where they are not needed."""
    ends = usable(ends_E, slot_S, gate_up_E2FD, down_EDF)
    token_S = tokens(slot_S, idx_TK)
    weight_S1 = row_weights(slot_S, weight_TK)[:, None].to(x_TD.dtype)
    num_rows, width = slot_S.numel(), down_EDF.shape[2]
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    dx_SD = scratch(x_TD, num_rows if need_x else 0, x_TD.shape[1])
    dweight_S = x_TD.new_empty(num_rows, dtype=sum_dtype)
    dgate_up_E2FD, ddown_EDF = (w.new_empty(w.shape if need_params else 0) for w in (gate_up_E2FD, down_EDF))
    for some, rows, local in segments(ends, num_rows, max(x_TD.shape[1], 2 * width) * x_TD.element_size()):
        x = x_TD.index_select(0, token_S[rows])
        gate_up = kept_S2F[rows]
        if not kept_S2F.numel():
            gate_up = x.new_empty(x.shape[0], 2 * width)
            products(x, gate_up_E2FD[some].transpose(1, 2), local, gate_up)
        gate, up = _halves(gate_up)
        swish = F.silu(gate)
        act = swish * up
        # The weighted down projection. dact lacks the weight for as long as it gives the weight's gradient.
        dy = dy_TD.index_select(0, token_S[rows])
        dact = torch.empty_like(act)
        products(dy, down_EDF[some], local, dact)
        dweight_S[rows] = (dact * act).sum(-1, dtype=sum_dtype)
        dact.mul_(weight_S1[rows])
        if need_params:
            outer_products(dy, act.mul_(weight_S1[rows]), local, ddown_EDF[some])
        # silu(gate) * up, then the gate-up projection.
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        if gate.is_contiguous():
            dup.copy_(swish.mul_(dact))
            dgate.copy_(torch.ops.aten.silu_backward(dact.mul_(up), gate))
        else:
            torch.mul(dact, swish, out=dup)
            torch.ops.aten.silu_backward.grad_input(dact.mul_(up), gate, grad_input=dgate)
        if need_params:
            outer_products(dgate_up, x, local, dgate_up_E2FD[some])
        if need_x:
            products(dgate_up, gate_up_E2FD[some], local, dx_SD[rows])
    clear_skipped(ends, dx_SD, dweight_S)
    dx_TD = gather_sum(dx_SD, slot_S, weight_TK, weighted=False) if need_x else x_TD.new_empty(0, x_TD.shape[1])
    dweight_TK = dweight_S[places(slot_S, weight_TK)]
    return dx_TD, dgate_up_E2FD, ddown_EDF, dweight_TK.to(weight_TK.dtype)


_forward = torch.library.custom_op("dyn::experts", _run, mutates_args=())
_backward = torch.library.custom_op("dyn::experts_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, keep):
    num_rows = rows_needed(idx_TK, down_EDF.shape[0])
    kept_S2F = x_TD.new_empty(num_rows if keep else 0, gate_up_E2FD.shape[1])
    ends_E = idx_TK.new_empty(down_EDF.shape[0], dtype=torch.int32)
    return x_TD.new_empty(x_TD.shape), kept_S2F, ends_E, idx_TK.new_empty(num_rows, dtype=torch.int64)


@_backward.register_fake
def _(dy_TD, x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, kept_S2F, ends_E, slot_S, need_x, need_params):
    dx_TD = x_TD.new_empty(x_TD.shape if need_x else (0, x_TD.shape[1]))
    dgate_up_E2FD, ddown_EDF = (w.new_empty(w.shape if need_params else 0) for w in (gate_up_E2FD, down_EDF))
    return dx_TD, dgate_up_E2FD, ddown_EDF, weight_TK.new_empty(weight_TK.shape)


def _setup(ctx, inputs, output) -> None:
    x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, *output[1:])


def _differentiate(ctx, dy_TD, *_):
    if dy_TD is None:  # only the outputs without a gradient were used
        return (None,) * 6
    need_x, need_gate_up, need_down, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: checkpointing computes them again for each look
    run = _run_backward if unobserved(dy_TD, *saved) else _backward
    dx, dgate_up, ddown, dweight = run(dy_TD, *saved, need_x, need_gate_up or need_down)
    grads = (dx, dgate_up, ddown, None, dweight, None)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


_forward.register_autograd(_differentiate, setup_context=_setup)


# triton: kernels for the whole of it --------------------------------------------------------------------------------


def _triton(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, recompute: bool) -> Tensor:
    if idx_TK.device.type == "cpu" and idx_TK.numel() and not torch.compiler.is_compiling():
        refuse_negative("experts", idx_TK.min(), expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK))
    return triton_experts.experts_triton(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, recompute)


_BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "torch": _torch, "triton": _triton}
