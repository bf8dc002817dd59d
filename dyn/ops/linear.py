"""One linear layer an expert over routed tokens, and its partial form: a part that all experts share beside dynamic parts of their own.

    y_t = sum_k weight_tk (x_t W_idx_tk^T + b_idx_tk)

T tokens, K experts a token, S = T*K routed rows in expert order, E experts, I inputs, O outputs, J kept inputs of an output. A name ends in the
shape of its tensor: `weight_EOI` is [E, O, I], an expert's weight as nn.Linear keeps it.

`_eager` is the specification. `_torch` sorts the (token, expert) pairs once and runs one matrix product an expert on slices of the sorted rows. Backward
keeps the order of the rows beside x and the weights: the scores' gradient is <x_t, dy_t W_e>, so the experts' outputs are never kept. The bias needs no rows
in expert order: with P_te the score that token t gives expert e, it adds P b, and autograd does the rest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn.ops.arguments import autocast, check_devices, check_routed, given, pick, refuse_negative, unobserved
from dyn.ops.rows import (
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


def routed_linear(
    x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor, bias_EO: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Weighted sum of the chosen experts' linear layers for every token (padnet section 2.1: an expert is one linear).

    Args:
        x_TI: tokens, floating; float64 works throughout.
        weight_EOI: stacked weights in x's dtype, any strides.
        idx_TK: expert ids, int32 or int64. An id >= E means "no expert" and adds nothing, no bias either. Negative ids raise on CPU
            (elsewhere the check would wait for the device, and they are undefined).
        weight_TK: floating, often float32. The scores enter in x's precision; their gradient is summed in float32.
        bias_EO: stacked biases in x's dtype, weighted like the products; None for none.
        backend: "eager" (a loop over experts under autograd: the reference), "torch", or "auto" (today "torch").

    Returns y_TO in x's dtype. Under autocast x, weights and biases are cast first, as a linear layer would, and y has the autocast dtype. Results are
    deterministic. The "torch" backend has no second derivative, and no gradients by torch.func.

    Raises ValueError for shapes, dtypes or devices that do not fit and for an unknown backend.
    """
    x_TI, weight_EOI, bias_EO = autocast(x_TI, weight_EOI, bias_EO)
    tensors = _named(x_TI, weight_EOI, idx_TK, weight_TK, bias_EO)
    if x_TI.dim() != 2 or weight_EOI.dim() != 3 or x_TI.shape[1] != weight_EOI.shape[2]:
        raise ValueError(f"routed_linear needs x [T, I] and weight_EOI [E, O, I]; {given(tensors)}")
    if bias_EO is not None and bias_EO.shape != weight_EOI.shape[:2]:
        raise ValueError(f"routed_linear: beside this weight_EOI, bias_EO must be {list(weight_EOI.shape[:2])}; {given(tensors)}")
    check_routed("routed_linear", tensors)
    backend = pick("routed_linear", backend, _BACKENDS, "torch", tensors, _log, _logged)
    return _BACKENDS[backend](x_TI, weight_EOI, idx_TK, weight_TK, bias_EO)


def _named(x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor, bias_EO: Tensor | None = None) -> dict[str, Tensor]:
    """What errors call the arguments."""
    return {"x": x_TI, "weight_EOI": weight_EOI} | ({} if bias_EO is None else {"bias_EO": bias_EO}) | {"idx": idx_TK, "weight": weight_TK}


