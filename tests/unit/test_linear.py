"""`routed_linear` and its partial form do what their docstrings say: edges, dtypes, autocast, compile, memory, refusals. Values: tests/parity."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dyn.ops import linear as module
from dyn.ops.experts import routed_linear
from dyn.ops.linear import partial_routed_linear, score_matrix

BACKENDS = list(module._BACKENDS)


def problem(T=10, I=6, O=4, E=5, K=2, dtype=torch.float32, ids=None):
    """x, weight, idx, scores, bias; the floating ones are leaves."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in ((T, I), (E, O, I), (E, O)))
    idx = torch.randint(ids or E, (T, K), generator=g)
    scores = torch.rand(T, K, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return [x, weight, idx, scores, bias]


def floating(args):
    return [t for t in args if t.is_floating_point()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    weight, bias = torch.tensor([[[3.0]], [[0.5]]], dtype=torch.float64), torch.tensor([[1.0], [-4.0]], dtype=torch.float64)
    scores = torch.tensor([[0.75, 0.25], [2.0, 9.0]], dtype=torch.float64)
    y = routed_linear(x, weight, torch.tensor([[1, 0], [0, 7]]), scores, bias, backend)  # the id 7 stands for no expert
    torch.testing.assert_close(y, torch.tensor([[0.75 * (1 - 4) + 0.25 * (6 + 1)], [2 * (-3 + 1)]], dtype=torch.float64), rtol=1e-14, atol=0)


def test_score_matrix():
    scores = torch.tensor([[0.5, 0.25, 4.0]], requires_grad=True)
    P = score_matrix(torch.tensor([[2, 2, 3]], dtype=torch.int32), scores, 3, torch.float32)
    assert P.tolist() == [[0, 0, 0.75]]
    assert torch.autograd.grad(P.sum(), scores)[0].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, ids", [(0, None), (4, "none"), (1, None)])
def test_few_or_no_rows(backend, T, ids):
    args = problem(T=T)
    if ids == "none":
        args[2].fill_(5)
    y = routed_linear(*args, backend=backend)
    grads = torch.autograd.grad(y.sum(), floating(args))
    assert [g.shape for g in grads] == [t.shape for t in floating(args)]
    if T == 0 or ids == "none":
        assert all((t == 0).all() for t in (y, *grads))
    else:
        assert (y != 0).all() and all((g != 0).any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_ids_raise(backend):
    args = problem()
    args[2][2, 1] = -3
    with pytest.raises(ValueError, match="routed_linear: idx holds -3"):
        routed_linear(*args, backend=backend)


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(10, 5), r"needs x \[T, I\] and weight_EOI \[E, O, I\]; got x float32 \[10, 5\] on cpu, weight_EOI float32 \[5, 4, 6\]"),
    (0, torch.zeros(10, 6, dtype=torch.bfloat16), "x, weight_EOI and bias_EO must share a dtype; got x bfloat16 .* weight_EOI float32"),
    (0, torch.zeros(10, 6, dtype=torch.int64), "must be float64, float32, bfloat16 or float16; got x int64"),
    (1, torch.zeros(5, 4), r"needs x \[T, I\]"),
    (2, torch.zeros(10, 3, dtype=torch.int64), r"needs idx and weight of one shape \[T, K\] with T=10 and K >= 1; got .* idx int64 \[10, 3\]"),
    (2, torch.zeros(10, 2), "routed_linear: idx must be int32 or int64; got .* idx float32"),
    (3, torch.zeros(10, 2, dtype=torch.int64), "must be float64, float32, bfloat16 or float16; got .* weight int64"),
    (0, torch.zeros(10, 6, dtype=torch.complex64), "got x complex64"),
    (4, torch.zeros(4), r"bias_EO must be \[5, 4\]; got .* bias_EO float32 \[4\]"),
])
def test_refuses(place, value, message):
    args = problem()
    args[place] = value
    with pytest.raises(ValueError, match=message):
        routed_linear(*args)


