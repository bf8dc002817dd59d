"""`experts` on Triton's interpreter against the eager reference in float64: every kernel, in float32 and float16.

bfloat16 is left out: the interpreter computes on its bit patterns as if they were integers. tests/gpu has it.
"""

from __future__ import annotations

import pytest
import torch

from dyn.ops import triton_config, triton_experts, triton_few, triton_launch
from dyn.ops.experts import experts
from dyn.ops.route import route

pytestmark = pytest.mark.skipif(not triton_launch.interpreted(), reason="needs TRITON_INTERPRET=1 from the start of the process")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # relative, by norm
NAMES = ("y", "dx", "dgate_up", "ddown", "dweight")
# T, D, F, E, K. Multiples of 8 let weights be read by descriptor in either dtype; odd sizes go through pointers.
SHAPES = [(33, 13, 7, 5, 3), (20, 24, 16, 4, 2), (7, 6, 5, 1, 1), (12, 8, 86, 3, 2), (4, 16, 8, 9, 9)]


def problem(T, D, F, E, K, dtype=torch.float32, routing="uniform"):
    """Leaves x, gate_up, down, weight (float32) with weights of a trained network's scale, and ids."""
    g = torch.Generator().manual_seed(T + 31 * E)
    x, gate_up, down = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, D), (E, 2 * F, D), (E, D, F)))
    logits = torch.randn(T, E, generator=g, dtype=torch.float64)
    if routing == "skewed":  # nearly all tokens take the first experts, others stay empty
        logits -= 4 * torch.arange(E)
    idx, weight = route(logits, K, backend="eager")
    if routing == "sentinels":
        idx = torch.where(torch.rand(T, K, generator=g) < 0.4, E + torch.randint(3, (T, K), generator=g), idx)
    leaves = [x.to(dtype), (gate_up / D**0.5).to(dtype), (down / F**0.5).to(dtype), weight.float()]
    return [t.requires_grad_() for t in leaves], idx


def outputs_and_gradients(leaves, idx, backend="triton", wanted=None, **kwargs):
    x, gate_up, down, weight = leaves
    y = experts(x, gate_up, down, idx, weight, backend, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return y, *torch.autograd.grad(y, leaves if wanted is None else wanted, dy.to(y.dtype))


def reference(leaves, idx):
    return outputs_and_gradients([t.detach().double().requires_grad_() for t in leaves], idx, "eager")


def assert_near(got, want, tolerance, names=NAMES):
    for name, a, b in zip(names, got, want, strict=True):
        error, size = (a.double() - b).norm().item(), b.norm().item()
        assert error <= tolerance * size + 1e-12, f"{name}: relative error {error / max(size, 1e-30):.2g} over {tolerance}"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape, routing", [(s, "uniform") for s in SHAPES] + [(s, r) for s in SHAPES[:2] for r in ("skewed", "sentinels")], ids=str)
def test_against_eager(shape, routing, dtype):
    leaves, idx = problem(*shape, dtype, routing)
    got = outputs_and_gradients(leaves, idx)
    assert [t.dtype for t in got] == [dtype] + [t.dtype for t in leaves]
    assert_near(got, reference(leaves, idx), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 530, 20, 3, 2), (3, 20, 530, 3, 2)], ids=str)
def test_few_tokens_without_gradients(shape, routing, dtype, monkeypatch):
    """The two kernels without an order of rows, and the ordered ones that would run were there more slots."""
    leaves, idx = problem(*shape, dtype, routing)
    x, gate_up, down, weight = (t.detach() for t in leaves)
    views = gate_up.transpose(1, 2).contiguous().transpose(1, 2), down.transpose(1, 2).contiguous().transpose(1, 2)
    want = reference(leaves, idx)[:1]
    for few in (True, False):
        monkeypatch.setattr(triton_experts, "is_few", lambda *a, few=few: few)
        assert_near([experts(x, gate_up, down, idx, weight, "triton")], want, TOLERANCE[dtype], NAMES[:1])
    assert_near([triton_few.few_experts(x.t().contiguous().t(), *views, idx.int(), weight)], want, TOLERANCE[dtype], NAMES[:1])


def test_how_many_are_few():
    small, large = torch.empty(8, 576, 192, device="meta"), torch.empty(8, 4096, 14336, device="meta")
    assert [triton_few.is_few(n, small) for n in (16, 200, 202, 4096)] == [True, True, True, False]
    assert [triton_few.is_few(n, large) for n in (16, 17)] == [True, False]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("described", [True, False])