def partial_routed_linear(
    x_TI: Tensor,
    dynamic_EOI: Tensor,
    static_OI: Tensor,
    mask_OI: Tensor,
    idx_TK: Tensor,
    weight_TK: Tensor,
    bias_EO: Tensor | None = None,
    *,
    dynamic_scale: float | Tensor = 1.0,
    static_scale: float | Tensor = 1.0,
    form: str = "merged",
    backend: str = "auto",
) -> Tensor:
    """Routed linear layers that differ only where the mask is true (padnet sections 3.2 and 3.6).

        W'_e = l_d M * W_e + l_s (1 - M) * W_static                              one mask for all experts
        y_t  = sum_k weight_tk (x_t W'_idx_tk^T + b_idx_tk)                      "merged"
             = l_s s_t x_t ((1 - M) * W_static)^T + l_d sum_k weight_tk x_t (M * W_idx_tk)^T + sum_k weight_tk b_idx_tk      "factorised"

    with s_t the sum of a token's scores over ids < E. With P = O * I, "merged" costs K * P multiplications a token, beside E * P once a call for the
    weights W', which also stay in memory until backward. "factorised" costs P_static + K * P_dynamic, where these are not the numbers of entries but the
    smallest blocks (rows times columns that hold one) around the static and the dynamic entries: products run on dense blocks, since sparse kernels reach
    less than a tenth of the rate of dense ones, far above the share of an unstructured mask that they would skip. So with a mask of whole inputs or
    outputs of share kappa it costs (1 - kappa) P + K * kappa * P, less than K * P, plus copies of the blocks; with an unstructured mask both blocks are all of
    P, it costs (1 + K) P, and "merged" is cheaper, which is why it is the default. On one CPU core, forward and backward at T 2048, I = O = 768, E 16, K 4,
    kappa 0.3, "factorised" takes 0.6 to 0.7 of the time of "merged" in float32 and as long in bfloat16 for a structured mask, 1.3 to 1.4 of it for an
    unstructured one. It reads the mask on the host: a device waits, and a compiled graph breaks.

    Args:
        x_TI, idx_TK, weight_TK, bias_EO, backend: as in `routed_linear`.
        dynamic_EOI, static_OI: in x's dtype. Entries of `dynamic` outside the mask, and of `static` inside, count for nothing and get gradient zero.
        mask_OI: bool, true where the parameter is dynamic.
        dynamic_scale, static_scale: l_d and l_s, numbers or tensors of one.
        form: "merged" or "factorised"; the values are the same.

    Returns y_TO in x's dtype. Raises ValueError as `routed_linear` does, for a mask or static part of another shape, and for an unknown form.
    """
    x_TI, dynamic_EOI, static_OI, bias_EO = autocast(x_TI, dynamic_EOI, static_OI, bias_EO)
    tensors = {"x": x_TI, "dynamic": dynamic_EOI, "static": static_OI, "mask": mask_OI} | ({} if bias_EO is None else {"bias": bias_EO})
    shapes = (x_TI.shape[:1] + dynamic_EOI.shape[2:], dynamic_EOI.shape, *[dynamic_EOI.shape[1:]] * 2, dynamic_EOI.shape[:2])
    if mask_OI.dtype != torch.bool or dynamic_EOI.dim() != 3 or any(t.shape != shape for t, shape in zip(tensors.values(), shapes, strict=False)):
        raise ValueError(f"partial_routed_linear needs x [T, I], dynamic [E, O, I], static [O, I], bias [E, O] or none, and a bool mask [O, I]; "
                         f"{given(tensors)}")
    if any(t.dtype != x_TI.dtype for t in tensors.values() if t is not mask_OI):
        raise ValueError(f"partial_routed_linear: x, dynamic, static and bias must share a dtype; {given(tensors)}")
    scales = {"dynamic_scale": dynamic_scale, "static_scale": static_scale}
    if wrong := {name: scale for name, scale in scales.items() if isinstance(scale, Tensor) and scale.numel() != 1}:
        raise ValueError(f"partial_routed_linear: {' and '.join(wrong)} must be one number; {given(wrong | tensors)}")
    check_devices("partial_routed_linear", tensors)
    if form not in ("merged", "factorised"):
        raise ValueError(f"form={form!r} of partial_routed_linear is unknown; allowed: merged, factorised")
    if form == "merged" or mask_OI.is_meta:  # one pass over the E weights each way, however they are scaled
        factor_OI, static_OI = (dynamic_scale * mask_OI.to(x_TI.dtype)).to(x_TI.dtype), (static_scale * static_OI * ~mask_OI).to(x_TI.dtype)
        weight_EOI = torch.addcmul(static_OI, dynamic_EOI, factor_OI)
        return routed_linear(x_TI, weight_EOI, idx_TK, weight_TK, bias_EO, backend)
    rows_R, columns_C, block_RC = _block(mask_OI)
    block_ERC = dynamic_scale * dynamic_EOI[:, rows_R][:, :, columns_C] * block_RC
    dynamic_TR = routed_linear(x_TI.index_select(1, columns_C), block_ERC, idx_TK, weight_TK, None, backend)
    scores_TE = score_matrix(idx_TK, weight_TK, dynamic_EOI.shape[0], x_TI.dtype)
    y_TO = x_TI.new_zeros(x_TI.shape[0], static_OI.shape[0]) if bias_EO is None else scores_TE.to(x_TI.dtype) @ bias_EO.to(x_TI.dtype)
    y_TO = y_TO.index_add(1, rows_R, dynamic_TR)
    rows_R, columns_C, block_RC = _block(~mask_OI)
    block_RC = static_scale * static_OI[rows_R][:, columns_C] * block_RC
    static_TR = routed_linear(x_TI.index_select(1, columns_C), block_RC[None], idx_TK.new_zeros(len(x_TI), 1), scores_TE.sum(-1, keepdim=True), None, backend)
    return y_TO.index_add(1, rows_R, static_TR)


