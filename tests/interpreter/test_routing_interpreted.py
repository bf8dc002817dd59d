"""The router and the order of rows on Triton's interpreter, against `route` and torch.sort."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.ops import triton_launch, triton_order
from dyn.ops.route import route
from dyn.ops.triton_order import order_rows, read_order, tiles_at_most

pytestmark = pytest.mark.skipif(not triton_launch.interpreted(), reason="needs TRITON_INTERPRET=1 from the start of the process")


def check_order(idx_TK, E, tile):
    """Everything an order says, from torch.sort; for few slots both by the kernel for few and by those for many."""
    num_slots = idx_TK.numel()
    routed = (idx_TK.flatten() >= 0) & (idx_TK.flatten() < E)
    ids, slot = torch.where(routed, idx_TK.flatten().long(), E).sort(stable=True)
    num_rows = int(routed.sum())
    place = torch.full((num_slots,), -1).scatter(0, slot[:num_rows], torch.arange(num_rows))
    counts = torch.bincount(ids[:num_rows], minlength=E)
    start = [0, *counts.cumsum(0).tolist()]
    tiles = [(e, start[e] + row) for e in range(E) for row in range(0, int(counts[e]), tile)]
    for few in {0, triton_order._FEW}:
        with mock.patch.object(triton_order, "_FEW", few):
            order = read_order(order_rows(idx_TK, E, tile), num_slots, E)
        assert order.slot_S[:num_rows].tolist() == slot[:num_rows].tolist()
        assert order.place_S.tolist() == place.tolist()
        assert order.start_E.tolist() == start
        assert int(order.num_tiles_1) == len(tiles) <= tiles_at_most(num_slots, E, tile)
        assert list(zip(order.expert_N.tolist(), order.row_N.tolist(), strict=True))[: len(tiles)] == tiles


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 40), st.sampled_from([16, 32]), st.integers(0, 3), st.integers(0, 2**31), st.booleans())
def test_order_is_a_stable_sort(T, K, E, tile, beyond, seed, narrow):
    idx = torch.randint(E + beyond, (T, K), generator=torch.Generator().manual_seed(seed))
    check_order(idx.int() if narrow else idx, E, tile)


@pytest.mark.parametrize("T, K, E, many", [(300, 1, 3, 1 << 15), (130, 2, 130, 1 << 15), (1, 1, 1, 1 << 15), (1100, 1, 6, 1000)])
def test_order_over_several_blocks(T, K, E, many, monkeypatch):
    monkeypatch.setattr(triton_order, "_MANY", many)
    g = torch.Generator().manual_seed(T)
    check_order((torch.rand(T, K, generator=g) ** 3 * E).long(), E, 128)


@pytest.mark.parametrize("fill", [0, 5, 99, -1])
def test_order_of_equal_ids(fill):
    check_order(torch.full((50, 3), fill), 6, 16)


def test_order_of_ids_in_any_layout():
    check_order(torch.arange(12).view(3, 4).t() % 5, 5, 16)


@pytest.mark.parametrize("num_slots, E, tile", [(0, 8, 16), (1, 1, 16), (5, 8, 128), (8, 8, 16), (1000, 8, 128)])
def test_bound_of_tiles_is_tight(num_slots, E, tile):
    """The worst routing gives every expert one row and one of them the rest."""
    filled = min(E, num_slots)
    worst = filled - 1 + triton_launch.blocks(num_slots - filled + 1, tile) if filled else 0
    assert worst <= tiles_at_most(num_slots, E, tile) and (num_slots < E or worst == tiles_at_most(num_slots, E, tile))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("T, E, k", [(11, 7, 3), (5, 16, 1), (3, 4, 4)])
def test_route_against_eager(T, E, k, biased, renormalise, score):
    g = torch.Generator().manual_seed(T)
    logits = torch.randn(T, E, generator=g, requires_grad=True)
    bias = torch.randn(E, generator=g) if biased else None
    kwargs = dict(renormalise=renormalise, score=score, bias_E=bias, scale=2.5)
    idx, weight = route(logits, k, backend="triton", **kwargs)
    want_idx, want = route(logits, k, backend="eager", **kwargs)
    assert torch.equal(idx, want_idx) and idx.dtype == torch.int64
    torch.testing.assert_close(weight, want)
    d = torch.randn(T, k, generator=g)
    torch.testing.assert_close(torch.autograd.grad(weight, logits, d), torch.autograd.grad(want, logits, d))


def test_route_ties_go_to_the_lowest_id():
    idx, weight = route(torch.zeros(3, 6), 4, backend="triton")
    assert idx.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weight, torch.full((3, 4), 0.25))


def test_route_takes_infinite_and_missing_numbers():
    inf, nan = float("inf"), float("nan")
    idx, weight = route(torch.tensor([[-inf, 0.0, -inf, -1.0], [0.0, nan, 1.0, 2.0]]), 3, backend="triton")
    assert idx.tolist() == [[1, 3, 0], [1, 3, 2]]
    torch.testing.assert_close(weight[0], torch.tensor([0.0, -1.0, -inf]).softmax(-1))
    assert weight[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_route_in_16_bit_and_strided(dtype):
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(3)).to(dtype).t().requires_grad_()
    (idx, weight), (want_idx, want) = (route(logits, 2, backend=b) for b in ("triton", "eager"))
    assert torch.equal(idx, want_idx) and weight.dtype == torch.float32
    torch.testing.assert_close(weight, want)
    assert torch.autograd.grad(weight[:, 0].sum(), logits)[0].dtype == dtype


def test_route_without_tokens_and_refusals():
    idx, weight = route(torch.zeros(0, 4), 2, backend="triton")
    assert idx.shape == weight.shape == (0, 2)
    with pytest.raises(ValueError, match="computes in float32; for float64 logits use backend='eager'"):
        route(torch.zeros(2, 4, dtype=torch.float64), 2, backend="triton")


def test_opcheck():
    logits = torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.dyn.route_triton.default, (logits, torch.randn(4), 2, False, 2.0, False))
