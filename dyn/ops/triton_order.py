"""The order of the routed rows by expert, in Triton, without waiting for the device.

T tokens, E experts, K experts a token, S = T*K slots (slot t*K + k is choice k of token t), B blocks of slots, N row tiles at
most. A name ends in the shape of its tensor.

Three kernels order the rows, as stably as torch.sort(stable=True): every block of slots counts its experts, one program
sums the counts over blocks and experts, and every block writes its slots to their rows. The last also writes which expert
each tile of rows belongs to. Few slots are ordered in one kernel. How many tiles there are depends on the ids, which only the
device knows; the host knows a bound, and the products stop at the number that the device wrote.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyn.ops.triton_launch import Kernel, blocks, power_of_two

tl: Any = None  # triton.language, once a kernel has been launched

_SMALLEST_TILE = 16  # rows; triton_config has no smaller row_tile
_FEW = 512  # slots that one program orders by itself: a launch costs the host more than it takes
_MANY = 1 << 15  # slots from which on blocks are larger: less to do for the one program of the second kernel, more for those of the third
_MAP_CELLS = 8192  # tiles x experts that one program of the last kernel compares
_RANKED, _AGAINST = 128, 32  # slots that are ranked at once, and those that they are compared with at once


@dataclass(frozen=True)
class Order:
    """The rows in expert order: views of one int32 buffer, so that backward keeps a single tensor of about 9 bytes a row.

    slot_S: the slot of every row; rows of ids >= E have none, and what stands there is undefined.
    place_S: the row of every slot, -1 for ids >= E.
    start_E: where each expert's rows start, and [E] where the last one's end.
    num_tiles_1: tiles of block_m rows that cover the experts' rows, none of them over two experts.
    expert_N, row_N: the expert and the first row of every tile, defined for the first num_tiles.
    """

    slot_S: Tensor
    place_S: Tensor
    start_E: Tensor
    num_tiles_1: Tensor
    expert_N: Tensor
    row_N: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a kernel over row tiles reads to find its rows."""
        return self.slot_S, self.start_E, self.num_tiles_1, self.expert_N, self.row_N


def tiles_at_most(num_slots: int, num_experts: int, block_m: int) -> int:
    """Tiles that any routing of the slots could need: one an expert and as many full ones as the other slots fill."""
    return num_experts - 1 + blocks(num_slots - num_experts + 1, block_m)


def order_size(num_slots: int, num_experts: int) -> int:
    """Elements of the buffer under an `Order`, for the smallest tiles: the same whatever block_m is. Sizes may be symbolic."""
    return sum(_room(size) for size in _part_sizes(num_slots, num_experts))


def read_order(buffer: Tensor, num_slots: int, num_experts: int) -> Order:
    """The parts of a buffer that `order_rows` filled."""
    sizes, rooms = _rooms(num_slots, num_experts)
    return Order(*(part[:size] for part, size in zip(buffer.split(rooms), sizes, strict=True)))


@functools.lru_cache(maxsize=1024)
def _rooms(num_slots: int, num_experts: int) -> tuple[list[int], list[int]]:
    sizes = _part_sizes(num_slots, num_experts)
    return sizes, [_room(size) for size in sizes]


def _part_sizes(num_slots: int, num_experts: int) -> list[int]:
    num_tiles = tiles_at_most(num_slots, num_experts, _SMALLEST_TILE)
    return [num_slots, num_slots, num_experts + 1, 1, num_tiles, num_tiles]


def _room(size: int) -> int:
    """Elements that a part takes: every part starts at a multiple of 16 bytes, or Triton would compile each kernel again for every alignment that comes up."""
    return 4 * blocks(size, 4)


