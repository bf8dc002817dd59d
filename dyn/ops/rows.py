"""Rows in expert order: the sort of routed tokens by expert, and products of an expert's rows with its weights. Every op over experts stands on it.

T tokens, K experts a token, S = T*K rows in expert order (more with padding), E experts, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import itertools
import platform
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn.ops.arguments import refuse_negative

# Elementwise work runs on as many experts at once as have pre-activations of this size together. One expert at a time is
# slower by a tenth or more where experts are many and small, all at once by as much where rows are many: they leave the
# caches, and malloc returns large blocks to the system, to be faulted in again.
_SEGMENT_BYTES = 6 << 20

# On CPU an expert's rows are padded to a multiple of this, with rows of weight 0. oneDNN compiles a kernel for every new shape, which takes
# about as long as the product itself at a few hundred rows, and routing gives new row counts at every step.
_ROW_BLOCK = 32

# Multiplications in the time that one more call of a product takes, in bfloat16 on two CPUs.
CALL = 6 << 20

_SCRATCH_BYTES = 64 << 20  # what a thread may keep between calls
_memory = threading.local()
_inside = types.SimpleNamespace(lock=threading.Lock(), threads=0, before=None)  # of `_by_onednn`

Ends = list[int] | Tensor  # where each expert's rows end: numbers on the host, or int32 [E] on the device


def arrange(op: str, idx_TK: Tensor, num_experts: int, tensors: Mapping[str, Tensor], row_cost: float) -> tuple[Tensor, Tensor]:
    """Where each expert's rows end, int32 [E], and the slot t * K + k of every row [S]; -1 - slot for padding, with the slot of a row of the same expert.

    Args:
        op, tensors: named in the ValueError for negative ids on CPU.
        row_cost: multiplications that a product needs for a row, those of float32 counted twice. Padding makes neighbours alike where that is cheaper than a
            product more.
    """
    if idx_TK.is_cpu and idx_TK.numel():
        refuse_negative(op, idx_TK.min(), tensors)
    if idx_TK.is_cpu and num_experts < 1 << 15:
        key_S = idx_TK.flatten().clamp(max=num_experts).to(torch.uint8 if num_experts < 1 << 8 else torch.int16)
        slot_S = torch.from_numpy(key_S.numpy().argsort(kind="stable"))  # of so short numbers a radix sort, ten times as fast as torch's
        ends_E = torch.bincount(key_S, minlength=num_experts + 1)[:num_experts].cumsum(0, dtype=torch.int32)
    else:
        sorted_S, slot_S = idx_TK.flatten().sort(stable=True)
        ids_E = torch.arange(num_experts, device=sorted_S.device, dtype=sorted_S.dtype)
        ends_E = torch.searchsorted(sorted_S, ids_E, right=True, out_int32=True)
    return pad(ends_E, slot_S, row_block(idx_TK, num_experts), CALL / max(row_cost, 1))


def usable(ends_E: Tensor, slot_S: Tensor, *weights: Tensor) -> Ends:
    """Ends for products with these weights: on the device where grouped_mm takes them, so that nothing waits."""
    return ends_E if slot_S.numel() and can_group(*weights) else ends_E.tolist()


def rows_needed(idx_TK: Tensor, num_experts: int) -> int:
    """How many rows `arrange` makes."""
    return idx_TK.shape[0] * idx_TK.shape[1] + num_experts * (row_block(idx_TK, num_experts) - 1)


def tokens(slot_S: Tensor, idx_TK: Tensor) -> Tensor:
    """The token of every row [S]. Padding repeats a token of its own expert: its weight is 0, which nothing that is infinite may meet; another expert's token
    could overflow there."""
    return torch.where(slot_S < 0, ~slot_S, slot_S) // idx_TK.shape[1]


def chosen_weights(idx_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Tensor:
    """Weights, 0 for ids of no expert: theirs count for nothing, whatever they are."""
    return weight_TK.masked_fill(idx_TK >= num_experts, 0)


def row_weights(slot_S: Tensor, weight_TK: Tensor) -> Tensor:
    """The weight of every row [S]; 0 for padding."""
    return weight_TK.flatten()[slot_S.clamp(min=0)].masked_fill_(slot_S < 0, 0)


def can_group(*weights: Tensor) -> bool:
    """grouped_mm is one kernel, and waits for nothing, for bfloat16 on CUDA. Anything else takes a product an expert."""
    return all(w.is_cuda and w.dtype == torch.bfloat16 and w.numel() > 0 and aligned(w) for w in weights)


def aligned(weight_EIO: Tensor) -> bool:
    """Rows, strides and address in multiples of 16 bytes, one of the last two axes contiguous, as grouped_mm wants it."""
    _, *steps = weight_EIO.stride()
    sizes = [*weight_EIO.shape[1:], *(s for s in weight_EIO.stride() if s != 1)]
    return 1 in steps and weight_EIO.data_ptr() % 16 == 0 and all(n * weight_EIO.element_size() % 16 == 0 for n in sizes)


def segments(ends: Ends, num_rows: int, row_bytes: int) -> Iterator[tuple[slice, slice, Ends]]:
    """Runs of experts to work on together: their slice, the slice of their rows, and their ends within those rows."""
    if isinstance(ends, Tensor):
        yield slice(None), slice(0, num_rows), ends
        return
    first = start = 0
    for last, (end, following) in enumerate(itertools.pairwise([*ends, None])):
        if following is None or (following - start) * row_bytes > _SEGMENT_BYTES:
            yield slice(first, last + 1), slice(start, end), [e - start for e in ends[first : last + 1]]
            first, start = last + 1, end


def products(rows_SI: Tensor, weight_EIO: Tensor, ends: Ends, out_SO: Tensor) -> None:
    """out[rows of e] = rows[rows of e] @ weight[e]; zero in rows of no expert."""
    if isinstance(ends, Tensor):
        product = F.grouped_mm(rows_SI, weight_EIO, offs=ends)  # leaves rows after the last end as they were
        routed_S1 = torch.arange(out_SO.shape[0], device=ends.device)[:, None] < ends[-1]
        torch.where(routed_S1, product, product.new_zeros(()), out=out_SO)
        return
    with _mm(ends, rows_SI) as at_once:
        for some, rows in _runs(ends, at_once):
            if (count := some.stop - some.start) == 1:
                torch.mm(rows_SI[rows], weight_EIO[some.start], out=out_SO[rows])
            elif rows.stop > rows.start:
                torch.bmm(rows_SI[rows].unflatten(0, (count, -1)), weight_EIO[some], out=out_SO[rows].unflatten(0, (count, -1)))


def outer_products(left_SI: Tensor, right_SO: Tensor, ends: Ends, out_EIO: Tensor) -> None:
    """out[e] = left[rows of e]^T @ right[rows of e]; zero for an expert without rows."""
    if isinstance(ends, Tensor):
        product = F.grouped_mm(left_SI.t(), right_SO, offs=ends)
        filled_E11 = ends.diff(prepend=ends.new_zeros(1)).gt(0)[:, None, None]
        torch.where(filled_E11, product, product.new_zeros(()), out=out_EIO)
        return
    with _mm(ends, left_SI) as at_once:
        for some, rows in _runs(ends, at_once):
            if rows.stop == rows.start:
                out_EIO[some].zero_()
            elif (count := some.stop - some.start) == 1:
                torch.mm(left_SI[rows].t(), right_SO[rows], out=out_EIO[some.start])
            else:
                torch.bmm(left_SI[rows].unflatten(0, (count, -1)).mT, right_SO[rows].unflatten(0, (count, -1)), out=out_EIO[some])


def _runs(ends: list[int], at_once: bool) -> Iterator[tuple[slice, slice]]:
    """(experts, their rows): neighbours of equally many rows, or each expert alone. A product for several costs a quarter to a half less than one each where
    experts are small."""
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    first = 0
    while first < len(sizes):
        last = first + 1
        while at_once and last < len(sizes) and sizes[last] == sizes[first]:
            last += 1
        yield slice(first, last), slice(ends[last - 1] - (last - first) * sizes[first], ends[last - 1])
        first = last


def _mm(ends: list[int], left_MN: Tensor) -> AbstractContextManager[bool]:
    """Where float32 products go to oneDNN, as those of 16 bits do anyway, and whether it may multiply several experts at once. It compiles a kernel for every
    number of an expert's rows, and of experts, so only padded numbers of rows go there by choice."""
    padded = left_MN.is_cpu and all(end % _ROW_BLOCK == 0 for end in ends)
    if padded and left_MN.dtype == torch.float32 and _onednn_pays():
        return _by_onednn()
    return nullcontext(padded and left_MN.dtype in (torch.bfloat16, torch.float16))