@pytest.mark.parametrize("place", range(5))
def test_tensors_on_two_devices_are_refused(place):
    args = problem()
    args[place] = args[place].to("meta")
    with pytest.raises(ValueError, match=r"routed_linear: all tensors must be on one device; got x .* on (cpu|meta)"):
        routed_linear(*args)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' of routed_linear is unknown; allowed: auto, eager, torch"):
        routed_linear(*problem(), backend="cuda")


def test_auto_says_once_what_it_picked(caplog, monkeypatch):
    monkeypatch.setattr(module, "_logged", set())
    with caplog.at_level(logging.INFO, logger="dyn.ops.linear"):
        routed_linear(*problem())
        routed_linear(*problem())
    assert [r.message for r in caplog.records] == ["routed_linear: backend=auto picked torch on cpu"]


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    x, weight, idx, scores, b = problem(T=5, I=3, O=2, E=4, dtype=torch.float64, ids=6)
    torch.autograd.gradcheck(lambda *a: routed_linear(a[0], a[1], idx, a[2], a[3] if bias else None, "torch"), (x, weight, scores, b)[: 4 if bias else 3])


def test_opcheck_forward():
    torch.library.opcheck(torch.ops.dyn.routed_linear.default, tuple(problem()[:4]))


@pytest.mark.parametrize("T", [10, 512])  # 512: padded
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_opcheck_backward(T, needs):
    args = [t.detach() for t in problem(T=T, ids=7)[:4]]
    y, ends, slots = torch.ops.dyn.routed_linear(*args)
    torch.library.opcheck(torch.ops.dyn.routed_linear_backward.default, (torch.ones_like(y), *args, ends, slots, *needs))


@pytest.mark.parametrize("wanted", [[0], [1], [3], [4], [0, 3]])
def test_only_the_gradients_asked_for(wanted):
    args = problem(T=20)
    everything = torch.autograd.grad(routed_linear(*args).sin().sum(), floating(args))
    want = dict(zip((0, 1, 3, 4), everything, strict=True))
    some = [t.detach() for t in args]
    for i in wanted:
        some[i].requires_grad_()
    got = torch.autograd.grad(routed_linear(*some).sin().sum(), [some[i] for i in wanted])
    for i, g in zip(wanted, got, strict=True):
        torch.testing.assert_close(g, want[i])


def test_nothing_but_indices_is_kept():
    """Beside x, weights, ids and scores: the rows' order and the experts' ends. The bias adds the matrix of scores."""
    args = problem(T=200)
    given = {t.untyped_storage().data_ptr() for t in args}
    for bias, most in ((None, 200 * 2 * 8 + 6 * 4), (args[4], 200 * 2 * 8 + 6 * 4 + 200 * 6 * 4 + 200 * 2 * 8)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1],
                                                      lambda t: t):
            y = routed_linear(*args[:4], bias)
        assert sum(size for place, size in kept.items() if place not in given) <= most
        del y


