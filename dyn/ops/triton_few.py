"""The experts' forward for few tokens in Triton, as in decoding: two kernels without an order of rows.

T tokens, K experts a token, E experts, D hidden size, F expert width; a name ends in the shape of its tensor. A slot t*K + k is choice k of token t.

With few rows, what takes time is to read the weights and to launch kernels. Every slot reads its expert's weights by itself; slots with the
same expert run beside each other and find them in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyn.ops.arguments import expert_tensors
from dyn.ops.triton_launch import Kernel, blocks, power_of_two, require

tl: Any = None  # triton.language, once a kernel has been launched

_REREAD = 1 << 28  # bytes of weights that slots with the same expert may read again
_ROWS, _COLUMNS = 8, 512  # of a weight that a program holds: enough bytes on their way to fill the memory's latency, enough programs to fill the device


def is_few(num_slots: int, down_EDF: Tensor) -> bool:
    """Whether the slots are so few, or the experts so small, that reading a slot's weights by itself costs less than an order of the rows."""
    E, D, F = down_EDF.shape
    return num_slots <= 2 * E or num_slots * 3 * D * F * down_EDF.element_size() <= _REREAD


@torch.library.custom_op("dyn::few_experts_triton", mutates_args=())
def few_experts(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """y_TD of `dyn.ops.experts`, without gradients. Activations stay in float32."""
    require("experts", expert_tensors(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK))
    (T, K), (E, D, F) = idx_TK.shape, down_EDF.shape
    y_TD, act_SF = torch.empty_like(x_TD, memory_format=torch.contiguous_format), torch.empty(T * K, F, dtype=torch.float32, device=x_TD.device)
    idx_TK, weight_TK = idx_TK.contiguous(), weight_TK.contiguous()
    with torch.cuda.device_of(x_TD):
        slot_kernel[(T * K * blocks(F, _ROWS),)](
            x_TD, gate_up_E2FD, act_SF, idx_TK, T * K, E, D, F, *x_TD.stride(), *gate_up_E2FD.stride(),
            TOPK=K, BLOCK_F=_ROWS, BLOCK_D=min(_COLUMNS, power_of_two(D)), num_warps=4,
        )
        token_kernel[(T * blocks(D, _ROWS),)](
            act_SF, down_EDF, y_TD, idx_TK, weight_TK, T, E, D, F, *down_EDF.stride(),
            TOPK=K, BLOCK_D=_ROWS, BLOCK_F=min(_COLUMNS, power_of_two(F)), num_warps=4,
        )
    return y_TD


@few_experts.register_fake
def _(x_TD, gate_up_E2FD, down_EDF, idx_TK, weight_TK):
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


@Kernel
def slot_kernel(
    x_ptr, weight_ptr, act_ptr, idx_ptr, num_slots, num_experts, D, F, stride_xt, stride_xd, stride_we, stride_wf, stride_wd,
    TOPK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """act = silu(x G^T) * (x U^T) for one slot and BLOCK_F neurons; nothing for a slot without an expert."""
    slot = tl.program_id(0) % num_slots
    expert = tl.load(idx_ptr + slot)
    if (expert >= 0) & (expert < num_experts):
        cols, ds = tl.program_id(0) // num_slots * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
        is_col = cols < F
        x_at = x_ptr + (slot // TOPK).to(tl.int64) * stride_xt + ds.to(tl.int64) * stride_xd
        gate_at = weight_ptr + expert.to(tl.int64) * stride_we + cols.to(tl.int64)[:, None] * stride_wf + ds.to(tl.int64)[None, :] * stride_wd
        up_at = gate_at + tl.cast(F, tl.int64) * stride_wf
        gates, ups = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32), tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            is_d = ds < D - d
            mask = is_col[:, None] & is_d[None, :]
            x = tl.load(x_at, mask=is_d, other=0.0).to(tl.float32)[None, :]
            gates += tl.load(gate_at, mask=mask, other=0.0).to(tl.float32) * x
            ups += tl.load(up_at, mask=mask, other=0.0).to(tl.float32) * x
            x_at += BLOCK_D * stride_xd
            gate_at += BLOCK_D * stride_wd
            up_at += BLOCK_D * stride_wd
        gate = tl.sum(gates, 1)
        tl.store(act_ptr + slot.to(tl.int64) * F + cols, gate / (1 + tl.exp(-gate)) * tl.sum(ups, 1), mask=is_col)


@Kernel
def token_kernel(
    act_ptr, weight_ptr, y_ptr, idx_ptr, scale_ptr, num_tokens, num_experts, D, F, stride_we, stride_wd, stride_wf,
    TOPK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """y = the weighted sum of a token's activations times the down projections, for BLOCK_D columns."""
    token = tl.program_id(0) % num_tokens
    cols, fs = tl.program_id(0) // num_tokens * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    sums = tl.zeros([BLOCK_D, BLOCK_F], dtype=tl.float32)
    for k in range(TOPK):
        slot = token * TOPK + k
        expert = tl.load(idx_ptr + slot)
        routed = (expert >= 0) & (expert < num_experts)
        width = tl.where(routed, F, 0)  # an expert that is none has no neurons
        scale = tl.load(scale_ptr + slot, mask=routed, other=0.0).to(tl.float32)
        act_at = act_ptr + slot.to(tl.int64) * F + fs
        w_at = weight_ptr + expert.to(tl.int64) * stride_we + cols.to(tl.int64)[:, None] * stride_wd + fs.to(tl.int64)[None, :] * stride_wf
        for f in range(0, F, BLOCK_F):
            is_f = fs < width - f
            act = tl.load(act_at, mask=is_f, other=0.0) * scale
            sums += tl.load(w_at, mask=(cols < D)[:, None] & is_f[None, :], other=0.0).to(tl.float32) * act[None, :]
            act_at += BLOCK_F
            w_at += BLOCK_F * stride_wf
    tl.store(y_ptr + token.to(tl.int64) * D + cols, tl.sum(sums, 1).to(y_ptr.dtype.element_ty), mask=cols < D)