@contextmanager
def _by_onednn() -> Iterator[bool]:
    """oneDNN may take bfloat16 inside float32 products; `_onednn_pays` has seen that it does not. The setting is the process's: of threads that are here at
    once, the last puts back what the first found, and products elsewhere may meanwhile be summed in oneDNN's order."""
    matmul = torch.backends.mkldnn.matmul
    with _inside.lock:
        if not _inside.threads:
            _inside.before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        _inside.threads += 1
    try:
        yield True
    finally:
        with _inside.lock:
            _inside.threads -= 1
            if not _inside.threads:
                matmul.fp32_precision = _inside.before


@functools.cache
def _onednn_pays() -> bool:
    """Whether float32 products go to oneDNN: where torch.mm is MKL's, which takes AVX2 on CPUs other than Intel's and reaches half of oneDNN's rate. The
    way there is a permission to round, so the products have to be float32's here first. The choice is not timed, as two runs must make the same."""
    info = Path("/proc/cpuinfo")
    cpu = platform.processor() + (info.read_text() if info.exists() else "")
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available() or "Intel" in cpu:
        return False
    g = torch.Generator("cpu").manual_seed(0)
    left_MN, right_NO = (torch.randn(256, 256, generator=g, dtype=torch.float32, device="cpu") for _ in range(2))
    try:
        with _by_onednn():
            found = [left_MN @ right_NO, left_MN @ right_NO.t().contiguous().t(), left_MN.t().contiguous().t() @ right_NO,
                     torch.bmm(left_MN.view(2, 128, 256), right_NO.repeat(2, 1, 1)).flatten(0, 1)]
    except (AttributeError, RuntimeError):
        return False
    exact = left_MN.double() @ right_NO.double()
    return all((product - exact).abs().max() < 1e-5 * exact.abs().max() for product in found)


