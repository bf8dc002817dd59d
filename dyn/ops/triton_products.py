"""Triton kernels over row tiles, forward: gate-up with SwiGLU, products of rows in expert order with weights, sums over a token's rows.

T tokens, E experts, K experts a token, S = T*K rows in expert order, D hidden size, F expert width; a name ends in the shape
of its tensor. `Order` of triton_order says which rows a tile has and whose they are.

The grids are persistent: every program walks over tiles of rows x columns, the columns' weights shared by a group of row
tiles so that they stay in the L2 cache. Weights come by tensor descriptor (TMA) where the device and the weight's strides
allow it, else through pointers: one kernel, a constexpr apart. An expert's offset, the row of a token and, through pointers, a
weight's column enter addresses in 64 bits, once a tile; what steps along them in 32, which is faster.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dyn.ops.triton_config import Config, choose
from dyn.ops.triton_launch import Kernel, blocks, describable, descriptor, power_of_two, precision, programs
from dyn.ops.triton_order import Order

tl: Any = None  # triton.language, once a kernel has been launched


def gate_up(x_TD: Tensor, gate_up_E2FD: Tensor, order: Order, topk: int, row_tile: int, keep: bool, activate: bool) -> tuple[Tensor, Tensor]:
    """The activations act_SF = silu(x G^T) * (x U^T) and the pre-activations pre_S2F; no rows of what is not asked for."""
    num_rows, (E, F2, D) = order.slot_S.numel(), gate_up_E2FD.shape
    width = F2 // 2
    act_SF = x_TD.new_empty(num_rows if activate else 0, width)
    pre_S2F = x_TD.new_empty(num_rows if keep else 0, F2)
    described = describable(gate_up_E2FD)

    def run(c: Config) -> None:
        weight = descriptor(gate_up_E2FD.unflatten(1, (2, width)), 1, 2, c.block_n, c.block_k) if described else gate_up_E2FD
        gate_up_kernel[(programs(x_TD.device, c.each),)](
            x_TD, weight, act_SF, pre_S2F, *order.tensors, D, width, *x_TD.stride(), *gate_up_E2FD.stride(),
            TOPK=topk, DESCRIBED=described, ACTIVATE=activate, KEEP=keep, QUARTERS=c.block_n >= 64, PRECISION=precision(x_TD.dtype),
            **c.blocks, CUTS=row_tile // c.block_m, EVEN=D % c.block_k == 0, num_warps=c.warps, num_stages=c.stages,
        )

    choose("gate_up", x_TD, (E, D, width, num_rows), row_tile, not (described and describable(pre_S2F if keep else act_SF)), run)
    return act_SF, pre_S2F


def row_products(rows: Tensor, weight_EOI: Tensor, order: Order, row_tile: int, name: str, topk: int = 0) -> Tensor:
    """out_SO = rows @ weight[e]^T for the rows of every expert e. `name` is the product's in the table of configurations.

    `rows` [S, I] are in expert order; with `topk` they are tokens' [T, I], gathered here. The weight is given as [E, O, I], a view
    of whatever lies in memory; either of its last two axes may be contiguous.
    """
    num_rows, (E, O, I) = order.slot_S.numel(), weight_EOI.shape
    out_SO = rows.new_empty(num_rows, O)
    # A weight that is contiguous along O is described as it lies, [E, I, O], and its tile needs no transposition.
    across = weight_EOI.stride(1) == 1
    lying = weight_EOI.transpose(1, 2) if across else weight_EOI
    described = describable(lying) and (topk > 0 or describable(rows))

    def run(c: Config) -> None:
        tile = (c.block_k, c.block_n) if across else (c.block_n, c.block_k)
        weight = descriptor(lying, 1, *tile) if described else weight_EOI
        left = descriptor(rows, c.block_m, c.block_k) if described and not topk else rows
        row_product_kernel[(programs(rows.device, c.each),)](
            left, weight, out_SO, *order.tensors, I, O, *rows.stride(), *weight_EOI.stride(),
            TOPK=topk, DESCRIBED=described, ACROSS=across, PRECISION=precision(rows.dtype),
            **c.blocks, CUTS=row_tile // c.block_m, EVEN=I % c.block_k == 0, num_warps=c.warps, num_stages=c.stages,
        )

    choose(name, rows, (E, I, O, num_rows), row_tile, not (described and describable(rows)), run)
    return out_SO


def token_sums(rows_SD: Tensor, place_S: Tensor, weight_TK: Tensor, weighted: bool) -> Tensor:
    """sum_k weight[t, k] * (the row of slot (t, k)), summed in float32; without the weights if not `weighted`."""
    (T, K), D = weight_TK.shape, rows_SD.shape[1]
    y_TD = rows_SD.new_empty(T, D)
    block_d = min(power_of_two(D), 2048)
    block_t = max(1, 2048 // block_d)
    token_sum_kernel[(blocks(T, block_t), blocks(D, block_d))](
        rows_SD, place_S, weight_TK, y_TD, T, D, K=K, WEIGHTED=weighted, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4
    )
    return y_TD


@Kernel
def tile_at(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Which row tile and which column tile: GROUP_M row tiles walk over the columns together."""
    group = tile // (GROUP_M * num_n)
    within = tile % (GROUP_M * num_n)
    first = group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + within % size, within // size


