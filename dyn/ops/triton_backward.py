"""Triton kernels of the experts' backward: through the down projection and SwiGLU in one, and the weights' gradients.

T tokens, E experts, K experts a token, S = T*K rows in expert order, D hidden size, F expert width; a name ends in the shape
of its tensor. The tiles, their order and the two ways to read a weight are those of triton_products.

The gradient of a token's weight is <dL/d(activation), activation>, so the experts' outputs are never kept: with
dact = dy D the kernel ends in the activation again (from the pre-activations), its product with dact summed over the tile's
columns, and SwiGLU's derivative. Sums over several tiles go through a small buffer in a fixed order, never through atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyn.ops.triton_config import Config, choose
from dyn.ops.triton_launch import Kernel, blocks, describable, descriptor, precision, programs
from dyn.ops.triton_order import Order
from dyn.ops.triton_products import quarters, rows_of, tile_at

tl: Any = None  # triton.language, once a kernel has been launched


def down_backward(
    dy_TD: Tensor, down_EDF: Tensor, pre_S2F: Tensor, weight_TK: Tensor, order: Order, row_tile: int, need_pre: bool, need_act: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the pre-activations dpre_S2F, the weighted activations act_SF, and the float32 gradient of the weights [T, K].

    No rows of the first two where they are not needed.
    """
    num_rows, (E, D, width) = pre_S2F.shape[0], down_EDF.shape
    dpre_S2F = pre_S2F.new_empty(num_rows if need_pre else 0, 2 * width)
    act_SF = pre_S2F.new_empty(num_rows if need_act else 0, width)
    dweight_TK = torch.empty(weight_TK.shape, dtype=torch.float32, device=weight_TK.device)
    described = describable(down_EDF)

    def run(c: Config) -> None:
        parts_NS = torch.empty(blocks(width, c.block_n), num_rows, dtype=torch.float32, device=dy_TD.device)
        weight = descriptor(down_EDF, 1, c.block_k, c.block_n) if described else down_EDF
        down_backward_kernel[(programs(dy_TD.device, c.each),)](
            dy_TD, weight, pre_S2F, weight_TK, dpre_S2F, act_SF, parts_NS, *order.tensors, D, width, num_rows, *dy_TD.stride(), *down_EDF.stride(),
            TOPK=weight_TK.shape[1], DESCRIBED=described, NEED_PRE=need_pre, NEED_ACT=need_act, QUARTERS=c.block_n >= 64,
            PRECISION=precision(dy_TD.dtype),
            **c.blocks, CUTS=row_tile // c.block_m, EVEN=D % c.block_k == 0, num_warps=c.warps, num_stages=c.stages,
        )
        part_sum_kernel[(blocks(num_rows, 1024),)](parts_NS, order.place_S, dweight_TK, num_rows, parts_NS.shape[0], BLOCK=1024, num_warps=4)

    choose("down_backward", dy_TD, (E, D, width, num_rows), row_tile, not (described and describable(pre_S2F)), run)
    return dpre_S2F, act_SF, dweight_TK


def weight_gradient(left: Tensor, right: Tensor, gathered: str, out_EMN: Tensor, order: Order, topk: int, name: str) -> None:
    """out[e] = left[rows of e]^T @ right[rows of e], zero for an expert without rows.

    Of `left` and `right`, the one that `gathered` names has a row a token; the other has one a routed row, in expert order.
    """
    E, M, N = out_EMN.shape
    num_rows = order.slot_S.numel()

    def run(c: Config) -> None:
        # Not persistent: the experts' rows differ, and the device hands out the next tile to whoever is free.
        weight_gradient_kernel[(E * blocks(M, c.block_m) * blocks(N, c.block_n),)](
            left, right, out_EMN, order.slot_S, order.start_E, M, N, *left.stride(), *right.stride(),
            TOPK=topk, GATHER_LEFT=gathered == "left", PRECISION=precision(left.dtype),
            **c.blocks, num_warps=c.warps, num_stages=c.stages,
        )

    choose(name, left, (E, M, N, num_rows), 0, not (describable(left) and describable(right)), run)