def scratch(like: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """An empty [num_rows, num_columns] for rows that nobody sees after the op. On CPU it is the thread's own memory, used by every call: malloc gives large
    blocks back to the system, and faulting them in again costs as much as a tenth of the op."""
    size = num_rows * num_columns * like.element_size()
    if not like.is_cpu or size > _SCRATCH_BYTES:
        return like.new_empty(num_rows, num_columns)
    if not hasattr(_memory, "block") or len(_memory.block) < size:
        _memory.block = torch.empty(size, dtype=torch.uint8, device=like.device)
    return _memory.block[:size].view(like.dtype).view(num_rows, num_columns)


def clear_skipped(ends: Ends, *tensors: Tensor) -> None:
    """Zero the rows after the last expert's (ids >= E); on the device `products` has done so."""
    if not isinstance(ends, Tensor):
        for t in tensors:
            t[ends[-1] :].zero_()


def row_block(idx_TK: Tensor, num_experts: int) -> int:
    """To what multiple an expert's rows are padded: only on CPU, and only where the padding is little beside the rows."""
    if idx_TK.device.type != "cpu":
        return 1
    # A choice inside a graph for any number of tokens, which a condition would fix.
    return torch.sym_ite(idx_TK.shape[0] * idx_TK.shape[1] >= 4 * _ROW_BLOCK * num_experts, _ROW_BLOCK, 1)


def pad(ends_E: Tensor, slot_S: Tensor, block: int, spare: float) -> tuple[Tensor, Tensor]:
    """Ends in multiples of `block`, and the slots at their new rows with padding between (see `arrange`); as many rows as any routing could need."""
    if block == 1:
        return ends_E, slot_S
    ends, more = ends_E.tolist(), ends_E.numel() * (block - 1)
    sizes = [-(-(end - start) // block) * block for start, end in itertools.pairwise([0, *ends])]
    padded = list(itertools.accumulate(evened(sizes, ends[-1] + more - sum(sizes), spare)))
    out_S = slot_S.new_full((slot_S.numel() + more,), -1)
    out, slots = out_S.numpy(), slot_S.numpy()  # the same memory; torch takes ten times as long for each of these slices
    for start, end, to, stop in zip([0, *ends], [*ends, len(slots)], [0, *padded], [*padded, len(out)], strict=True):  # the last: rows of no expert
        out[to : to + end - start] = slots[start:end]
        if end > start:
            out[to + end - start : stop] = ~slots[start]
    return torch.tensor(padded, dtype=ends_E.dtype, device=ends_E.device), out_S


def evened(sizes: list[int], room: int, spare: float) -> list[int]:
    """Numbers of rows, where neighbours, but not those without rows, are made alike while that takes at most `spare` rows for each and `room` in all."""
    sizes, first = list(sizes), 0
    for e in range(1, len(sizes)):
        size, own = sizes[first], sizes[e]
        rows = (own - size) * (e - first) if own > size else size - own
        if not own or not size or rows > min(room, spare):
            first = e
            continue
        room -= rows
        sizes[first : e + 1] = [max(size, own)] * (e + 1 - first)
    return sizes


def places(slot_S: Tensor, weight_TK: Tensor) -> Tensor:
    """The row of every slot: int64 [T, K]."""
    place = slot_S.new_empty(weight_TK.numel() + 1)  # the last takes what padding writes
    place[slot_S.clamp(min=-1)] = torch.arange(slot_S.numel(), device=slot_S.device)
    return place[:-1].view(weight_TK.shape)


def gather_sum(rows_SD: Tensor, slot_S: Tensor, weight_TK: Tensor, weighted: bool = True) -> Tensor:
    """sum_k weight[t, k] * (the row of slot (t, k)), back in token order. embedding_bag is this in one deterministic
    pass, summed in float32, where a gather, a product and a sum would write [T, K, D] twice."""
    if not weight_TK.numel():
        return rows_SD.new_zeros(weight_TK.shape[0], rows_SD.shape[1])
    return F.embedding_bag(places(slot_S, weight_TK), rows_SD, per_sample_weights=weight_TK if weighted else None, mode="sum")