def _block(mask_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns that hold a true entry, and the mask on them."""
    rows_R, columns_C = (mask_OI.any(axis).nonzero()[:, 0] for axis in (1, 0))
    return rows_R, columns_C, mask_OI[rows_R][:, columns_C]


def score_matrix(idx_TK: Tensor, weight_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """P_TE, the score that every token gives every expert: 0 for experts not chosen. Ids >= E are left out. Summed in the wider of the scores' and `dtype`."""
    weight_TK = weight_TK.to(torch.promote_types(dtype, weight_TK.dtype))
    P_TE = weight_TK.new_zeros(idx_TK.shape[0], num_experts + 1)
    idx_TK = idx_TK.clamp(max=num_experts).long()
    for k in range(idx_TK.shape[1]):  # one id a token and step: an order of sums that is the same on every device, also where a token names an expert twice
        P_TE = P_TE.scatter_add(1, idx_TK[:, k : k + 1], weight_TK[:, k : k + 1])
    return P_TE[:, :num_experts]


# eager: the specification ---------------------------------------------------------------------------------------------


def _eager(x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor, bias_EO: Tensor | None) -> Tensor:
    if idx_TK.numel():
        refuse_negative("routed_linear", idx_TK.min(), _named(x_TI, weight_EOI, idx_TK, weight_TK, bias_EO))
    sum_dtype = torch.promote_types(x_TI.dtype, weight_TK.dtype)
    y_TO = x_TI.new_zeros(x_TI.shape[0], weight_EOI.shape[1], dtype=sum_dtype)
    for e in range(weight_EOI.shape[0]):
        token, slot = (idx_TK == e).nonzero(as_tuple=True)
        out = F.linear(x_TI[token], weight_EOI[e], None if bias_EO is None else bias_EO[e])
        y_TO = y_TO.index_add(0, token, out.to(sum_dtype) * weight_TK[token, slot, None].to(sum_dtype))
    return y_TO.to(x_TI.dtype)


# torch: sorted rows, one product an expert ----------------------------------------------------------------------------


def _torch(x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor, bias_EO: Tensor | None) -> Tensor:
    run = _run if unobserved(x_TI, weight_EOI, weight_TK) else _forward
    y_TO = run(x_TI, weight_EOI, idx_TK, weight_TK)[0]
    if bias_EO is None:
        return y_TO
    return y_TO + score_matrix(idx_TK, weight_TK, bias_EO.shape[0], x_TI.dtype).to(x_TI.dtype) @ bias_EO


def _run(x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y_TO without bias, where each expert's rows end [E], and the slot of every row [S]."""
    ends_E, slot_S = arrange("routed_linear", idx_TK, len(weight_EOI), _named(x_TI, weight_EOI, idx_TK, weight_TK),
                             x_TI.element_size() / 2 * math.prod(weight_EOI.shape[1:]))
    ends = usable(ends_E, slot_S, weight_EOI)
    token_S = tokens(slot_S, idx_TK)
    y_SO = scratch(x_TI, slot_S.numel(), weight_EOI.shape[1])
    for some, rows, local in segments(ends, slot_S.numel(), x_TI.shape[1] * x_TI.element_size()):
        products(x_TI.index_select(0, token_S[rows]), weight_EOI[some].transpose(1, 2), local, y_SO[rows])
    clear_skipped(ends, y_SO)
    return gather_sum(y_SO, slot_S, chosen_weights(idx_TK, weight_TK.to(x_TI.dtype), len(weight_EOI))), ends_E, slot_S


def _run_backward(
    dy_TO: Tensor, x_TI: Tensor, weight_EOI: Tensor, idx_TK: Tensor, weight_TK: Tensor, ends_E: Tensor, slot_S: Tensor, need_x: bool,
    need_weight: bool, need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight_EOI and weight_TK; without elements where they are not needed."""
    ends = usable(ends_E, slot_S, weight_EOI)
    token_S = tokens(slot_S, idx_TK)
    weight_S1 = row_weights(slot_S, weight_TK)[:, None].to(x_TI.dtype)
    num_rows, sum_dtype = slot_S.numel(), torch.promote_types(x_TI.dtype, torch.float32)
    dx_SI = scratch(x_TI, num_rows if need_x else 0, x_TI.shape[1])
    dweight_S = x_TI.new_empty(num_rows if need_scores else 0, dtype=sum_dtype)
    dweight_EOI = weight_EOI.new_empty(weight_EOI.shape if need_weight else 0)
    for some, rows, local in segments(ends, num_rows, sum(weight_EOI.shape[1:]) * x_TI.element_size()):
        dy = dy_TO.index_select(0, token_S[rows])
        x = x_TI.index_select(0, token_S[rows]) if need_weight or need_scores else None
        if need_x or need_scores:  # dx without the score: what the score multiplies, seen from x
            dx = dx_SI[rows] if need_x else dy.new_empty(dy.shape[0], x_TI.shape[1])
            products(dy, weight_EOI[some], local, dx)
        if need_scores:
            dweight_S[rows] = (dx * x).sum(-1, dtype=sum_dtype)
        if need_weight:
            outer_products(dy.mul_(weight_S1[rows]), x, local, dweight_EOI[some])
    clear_skipped(ends, dx_SI, dweight_S)
    dx_TI = x_TI.new_empty(0, x_TI.shape[1])
    if need_x:
        dx_TI = gather_sum(dx_SI, slot_S, chosen_weights(idx_TK, weight_TK.to(x_TI.dtype), len(weight_EOI)))
    dweight_TK = dweight_S[places(slot_S, weight_TK)] if need_scores else dweight_S
    return dx_TI, dweight_EOI, dweight_TK.to(weight_TK.dtype)


_forward = torch.library.custom_op("dyn::routed_linear", _run, mutates_args=())
_backward = torch.library.custom_op("dyn::routed_linear_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(x_TI, weight_EOI, idx_TK, weight_TK):
    slot_S = idx_TK.new_empty(rows_needed(idx_TK, weight_EOI.shape[0]), dtype=torch.int64)
    return x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1]), idx_TK.new_empty(weight_EOI.shape[0], dtype=torch.int32), slot_S


@_backward.register_fake
def _(dy_TO, x_TI, weight_EOI, idx_TK, weight_TK, ends_E, slot_S, need_x, need_weight, need_scores):
    dx_TI = x_TI.new_empty(x_TI.shape if need_x else (0, x_TI.shape[1]))
    return dx_TI, weight_EOI.new_empty(weight_EOI.shape if need_weight else 0), weight_TK.new_empty(weight_TK.shape if need_scores else 0)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the rows' slots, which nobody differentiates
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx, dy_TO, *_):
    if dy_TO is None:
        return (None,) * 4
    need_x, need_weight, _, need_scores = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: checkpointing computes them again for each look
    run = _run_backward if unobserved(dy_TO, *saved) else _backward
    dx, dweight, dscores = run(dy_TO, *saved, need_x, need_weight, need_scores)
    return dx if need_x else None, dweight if need_weight else None, None, dscores if need_scores else None


_forward.register_autograd(_differentiate, setup_context=_setup)


_BACKENDS: dict[str, Callable[..., Tensor]] = {"eager": _eager, "torch": _torch}
