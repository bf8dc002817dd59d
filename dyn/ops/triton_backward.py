"""Triton kernels of the experts' backward: through SwiGLU and the tokens' weights in one, and the weights' gradients.

T tokens, E experts, K experts a token, S = T*K rows in expert order, D hidden size, F expert width; a name ends in the shape
of its tensor. The tiles, their order and the two ways to read a weight are those of triton_products.

The gradient of a token's weight is <dL/d(activation), activation>, so the experts' outputs are never kept. dact = dy D is a product
like any other, and what follows a pass over its rows: on an H100 both take a fifth less time than SwiGLU's derivative at the end of the
product's tiles, whose registers it needs. That pass writes the weighted activations in the place of dact. Sums are in a fixed order,
never through atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyn.ops.triton_config import Config, choose
from dyn.ops.triton_launch import Kernel, blocks, describable, descriptor, power_of_two, precision
from dyn.ops.triton_order import Order
from dyn.ops.triton_products import row_products, tile_at

tl: Any = None  # triton.language, once a kernel has been launched

_CELLS = 1024  # rows x columns that one program of the pass over rows holds


def down_backward(
    dy_TD: Tensor, down_EDF: Tensor, pre_S2F: Tensor, weight_TK: Tensor, order: Order, row_tile: int, need_pre: bool, need_act: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the pre-activations dpre_S2F, the weighted activations act_SF, and the float32 gradient of the weights [T, K].

    dpre has no rows if it is not needed, and act holds something else if it is not.
    """
    num_rows, width = pre_S2F.shape[0], down_EDF.shape[2]
    act_SF = row_products(dy_TD, down_EDF.transpose(1, 2), order, row_tile, "down_backward", weight_TK.shape[1])
    dpre_S2F = pre_S2F.new_empty(num_rows if need_pre else 0, 2 * width)
    dweight_TK = torch.zeros(weight_TK.shape, dtype=torch.float32, device=weight_TK.device)  # slots without a row stay
    block_f = min(power_of_two(width), 512)
    block_r = max(1, _CELLS // block_f)
    swiglu_backward_kernel[(blocks(num_rows, block_r),)](
        act_SF, pre_S2F, weight_TK, dpre_S2F, dweight_TK, order.slot_S, order.start_E, down_EDF.shape[0], width,
        NEED_PRE=need_pre, NEED_ACT=need_act, BLOCK_R=block_r, BLOCK_F=block_f, num_warps=4,
    )
    return dpre_S2F, act_SF, dweight_TK


def weight_gradient(left: Tensor, right: Tensor, gathered: str, out_EMN: Tensor, order: Order, topk: int, name: str) -> None:
    """out[e] = left[rows of e]^T @ right[rows of e], zero for an expert without rows.

    Of `left` and `right`, the one that `gathered` names has a row a token; the other has one a routed row, in expert order.
    """
    E, M, N = out_EMN.shape
    num_rows = order.slot_S.numel()
    gather_left = gathered == "left"
    ordered = right if gather_left else left
    described = ordered.element_size() == 2 and describable(ordered)

    def run(c: Config) -> None:
        tiles = descriptor(ordered, c.block_k, c.block_n if gather_left else c.block_m) if described else ordered
        # Not persistent: the experts' rows differ, and the device hands out the next tile to whoever is free.
        weight_gradient_kernel[(E * blocks(M, c.block_m) * blocks(N, c.block_n),)](
            left, right, tiles, out_EMN, order.slot_S, order.start_E, M, N, *left.stride(), *right.stride(),
            TOPK=topk, GATHER_LEFT=gather_left, DESCRIBED=described, PRECISION=precision(left.dtype),
            **c.blocks, num_warps=c.warps, num_stages=c.stages,
        )

    choose(name, left, (E, M, N, num_rows), 0, not (describable(left) and describable(right)), run)


@Kernel
def swiglu_backward_kernel(
    act_ptr, pre_ptr, weight_ptr, dpre_ptr, dweight_ptr, slot_ptr, start_ptr, num_experts, F,
    NEED_PRE: tl.constexpr, NEED_ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """Rows of dact, the gradient of the activations before the weights: their <dact, activation>, the pre-activations' gradient, and the weighted
    activations in dact's place."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < tl.load(start_ptr + num_experts)
    slot = tl.load(slot_ptr + rows, mask=is_row, other=0)
    scale = tl.load(weight_ptr + slot, mask=is_row, other=0.0).to(tl.float32)[:, None]
    part = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, F, BLOCK_F):
        cols = first + tl.arange(0, BLOCK_F)
        mask = is_row[:, None] & (cols < F)[None, :]
        at, pre_at = (rows.to(tl.int64) * F)[:, None] + cols[None, :], (rows.to(tl.int64) * (2 * F))[:, None] + cols[None, :]
        dact = tl.load(act_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(pre_ptr + pre_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + F + pre_at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        swish = gate * sigmoid
        part += tl.sum(dact * swish * up, 1)
        if NEED_ACT:
            tl.store(act_ptr + at, (swish * up * scale).to(act_ptr.dtype.element_ty), mask=mask)
        if NEED_PRE:
            dact *= scale
            tl.store(dpre_ptr + F + pre_at, (dact * swish).to(dpre_ptr.dtype.element_ty), mask=mask)
            tl.store(dpre_ptr + pre_at, (dact * up * (sigmoid + swish * (1 - sigmoid))).to(dpre_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + slot, part, mask=is_row)


@Kernel
def weight_gradient_kernel(
    left_ptr, right_ptr, tiles, out_ptr, slot_ptr, start_ptr, M, N, stride_ls, stride_lm, stride_rs, stride_rn,
    TOPK: tl.constexpr, GATHER_LEFT: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile of one expert's gradient, summed over the expert's rows: whole blocks of rows by descriptor, the rest, or all, through pointers."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (num_m * num_n)
    m, n = tile_at(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    first, end = tl.load(start_ptr + expert), tl.load(start_ptr + expert + 1)
    ms, ns, ks = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_m, is_n = ms < M, ns < N
    left_at, right_at = left_ptr + ms.to(tl.int64) * stride_lm, right_ptr + ns.to(tl.int64) * stride_rn  # a transposed x steps over all tokens
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    whole = first
    if DESCRIBED:
        whole += (end - first) // BLOCK_K * BLOCK_K
        for row in range(first, whole, BLOCK_K):
            token = tl.load(slot_ptr + row + ks) // TOPK
            if GATHER_LEFT:
                left = tl.load(left_at[None, :] + token.to(tl.int64)[:, None] * stride_ls, mask=is_m[None, :], other=0.0)
                right = tiles.load([row, n * BLOCK_N])
            else:
                left = tiles.load([row, m * BLOCK_M])
                right = tl.load(right_at[None, :] + token.to(tl.int64)[:, None] * stride_rs, mask=is_n[None, :], other=0.0)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    for row in range(whole, end, BLOCK_K):
        rows = row + ks
        is_row = rows < end
        token = tl.load(slot_ptr + rows, mask=is_row, other=0) // TOPK
        # Both sides are masked: what another expert's rows hold, or nobody's, may be infinite, and 0 * inf would stay.
        left_row = token if GATHER_LEFT else rows
        right_row = rows if GATHER_LEFT else token
        left = tl.load(left_at[None, :] + left_row.to(tl.int64)[:, None] * stride_ls, mask=is_row[:, None] & is_m[None, :], other=0.0)
        right = tl.load(right_at[None, :] + right_row.to(tl.int64)[:, None] * stride_rs, mask=is_row[:, None] & is_n[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    at = expert.to(tl.int64) * M * N + ms.to(tl.int64)[:, None] * N + ns[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])
