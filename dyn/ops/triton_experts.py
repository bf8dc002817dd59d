"""The experts' gated feed-forward in Triton: eight products and sums on rows in expert order, registered with torch and its autograd.

T tokens, K experts a token, S = T*K routed rows in expert order, E experts, D hidden size, F expert width; a name ends in the
shape of its tensor. `dyn.ops.experts` has the specification.

    forward    order of the rows; gathered gate-up product with SwiGLU; down product; weighted sum over a token's rows
    backward   gathered product with the down projection; through SwiGLU, with the tokens' weights' gradient; gradients of down and
               gate-up; product with gate-up; sum over a token's rows
    few tokens without gradients take another way, in two kernels: triton_few

What backward keeps is x, the pre-activations [S, 2F] (or nothing, with `recompute`) and the order of the rows. Nothing waits
for the device, and no size depends on the ids, so the whole may be captured in a CUDA graph. Results are deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyn.ops.arguments import expert_tensors, given
from dyn.ops.triton_backward import down_backward, weight_gradient
from dyn.ops.triton_config import row_tile
from dyn.ops.triton_few import few_experts, is_few
from dyn.ops.triton_launch import require
from dyn.ops.triton_order import order_rows, order_size, read_order
from dyn.ops.triton_products import gate_up, row_products, token_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts_triton(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, recompute: bool) -> Tensor:
    """`experts` on Triton, for float32, bfloat16 and float16.

    Products of float32 are exact unless torch.set_float32_matmul_precision allows less; sums are in float32 throughout.
    Raises ValueError for another dtype, and where Triton cannot run.
    """
    if x_TD.dtype not in DTYPES:
        tensors = expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK)
        raise ValueError(f"backend='triton' of experts takes {', '.join(map(str, DTYPES))}; {given(tensors)}")
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gate_up_E2FD, down_EDF, weight_TK))
    if not trained and not _is_empty(idx_TK, down_EDF) and is_few(idx_TK.numel(), down_EDF):
        return few_experts(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK)
    return _forward(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, trained and not recompute)[0]


def _is_empty(idx_TK: Tensor, down_EDF: Tensor) -> bool:
    return not (idx_TK.numel() and down_EDF.numel())


@torch.library.custom_op("dyn::experts_triton", mutates_args=())
def _forward(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y_TD, the pre-activations [S, 2F] in expert order (no rows unless `keep`), and the buffer of the order of the rows."""
    require("experts", expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK))
    num_slots, num_experts = idx_TK.numel(), down_EDF.shape[0]
    if _is_empty(idx_TK, down_EDF):
        order = torch.zeros(order_size(num_slots, num_experts), dtype=torch.int32, device=x_TD.device)
        return x_TD.new_zeros(x_TD.shape), x_TD.new_zeros(num_slots if keep else 0, gate_up_E2FD.shape[1]), order
    with torch.cuda.device_of(x_TD):
        tile = row_tile(num_slots, num_experts, x_TD.dtype)
        buffer = order_rows(idx_TK, num_experts, tile)
        order = read_order(buffer, num_slots, num_experts)
        act_SF, pre_S2F = gate_up(x_TD, gate_up_E2FD, order, idx_TK.shape[1], tile, keep=keep, activate=True)
        y_SD = row_products(act_SF, down_EDF, order, tile, "down")
        return token_sums(y_SD, order.place_S, weight_TK.contiguous(), weighted=True), pre_S2F, buffer


@torch.library.custom_op("dyn::experts_triton_backward", mutates_args=())
def _backward(
    dy_TD: Tensor, x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor,
    pre_S2F: Tensor, buffer: Tensor, need_x: bool, need_gate_up: bool, need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down, weight; without elements where they are not needed."""
    num_slots, num_experts, topk = idx_TK.numel(), down_EDF.shape[0], idx_TK.shape[1]
    dgate_up_E2FD, ddown_EDF = gate_up_E2FD.new_empty(gate_up_E2FD.shape if need_gate_up else 0), down_EDF.new_empty(down_EDF.shape if need_down else 0)
    if _is_empty(idx_TK, down_EDF):
        return x_TD.new_zeros(x_TD.shape if need_x else 0), dgate_up_E2FD.zero_(), ddown_EDF.zero_(), weight_TK.new_zeros(weight_TK.shape)
    with torch.cuda.device_of(x_TD):
        tile = row_tile(num_slots, num_experts, x_TD.dtype)
        order = read_order(buffer, num_slots, num_experts)
        if not pre_S2F.numel():
            _, pre_S2F = gate_up(x_TD, gate_up_E2FD, order, topk, tile, keep=True, activate=False)
        if dy_TD.stride(1) != 1:  # an expanded gradient, as of .sum(), would be gathered an element at a time
            dy_TD = dy_TD.contiguous()
        dpre_S2F, act_SF, dweight_TK = down_backward(
            dy_TD, down_EDF, pre_S2F, weight_TK.contiguous(), order, tile, need_pre=need_x or need_gate_up, need_act=need_down
        )
        if need_down:
            weight_gradient(dy_TD, act_SF, "left", ddown_EDF, order, topk, "down_gradient")
        if need_gate_up:
            weight_gradient(dpre_S2F, x_TD, "right", dgate_up_E2FD, order, topk, "gate_up_gradient")
        dx_TD = x_TD.new_empty(0)
        if need_x:
            dx_SD = row_products(dpre_S2F, gate_up_E2FD.transpose(1, 2), order, tile, "gate_up_backward")
            dx_TD = token_sums(dx_SD, order.place_S, weight_TK, weighted=False)
        return dx_TD, dgate_up_E2FD, ddown_EDF, dweight_TK.to(weight_TK.dtype)


@_forward.register_fake
def _(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, keep):
    num_slots = idx_TK.shape[0] * idx_TK.shape[1]
    pre_S2F = x_TD.new_empty(num_slots if keep else 0, gate_up_E2FD.shape[1])
    return x_TD.new_empty(x_TD.shape), pre_S2F, idx_TK.new_empty(order_size(num_slots, down_EDF.shape[0]), dtype=torch.int32)


@_backward.register_fake
def _(dy_TD, x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, pre_S2F, buffer, need_x, need_gate_up, need_down):
    dx_TD = x_TD.new_empty(x_TD.shape if need_x else 0)
    dgate_up_E2FD, ddown_EDF = gate_up_E2FD.new_empty(gate_up_E2FD.shape if need_gate_up else 0), down_EDF.new_empty(down_EDF.shape if need_down else 0)
    return dx_TD, dgate_up_E2FD, ddown_EDF, weight_TK.new_empty(weight_TK.shape)


def _setup(ctx, inputs, output) -> None:
    x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, _ = inputs
    _, pre_S2F, buffer = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK, pre_S2F, buffer)


def _differentiate(ctx, dy_TD, _dpre, _dorder):
    if dy_TD is None:  # only the outputs without a gradient were used
        return (None,) * 6
    need_x, need_gate_up, need_down, *_ = ctx.needs_input_grad
    dx, dgate_up, ddown, dweight = _backward(dy_TD, *ctx.saved_tensors, need_x, need_gate_up, need_down)
    grads = (dx, dgate_up, ddown, None, dweight, None)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))


_forward.register_autograd(_differentiate, setup_context=_setup)