def test_both_ways_to_read_weights(described, dtype, monkeypatch):
    """The same shape by tensor descriptor and, as on devices without them, through pointers."""
    used = []
    monkeypatch.setattr(triton_launch, "has_descriptors", lambda device: described)
    from triton.tools import tensor_descriptor

    made = tensor_descriptor.TensorDescriptor
    monkeypatch.setattr(tensor_descriptor, "TensorDescriptor", lambda *a: (used.append(a), made(*a))[1])
    leaves, idx = problem(16, 40, 24, 2, 2, dtype)
    assert_near(outputs_and_gradients(leaves, idx), reference(leaves, idx), TOLERANCE[dtype])
    # Gate-up, down and its rows, the down projection's backward, gate-up's and its rows; 16-bit rows of the weights' gradients.
    assert len(used) == ((8 if dtype == torch.float16 else 6) if described else 0)


# block_m, block_n, block_k, warps, stages; the table's 16-bit tiles are too large for the interpreter to be quick.
@pytest.mark.parametrize("tile, config", [
    (32, triton_config.Config(16, 32, 16, 4, 2, group_m=2)), (32, triton_config.Config(32, 64, 16, 4, 2)), (64, triton_config.Config(32, 128, 32, 4, 2)),
], ids=str)
def test_tiles(tile, config, monkeypatch):
    """Row tiles that products cut, groups of tiles that do not divide, epilogues on the whole tile and in quarters."""
    monkeypatch.setattr(triton_config, "table", lambda *a: config)
    monkeypatch.setattr(triton_experts, "row_tile", lambda *a: tile)
    leaves, idx = problem(34, 24, 40, 2, 2)
    assert_near(outputs_and_gradients(leaves, idx), reference(leaves, idx), TOLERANCE[torch.float32])


def test_the_table_s_own_tiles_for_16_bit():
    leaves, idx = problem(260, 16, 8, 2, 1, torch.float16)
    assert triton_config.row_tile(260, 2, torch.float16) == 128
    assert_near(outputs_and_gradients(leaves, idx), reference(leaves, idx), TOLERANCE[torch.float16])


def test_many_blocks_of_slots():
    """More slots than one program counts and ranks."""
    leaves, idx = problem(140, 8, 4, 6, 2, routing="skewed")
    assert_near(outputs_and_gradients(leaves, idx), reference(leaves, idx), TOLERANCE[torch.float32])


@pytest.mark.parametrize("T, ids", [(0, None), (4, "none"), (1, None)])
def test_few_or_no_rows(T, ids):
    leaves, idx = problem(T, 6, 4, 5, 2)
    if ids == "none":
        idx.fill_(5)
    got = outputs_and_gradients(leaves, idx)
    assert [g.shape for g in got[1:]] == [t.shape for t in leaves]
    if T == 0 or ids == "none":
        assert all((t == 0).all() for t in got)
    else:
        assert_near(got, reference(leaves, idx), TOLERANCE[torch.float32])


def test_infinite_rows_stay_with_their_expert():
    """Tiles and sums over rows end inside the rows of one expert: what others hold, or nobody, does not leak through 0 * inf."""
    leaves, idx = problem(30, 8, 8, 3, 1)
    with torch.no_grad():
        leaves[0][idx[:, 0] == 1] = float("inf")
    y, dx, dgate_up, ddown, dweight = outputs_and_gradients(leaves, idx)
    finite = idx[:, 0] != 1
    assert all(t[finite].isfinite().all() for t in (y, dx, dweight)) and all(t[[0, 2]].isfinite().all() for t in (dgate_up, ddown))
    assert not y[~finite].isfinite().any()


@pytest.mark.parametrize("T", [2, 40], ids=["few", "many"])
def test_a_score_of_no_expert_counts_for_nothing(T, monkeypatch):
    monkeypatch.setattr(triton_few, "_REREAD", 0)
    leaves, idx = problem(T, 6, 5, 3, 2)
    leaves, idx[0, 0] = [t.detach() for t in leaves], 7
    assert triton_few.is_few(idx.numel(), leaves[2]) == (T == 2)
    without = experts(*leaves[:3], idx, leaves[3], "triton")
    leaves[3][0, 0] = torch.nan
    y = experts(*leaves[:3], idx, leaves[3], "triton")
    assert torch.equal(y, without) and y.isfinite().all()


@pytest.mark.parametrize("D, F", [(24, 16), (13, 7)])
def test_strided_views_and_int32_ids(D, F):
    leaves, idx = problem(14, D, F, 2, 2)
    x, gate_up, down, weight = (t.detach() for t in leaves)
    views = [t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in (x, gate_up, down)] + [weight.t().contiguous().t().requires_grad_()]
    parts = torch.zeros(2, D, 2 * F + 8), torch.zeros(2, 2 * F + 3, D + 8)
    padded = [x.requires_grad_(), parts[1][:, 3:, :D].copy_(gate_up).requires_grad_(), parts[0][:, :, 8 : F + 8].copy_(down).requires_grad_(), weight]
    assert not any(t.is_contiguous() for t in views)
    want = reference(leaves, idx)
    assert_near(outputs_and_gradients(views, idx.int()), want, TOLERANCE[torch.float32])
    assert_near(outputs_and_gradients(padded, idx, wanted=padded[:3]), want[:4], TOLERANCE[torch.float32], NAMES[:4])