def order_rows(idx_TK: Tensor, num_experts: int, block_m: int) -> Tensor:
    """The int32 buffer of an `Order` for ids of any integer type; an id outside 0 .. E-1 gets no row. Needs T*K and E above 0."""
    num_slots = idx_TK.numel()
    if num_slots >= 2**31:
        raise ValueError(f"the triton backend takes fewer than 2**31 routed rows; got T*K={num_slots}")
    idx_S = idx_TK.reshape(-1).contiguous()  # of one column or row, reshape gives a view with any stride
    buffer = torch.empty(order_size(num_slots, num_experts), dtype=torch.int32, device=idx_TK.device)
    order = read_order(buffer, num_slots, num_experts)
    bins = power_of_two(num_experts)
    map_tiles, num_tiles = max(1, min(64, _MAP_CELLS // bins)), tiles_at_most(num_slots, num_experts, block_m)
    if num_slots <= _FEW:
        few_order_kernel[(1,)](
            idx_S, order.slot_S, order.place_S, order.start_E, order.num_tiles_1, order.expert_N, order.row_N, num_slots, num_experts, num_tiles,
            BLOCK_M=block_m, BLOCK=max(_RANKED, power_of_two(num_slots)), RANKED=_RANKED, AGAINST=_AGAINST, TILES=map_tiles, BINS=bins, num_warps=4,
        )
        return buffer
    block = 4 * _RANKED if num_slots > _MANY else _RANKED
    num_blocks = blocks(num_slots, block)
    counts_BE = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=idx_TK.device)
    count_kernel[(num_blocks,)](idx_S, counts_BE, num_slots, num_experts, BLOCK=block, BINS=bins, num_warps=4)
    scan_kernel[(1,)](
        counts_BE, order.start_E, order.num_tiles_1, num_blocks, num_experts,
        BLOCK_M=block_m, CHUNK=max(1, min(8192 // bins, power_of_two(num_blocks))), BINS=bins, num_warps=8,
    )
    num_maps = blocks(num_tiles, map_tiles)
    scatter_kernel[(num_blocks + num_maps,)](
        idx_S, counts_BE, order.start_E, order.slot_S, order.place_S, order.expert_N, order.row_N, num_slots, num_experts, num_blocks,
        BLOCK_M=block_m, BLOCK=block, RANKED=_RANKED, AGAINST=_AGAINST, TILES=map_tiles, BINS=bins, num_warps=4,
    )
    return buffer


@Kernel
def count_kernel(idx_ptr, counts_ptr, num_slots, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts[b, e] = slots of block b that chose expert e."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(idx_ptr + slots, mask=slots < num_slots, other=-1)
    routed = (ids >= 0) & (ids < num_experts)
    counts = tl.histogram(tl.where(routed, ids, 0).to(tl.int32), BINS, mask=routed)
    experts = tl.arange(0, BINS)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + experts, counts, mask=experts < num_experts)


@Kernel
def scan_kernel(counts_ptr, start_ptr, num_tiles_ptr, num_blocks, num_experts, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """One program: counts become counts of the blocks before, and their sums the experts' starts and the number of tiles."""
    experts = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for first in range(0, num_blocks, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        at = counts_ptr + rows[:, None] * num_experts + experts[None, :]
        mask = (rows < num_blocks)[:, None] & (experts < num_experts)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.debug_barrier()  # a small tile has copies in several warps, and none may write what another has yet to read
        tl.store(at, tl.cumsum(counts, 0) - counts + total[None, :], mask=mask)
        total += tl.sum(counts, 0)
    _write_starts(total, start_ptr, num_tiles_ptr, num_experts, BLOCK_M, BINS)


@Kernel
def _write_starts(counts, start_ptr, num_tiles_ptr, num_experts, BLOCK_M: tl.constexpr, BINS: tl.constexpr):
    """Where each expert's rows start and the last one's end, and how many tiles they fill, from the number of each expert's rows."""
    experts = tl.arange(0, BINS)
    tl.store(start_ptr + experts, tl.cumsum(counts, 0) - counts, mask=experts < num_experts)
    tl.store(start_ptr + num_experts, tl.sum(counts, 0))
    tl.store(num_tiles_ptr, tl.sum((counts + BLOCK_M - 1) // BLOCK_M, 0))


@Kernel
def scatter_kernel(
    idx_ptr, before_ptr, start_ptr, slot_ptr, place_ptr, expert_ptr, row_ptr, num_slots, num_experts, num_blocks,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, AGAINST: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr,
):
    """Every slot to its row and every row to its slot; the programs after the blocks of slots map tiles to experts instead.

    A slot's row is its expert's start, plus the slots of earlier blocks with that expert, plus those before it in its own
    block. The last are found by comparing ids, RANKED x AGAINST at a time: cheaper than a sort, and free of E.
    """
    block = tl.program_id(0)
    if block >= num_blocks:
        _map_tiles((block - num_blocks) * TILES, start_ptr, expert_ptr, row_ptr, num_experts, BLOCK_M, TILES, BINS)
    else:
        for mine in range(0, BLOCK, RANKED):
            _place(block, mine, idx_ptr, before_ptr, start_ptr, slot_ptr, place_ptr, num_slots, num_experts, BLOCK, RANKED, AGAINST, True)


@Kernel
def few_order_kernel(
    idx_ptr, slot_ptr, place_ptr, start_ptr, num_tiles_ptr, expert_ptr, row_ptr, num_slots, num_experts, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, AGAINST: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr,
):
    """One program: the whole order of one block of slots."""
    slots = tl.arange(0, BLOCK)
    ids = tl.load(idx_ptr + slots, mask=slots < num_slots, other=-1)
    routed = (ids >= 0) & (ids < num_experts)
    _write_starts(tl.histogram(tl.where(routed, ids, 0).to(tl.int32), BINS, mask=routed), start_ptr, num_tiles_ptr, num_experts, BLOCK_M, BINS)
    tl.debug_barrier()  # all of the starts are written before any is read
    for first in range(0, num_tiles, TILES):
        _map_tiles(first, start_ptr, expert_ptr, row_ptr, num_experts, BLOCK_M, TILES, BINS)
    for mine in range(0, BLOCK, RANKED):
        _place(0, mine, idx_ptr, idx_ptr, start_ptr, slot_ptr, place_ptr, num_slots, num_experts, BLOCK, RANKED, AGAINST, False)


@Kernel
def _place(
    block, mine, idx_ptr, before_ptr, start_ptr, slot_ptr, place_ptr, num_slots, num_experts,
    BLOCK: tl.constexpr, RANKED: tl.constexpr, AGAINST: tl.constexpr, BEFORE: tl.constexpr,
):
    """RANKED slots of a block to their rows; BEFORE: there are earlier blocks, whose counts stand at before_ptr."""
    slots = block * BLOCK + mine + tl.arange(0, RANKED)
    ids = tl.load(idx_ptr + slots, mask=slots < num_slots, other=-1)
    rank = tl.zeros([RANKED], dtype=tl.int32)
    for other in range(0, mine + RANKED, AGAINST):
        others = block * BLOCK + other + tl.arange(0, AGAINST)
        other_ids = tl.load(idx_ptr + others, mask=others < num_slots, other=-1)
        earlier = (other_ids[None, :] == ids[:, None]) & (others[None, :] < slots[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    routed = (ids >= 0) & (ids < num_experts)
    row = tl.load(start_ptr + ids, mask=routed, other=0) + rank
    if BEFORE:
        row += tl.load(before_ptr + block * num_experts + ids, mask=routed, other=0)
    tl.store(slot_ptr + row, slots, mask=routed)
    tl.store(place_ptr + slots, tl.where(routed, row, -1), mask=slots < num_slots)


@Kernel
def _map_tiles(first, start_ptr, expert_ptr, row_ptr, num_experts, BLOCK_M: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr):
    """The expert and the first row of TILES tiles: a tile belongs to the expert after all those whose tiles end before it."""
    experts = tl.arange(0, BINS)
    start = tl.load(start_ptr + experts, mask=experts < num_experts, other=0)
    end = tl.load(start_ptr + experts + 1, mask=experts < num_experts, other=0)
    num_tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(num_tiles, 0)
    tiles = first + tl.arange(0, TILES)
    passed = (last[None, :] <= tiles[:, None]) & (experts < num_experts)[None, :]
    expert = tl.sum(passed.to(tl.int32), 1)
    before = tl.sum(tl.where(passed, num_tiles[None, :], 0), 1)
    mask = expert < num_experts
    row = tl.load(start_ptr + expert, mask=mask, other=0) + (tiles - before) * BLOCK_M
    tl.store(expert_ptr + tiles, expert, mask=mask)
    tl.store(row_ptr + tiles, row, mask=mask)