def test_results_are_bitwise_repeatable():
    runs = []
    for _ in range(2):
        args = problem(T=999)
        y = routed_linear(*args)
        runs.append((y, *torch.autograd.grad(y.sin().sum(), floating(args))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_int32_ids_and_expanded_gradients(backend):
    x, weight, idx, scores, bias = problem()
    views = [x.detach().t().contiguous().t(), weight.detach().transpose(1, 2).contiguous().transpose(1, 2), bias.detach().t().contiguous().t()]
    strided = [v.requires_grad_() for v in views]
    plain = routed_linear(x, weight, idx, scores, bias, backend)
    other = routed_linear(strided[0], strided[1], idx.int(), scores, strided[2], backend)
    torch.testing.assert_close(plain, other)
    for a, b in zip(torch.autograd.grad(plain.sum(), (x, weight, bias)), torch.autograd.grad(other.sum(), strided), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    args = problem(T=40, I=16, O=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_linear(*args, backend=backend)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), floating(args))
    exact = problem(T=40, I=16, O=8, dtype=torch.float64)
    z = routed_linear(*exact, backend="eager")
    for got, want in zip((y, *grads), (z, *torch.autograd.grad(z.square().sum(), floating(exact))), strict=True):
        assert got is y or got.dtype == torch.float32
        assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(routed_linear, fullgraph=True, backend="aot_eager")
    for T in (10, 17, 23):
        args = problem(T=T)
        y, z = routed_linear(*args), compiled(*args)
        torch.testing.assert_close(y, z)
        for a, b in zip(torch.autograd.grad(y.sin().sum(), floating(args)), torch.autograd.grad(z.sin().sum(), floating(args)), strict=True):
            torch.testing.assert_close(a, b)


def test_shapes_without_data():
    y = routed_linear(*(t.to("meta") for t in problem()))
    assert y.shape == (10, 4) and y.is_meta


@pytest.mark.parametrize("kwargs, message", [
    (dict(mask_OI=torch.zeros(4, 6)), r"a bool mask \[O, I\]; got .* mask float32 \[4, 6\]"),
    (dict(mask_OI=torch.zeros(3, 6, dtype=torch.bool)), r"mask bool \[3, 6\]"),
    (dict(static_OI=torch.zeros(4, 5)), r"got .* static float32 \[4, 5\]"),
    (dict(mask_OI=torch.ones(4, 6, dtype=torch.bool, device="meta")), "one device; got .* mask bool .* on meta"),
    (dict(static_OI=torch.zeros(4, 6, device="meta")), "one device; got .* static float32 .* on meta"),
    (dict(x_TI=torch.zeros(10, 13)), r"needs x \[T, I\], dynamic .*; got x float32 \[10, 13\]"),
    (dict(bias_EO=torch.zeros(5, 20)), r"got .* bias float32 \[5, 20\]"),
    (dict(bias_EO=torch.zeros(3, 4)), r"got .* bias float32 \[3, 4\]"),
    (dict(bias_EO=torch.zeros(5, 4, dtype=torch.float64)), "share a dtype; got .* bias float64"),
    (dict(static_OI=torch.zeros(4, 6, dtype=torch.float64)), "share a dtype; got .* static float64"),
    (dict(dynamic_scale=torch.ones(6)), r"dynamic_scale must be one number; got dynamic_scale float32 \[6\]"),
    (dict(form="sparse"), "form='sparse' of partial_routed_linear is unknown; allowed: merged, factorised"),
])
def test_partial_refuses(kwargs, message):
    x, weight, idx, scores, bias = problem()
    given = dict(x_TI=x, dynamic_EOI=weight, static_OI=weight[0], mask_OI=torch.ones(4, 6, dtype=torch.bool), idx_TK=idx, weight_TK=scores, bias_EO=bias)
    with pytest.raises(ValueError, match=message):
        partial_routed_linear(**given | kwargs)


def test_routed_linear_needs_an_expert():
    x, weight, idx, scores, bias = problem()
    with pytest.raises(ValueError, match=r"needs an expert at least; got .* weight_EOI float32 \[0, 4, 6\]"):
        routed_linear(x, weight[:0], idx, scores, bias[:0])


def test_no_tokens_in_a_new_thread():
    """The rows' memory is a thread's own; its first call may need none."""
    x, weight, idx, scores = torch.zeros(0, 3), torch.zeros(2, 4, 3), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(routed_linear, x, weight, idx, scores).result().shape == (0, 4)


def test_scales_keep_their_digits():
    """Numbers as scales are not rounded to float32 on the way into float64 weights."""
    x, dynamic, static = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for mask, expected in ((True, 0.6), (False, 1.4)):
        y = partial_routed_linear(x, dynamic, static, torch.full((1, 1), mask), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64),
                                  dynamic_scale=0.6, static_scale=1.4)
        assert y.item() == expected


def test_scores_of_less_precision_are_summed_in_that_of_x():
    x, weight, idx, scores, bias = problem(dtype=torch.float64)
    idx, scores = idx[:, :1].expand(-1, 3), torch.rand(10, 3).detach()  # one expert three times
    want = routed_linear(x, weight, idx, scores.double(), bias)
    torch.testing.assert_close(routed_linear(x, weight, idx, scores, bias), want, rtol=1e-14, atol=1e-14)
    mask = torch.rand(weight.shape[1:]) < 0.5
    merged, factorised = (partial_routed_linear(x, weight, weight[0], mask, idx, scores, bias, form=form) for form in ("merged", "factorised"))
    torch.testing.assert_close(factorised, merged, rtol=1e-14, atol=1e-14)