@Kernel
def rows_of(m, start_ptr, expert_ptr, row_ptr, BLOCK_M: tl.constexpr, CUTS: tl.constexpr):
    """The expert, the first row and the end of the expert's rows, for the m-th row tile when each tile of the order is cut in CUTS."""
    expert = tl.load(expert_ptr + m // CUTS)
    return expert, tl.load(row_ptr + m // CUTS) + m % CUTS * BLOCK_M, tl.load(start_ptr + expert + 1)


@Kernel
def halves(tile):
    """The left and the right columns of a tile. Every thread keeps what it has: both are in its registers."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@Kernel
def quarters(tile):
    """A tile's columns in four pieces, in order, so that what follows needs the registers of one at a time."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@Kernel
def gate_up_kernel(
    x_ptr, weight, act_ptr, pre_ptr, slot_ptr, start_ptr, num_tiles_ptr, expert_ptr, row_ptr,
    D, F, stride_xt, stride_xd, stride_we, stride_wf, stride_wd,
    TOPK: tl.constexpr, DESCRIBED: tl.constexpr, ACTIVATE: tl.constexpr, KEEP: tl.constexpr, QUARTERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    CUTS: tl.constexpr, EVEN: tl.constexpr,
):
    """Gathers tokens' rows, multiplies them with BLOCK_N gate and BLOCK_N up columns as one matrix, and ends in SwiGLU."""
    num_m, num_n = tl.load(num_tiles_ptr) * CUTS, tl.cdiv(F, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = tile_at(tile, num_m, num_n, GROUP_M)
        expert, first, end = rows_of(m, start_ptr, expert_ptr, row_ptr, BLOCK_M, CUTS)
        rows = first + tl.arange(0, BLOCK_M)
        is_row = rows < end
        token = tl.load(slot_ptr + rows, mask=is_row, other=0) // TOPK  # rows of another expert compute token 0, and are not written
        x_at = x_ptr + token.to(tl.int64)[:, None] * stride_xt + ks[None, :] * stride_xd
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], dtype=tl.float32)
        if not DESCRIBED:
            both = tl.arange(0, 2 * BLOCK_N)
            cols = n * BLOCK_N + both % BLOCK_N
            is_col = cols < F
            w_at = weight + expert.to(tl.int64) * stride_we + (both // BLOCK_N * F + cols).to(tl.int64)[None, :] * stride_wf + ks[:, None] * stride_wd
        for k in range(0, D, BLOCK_K):
            x = tl.load(x_at) if EVEN else tl.load(x_at, mask=(ks < D - k)[None, :], other=0.0)
            if DESCRIBED:
                w = tl.reshape(weight.load([expert, 0, n * BLOCK_N, k]), [2 * BLOCK_N, BLOCK_K]).T
            else:
                w = tl.load(w_at, mask=is_col[None, :] & (ks < D - k)[:, None], other=0.0)
                w_at += BLOCK_K * stride_wd
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_at += BLOCK_K * stride_xd
        gate, up = halves(acc)
        # From here on pointers: an expert's rows enter in 64 bits, as one number, and places in the tile in 32.
        pre, act = pre_ptr + first.to(tl.int64) * (2 * F), act_ptr + first.to(tl.int64) * F
        gates = quarters(gate) if QUARTERS else (gate,)  # a wide tile at once would need more registers than there are
        ups = quarters(up) if QUARTERS else (up,)
        for i in tl.static_range(4 if QUARTERS else 1):
            piece = n * BLOCK_N + i * gates[i].shape[1] + tl.arange(0, gates[i].shape[1])
            _swiglu(gates[i], ups[i], pre, act, piece, is_row, F, ACTIVATE, KEEP)


@Kernel
def _swiglu(gate, up, pre, act, cols, is_row, F, ACTIVATE: tl.constexpr, KEEP: tl.constexpr):
    """Writes columns of a tile: the pre-activations and silu(gate) * up."""
    within = tl.arange(0, is_row.shape[0])[:, None]
    mask = is_row[:, None] & (cols < F)[None, :]
    if KEEP:
        tl.store(pre + within * (2 * F) + cols[None, :], gate.to(pre.dtype.element_ty), mask=mask)
        tl.store(pre + F + within * (2 * F) + cols[None, :], up.to(pre.dtype.element_ty), mask=mask)
    if ACTIVATE:
        tl.store(act + within * F + cols[None, :], (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty), mask=mask)


@Kernel
def row_product_kernel(
    rows_in, weight, out_ptr, slot_ptr, start_ptr, num_tiles_ptr, expert_ptr, row_ptr,
    I, O, stride_rs, stride_ri, stride_we, stride_wo, stride_wi,
    TOPK: tl.constexpr, DESCRIBED: tl.constexpr, ACROSS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    CUTS: tl.constexpr, EVEN: tl.constexpr,
):
    """Rows in expert order, or tokens' rows gathered into it (TOPK), times the expert's weight."""
    num_m, num_n = tl.load(num_tiles_ptr) * CUTS, tl.cdiv(O, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = tile_at(tile, num_m, num_n, GROUP_M)
        expert, first, end = rows_of(m, start_ptr, expert_ptr, row_ptr, BLOCK_M, CUTS)
        within = tl.arange(0, BLOCK_M)
        is_row = first + within < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        is_col = cols < O
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if TOPK:  # rows of another expert compute token 0, and are not written
            token = tl.load(slot_ptr + first + within, mask=is_row, other=0) // TOPK
            left_at = rows_in + token.to(tl.int64)[:, None] * stride_rs + ks[None, :] * stride_ri
        elif not DESCRIBED:
            left_at = rows_in + first.to(tl.int64) * stride_rs + within[:, None] * stride_rs + ks[None, :] * stride_ri
        if not DESCRIBED:
            right_at = weight + expert.to(tl.int64) * stride_we + cols.to(tl.int64)[None, :] * stride_wo + ks[:, None] * stride_wi
        for k in range(0, I, BLOCK_K):
            is_k = ks < I - k
            if TOPK:
                left = tl.load(left_at) if EVEN else tl.load(left_at, mask=is_k[None, :], other=0.0)
                left_at += BLOCK_K * stride_ri
            elif DESCRIBED:  # rows of the next expert, and columns past the end, are computed and not written
                left = rows_in.load([first, k])
            else:
                left = tl.load(left_at, mask=is_row[:, None] if EVEN else is_row[:, None] & is_k[None, :], other=0.0)
                left_at += BLOCK_K * stride_ri
            if not DESCRIBED:
                right = tl.load(right_at, mask=is_col[None, :] if EVEN else is_col[None, :] & is_k[:, None], other=0.0)
                right_at += BLOCK_K * stride_wi
            elif ACROSS:
                right = tl.reshape(weight.load([expert, k, n * BLOCK_N]), [BLOCK_K, BLOCK_N])
            else:
                right = tl.reshape(weight.load([expert, n * BLOCK_N, k]), [BLOCK_N, BLOCK_K]).T
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        at = out_ptr + first.to(tl.int64) * O + within[:, None] * O + cols[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


@Kernel
def token_sum_kernel(
    rows_ptr, place_ptr, weight_ptr, y_ptr, T, D,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The weighted sum of every token's K rows; a slot without a row adds nothing."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token, is_col = tokens < T, cols < D
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for k in range(K):
        place = tl.load(place_ptr + tokens * K + k, mask=is_token, other=-1)
        mask = (place >= 0)[:, None] & is_col[None, :]
        row = tl.load(rows_ptr + place.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weight_ptr + tokens * K + k, mask=place >= 0, other=0.0).to(tl.float32)[:, None]
        acc += row
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * D + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_col[None, :])