@Kernel
def down_backward_kernel(
    dy_ptr, weight, pre_ptr, weight_ptr, dpre_ptr, act_ptr, parts_ptr, slot_ptr, start_ptr, num_tiles_ptr, expert_ptr, row_ptr,
    D, F, num_rows, stride_yt, stride_yd, stride_we, stride_wd, stride_wf,
    TOPK: tl.constexpr, DESCRIBED: tl.constexpr, NEED_PRE: tl.constexpr, NEED_ACT: tl.constexpr, QUARTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    CUTS: tl.constexpr, EVEN: tl.constexpr,
):
    """Gathers tokens' gradients, multiplies them with BLOCK_N columns of the down projection, and ends in SwiGLU's derivative."""
    num_m, num_n = tl.load(num_tiles_ptr) * CUTS, tl.cdiv(F, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = tile_at(tile, num_m, num_n, GROUP_M)
        expert, first, end = rows_of(m, start_ptr, expert_ptr, row_ptr, BLOCK_M, CUTS)
        is_row = first + within < end
        slot = tl.load(slot_ptr + first + within, mask=is_row, other=0)
        dy_at = dy_ptr + (slot // TOPK).to(tl.int64)[:, None] * stride_yt + ks[None, :] * stride_yd
        dact = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if not DESCRIBED:
            cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
            is_col = cols < F
            right_at = weight + expert.to(tl.int64) * stride_we + cols.to(tl.int64)[None, :] * stride_wf + ks[:, None] * stride_wd
        for k in range(0, D, BLOCK_K):
            dy = tl.load(dy_at) if EVEN else tl.load(dy_at, mask=(ks < D - k)[None, :], other=0.0)
            if DESCRIBED:
                right = tl.reshape(weight.load([expert, k, n * BLOCK_N]), [BLOCK_K, BLOCK_N])
            else:
                right = tl.load(right_at, mask=is_col[None, :] & (ks < D - k)[:, None], other=0.0)
                right_at += BLOCK_K * stride_wd
            dact = tl.dot(dy, right, dact, input_precision=PRECISION)
            dy_at += BLOCK_K * stride_yd
        scale = tl.load(weight_ptr + slot, mask=is_row, other=0.0).to(tl.float32)
        # From here on pointers: an expert's rows enter in 64 bits, as one number, and places in the tile in 32.
        pre, dpre, act = pre_ptr + first.to(tl.int64) * (2 * F), dpre_ptr + first.to(tl.int64) * (2 * F), act_ptr + first.to(tl.int64) * F
        part = tl.zeros([BLOCK_M], dtype=tl.float32)
        pieces = quarters(dact) if QUARTERS else (dact,)  # a wide tile at once would need more registers than there are
        for i in tl.static_range(4 if QUARTERS else 1):
            piece = n * BLOCK_N + i * pieces[i].shape[1] + tl.arange(0, pieces[i].shape[1])
            part += _swiglu_backward(pieces[i], scale, pre, dpre, act, piece, is_row, F, NEED_PRE, NEED_ACT)
        tl.store(parts_ptr + n.to(tl.int64) * num_rows + first + within, part, mask=is_row)


@Kernel
def _swiglu_backward(dact, scale, pre, dpre, act, cols, is_row, F, NEED_PRE: tl.constexpr, NEED_ACT: tl.constexpr):
    """Columns of a tile: writes the weighted activations and the pre-activations' gradient; returns each row's <dact, activation>."""
    within = tl.arange(0, is_row.shape[0])[:, None]
    mask = is_row[:, None] & (cols < F)[None, :]
    at = within * (2 * F) + cols[None, :]
    gate = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + F + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    swish = gate * sigmoid
    part = tl.sum(dact * swish * up, 1)
    if NEED_ACT:
        tl.store(act + within * F + cols[None, :], (swish * up * scale[:, None]).to(act.dtype.element_ty), mask=mask)
    if NEED_PRE:
        dact *= scale[:, None]
        tl.store(dpre + F + at, (dact * swish).to(dpre.dtype.element_ty), mask=mask)
        tl.store(dpre + at, (dact * up * (sigmoid + swish * (1 - sigmoid))).to(dpre.dtype.element_ty), mask=mask)
    return part


@Kernel
def part_sum_kernel(parts_ptr, place_ptr, dweight_ptr, num_rows, num_parts, BLOCK: tl.constexpr):
    """The gradient of every slot's weight: the sum of its row's parts, 0 where it has no row."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(place_ptr + slots, mask=slots < num_rows, other=-1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * num_rows + place, mask=place >= 0, other=0.0)
    tl.store(dweight_ptr + slots, total, mask=slots < num_rows)


@Kernel
def weight_gradient_kernel(
    left_ptr, right_ptr, out_ptr, slot_ptr, start_ptr, M, N, stride_ls, stride_lm, stride_rs, stride_rn,
    TOPK: tl.constexpr, GATHER_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile of one expert's gradient, summed over the expert's rows."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (num_m * num_n)
    m, n = tile_at(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    first, end = tl.load(start_ptr + expert), tl.load(start_ptr + expert + 1)
    ms, ns, ks = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_m, is_n = ms < M, ns < N
    left_at, right_at = left_ptr + ms.to(tl.int64) * stride_lm, right_ptr + ns.to(tl.int64) * stride_rn  # a transposed x steps over all tokens
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for row in range(first, end, BLOCK_K):
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