@pytest.mark.parametrize(("T", "K", "view"), [(9, 1, lambda ids: ids.repeat(1, 2)[:, :1]), (1, 3, lambda ids: torch.stack([ids, ids + 1], 2)[..., 0]),
                                              (9, 1, lambda ids: ids[:1].expand_as(ids))])
def test_ids_of_any_strides(T, K, view):
    leaves, idx = problem(T, 8, 4, 4, K)
    ids = view(idx)
    assert ids.flatten().stride() != (1,)  # one column or row is flattened without a copy
    assert_near(outputs_and_gradients(leaves, ids), reference(leaves, ids.contiguous()), TOLERANCE[torch.float32])


def test_an_expanded_gradient():
    leaves, idx = problem(20, 12, 8, 4, 2)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    x, gate_up, down, weight = leaves
    got = torch.autograd.grad(experts(x, gate_up, down, idx, weight, "triton").sum(), leaves)
    x, gate_up, down, weight = exact
    want = torch.autograd.grad(experts(x, gate_up, down, idx, weight, "eager").sum(), exact)
    assert_near(got, want, TOLERANCE[torch.float32], NAMES[1:])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_recompute_is_bitwise_the_same_and_keeps_less(dtype):
    kept, results = {}, {}
    for recompute in (False, True):
        leaves, idx = problem(15, 12, 8, 3, 2, dtype, "sentinels")
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            x, gate_up, down, weight = leaves
            y = experts(x, gate_up, down, idx, weight, "triton", recompute)
        kept[recompute] = sum(sizes)
        results[recompute] = y, *torch.autograd.grad(y.float().sin().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
    assert kept[False] - kept[True] == 15 * 2 * 2 * 8  # the pre-activations [S, 2F] and nothing else


def test_what_backward_keeps():
    """x, weights, ids, pre-activations, and at most 16 bytes a row of order."""
    leaves, idx = problem(300, 8, 4, 3, 2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.dtype, t.numel())), t)[1], lambda t: t):
        experts(leaves[0], leaves[1], leaves[2], idx, leaves[3], "triton")
    assert sum(n for dtype, n in sizes if dtype == torch.int32) * 4 <= 16 * 600
    assert sum(n for dtype, n in sizes if dtype.is_floating_point) == sum(t.numel() for t in leaves) + 600 * 2 * 4


def test_results_are_bitwise_repeatable():
    runs = [outputs_and_gradients(*problem(25, 12, 20, 2, 2, torch.float16)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3), (0, 2)])
def test_only_what_requires_grad_gets_one(wanted):
    leaves, idx = problem(6, 8, 4, 2, 2)
    want = outputs_and_gradients(leaves, idx)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    got = outputs_and_gradients(leaves, idx, wanted=[leaves[i] for i in wanted])
    assert all(torch.equal(a, want[i + 1]) for i, a in zip(wanted, got[1:], strict=True))
    with torch.no_grad():
        torch.testing.assert_close(experts(leaves[0], leaves[1], leaves[2], idx, leaves[3], "triton"), want[0])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_forward(keep):
    leaves, idx = problem(5, 6, 4, 2, 2)
    args = (*leaves[:3], idx, leaves[3], keep)
    torch.library.opcheck(torch.ops.dyn.experts_triton.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("need_x, need_gate_up, need_down", [(True, True, True), (False, False, False)])
def test_opcheck_backward(need_x, need_gate_up, need_down):
    leaves, idx = problem(5, 6, 4, 2, 2)
    args = [t.detach() for t in (*leaves[:3], idx, leaves[3])]
    y, pre, order = torch.ops.dyn.experts_triton(*args, True)
    torch.library.opcheck(torch.ops.dyn.experts_triton_backward.default, (torch.ones_like(y), *args, pre, order, need_x, need_gate_up, need_down))


def test_compiles_into_one_graph():
    """Routing and experts without a graph break, also for another number of tokens."""
    torch._dynamo.reset()

    def layer(x, gate_up, down, logits):
        return experts(x, gate_up, down, *route(logits, 2, backend="triton"), backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9):
        (x, gate_up, down, _), _ = problem(T, 6, 4, 3, 2)
        logits = torch.randn(T, 3, generator=torch.Generator().manual_seed(T), requires_grad=True)
        leaves = (x, gate_up, down, logits)
        y, z = layer(*leaves), compiled(*leaves)
        torch.testing.assert_close(y, z)
        for a, b in zip(torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(z.sin().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_refusals():
    leaves, idx = problem(4, 6, 4, 3, 2)
    x, gate_up, down, weight = (t.detach() for t in leaves)
    with pytest.raises(ValueError, match=r"takes torch.float32, .*; got x float64"):
        experts(x.double(), gate_up.double(), down.double(), idx, weight, "triton")
    idx[2, 1] = -3
    with pytest.raises(ValueError, match="idx holds -3"):
        experts(x, gate_up, down, idx, weight, "triton")
