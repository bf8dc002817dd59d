"""The ops do what their docstrings say: edges, dtypes, autocast, compile, memory, refusals. Values: tests/parity."""

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dyn.ops import experts as experts_module
from dyn.ops import rows
from dyn.ops.experts import experts, routed_linear
from dyn.ops.route import route

BACKENDS = [name for name in experts_module._BACKENDS if name != "triton"]  # which has tests/interpreter and tests/gpu


def problem(T=10, D=6, F=4, E=5, K=2, dtype=torch.float32, ids=None):
    """x, gate_up, down, idx, weight; the floating ones are leaves."""
    g = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((T, D), (E, 2 * F, D), (E, D, F)))
    idx = torch.randint(ids or E, (T, K), generator=g)
    weight = torch.rand(T, K, generator=g, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [t.requires_grad_() for t in (x, gate_up, down)] + [idx, weight.requires_grad_()]


def floating(args):
    return [t for t in args if t.is_floating_point()]


# route ------------------------------------------------------------------------------------------------------------------


def test_route_by_hand():
    idx, weight = route(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, -1.0]]), 2)
    assert idx.tolist() == [[1, 2], [0, 1]] and idx.dtype == torch.int64
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.0], [3.0, 0.0]]).softmax(-1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_scores(score, renormalise):
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    idx, weight = route(logits, 3, score=score, renormalise=renormalise, scale=2.5)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expected, order = scores.sort(descending=True)
    expected = expected[:, :3]
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(idx, order[:, :3])
    torch.testing.assert_close(weight, 2.5 * expected)


def test_route_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[1.0, 0.9, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 5.0], requires_grad=True)
    idx, weight = route(logits, 2, bias_E=bias)
    assert idx.tolist() == [[2, 0]]
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.0]]).softmax(-1))
    weight[0, 0].backward()
    assert bias.grad is None and logits.grad[0, 1] == 0 and logits.grad[0, 0] < 0


@pytest.mark.parametrize("dtype, out", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_route_dtypes(dtype, out):
    assert route(torch.randn(3, 4).to(dtype), 2)[1].dtype == out


def test_route_orders_experts_whose_probability_underflows():
    idx, weight = route(torch.tensor([[-500.0, 0.0, -400.0, -300.0]]), 4)
    assert idx.tolist() == [[1, 3, 2, 0]] and weight.isfinite().all()


def test_route_without_tokens():
    idx, weight = route(torch.zeros(0, 4), 2)
    assert idx.shape == weight.shape == (0, 2)


@pytest.mark.parametrize("kwargs, message", [
    (dict(k=5), "k=5 with 4 experts; allowed: 1 to 4"),
    (dict(k=0), "k=0 with 4 experts; allowed: 1 to 4"),
    (dict(k=2.0), "k=2.0 with 4 experts"), (dict(k=True), "k=True with 4 experts"),
    (dict(k=1, score="tanh"), "score='tanh' is unknown; allowed: softmax, sigmoid"),
    (dict(k=1, backend="cuda"), "backend='cuda' of route is unknown; allowed: auto, eager"),
    (dict(k=1, bias_E=torch.zeros(3)), r"bias_E must be \[4\]; got logits float32 \[2, 4\] on cpu, bias_E float32 \[3\]"),
    (dict(k=1, logits_TE=torch.zeros(2, 3, 4)), r"floating logits \[T, E\]; got logits float32 \[2, 3, 4\]"),
    (dict(k=1, logits_TE=torch.zeros(2, 4, dtype=torch.int64)), r"floating logits \[T, E\]; got logits int64"),
    (dict(k=1, bias_E=torch.zeros(4, device="meta")), "one device; got logits .* on cpu, bias_E .* on meta"),
])
def test_route_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        route(**{"logits_TE": torch.zeros(2, 4)} | kwargs)


# experts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_by_hand(backend):
    """One hidden unit, one neuron an expert: E_e(x) = silu(g x) * u x * d."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    gate_up = torch.tensor([[[1.0], [3.0]], [[0.5], [-2.0]]], dtype=torch.float64)
    down = torch.tensor([[[0.25]], [[4.0]]], dtype=torch.float64)
    y = experts(x, gate_up, down, torch.tensor([[1, 0], [0, 7]]), torch.tensor([[0.75, 0.25], [2.0, 9.0]], dtype=torch.float64), backend)
    silu = torch.nn.functional.silu
    first = 0.75 * silu(0.5 * x[0]) * -2 * x[0] * 4 + 0.25 * silu(x[0]) * 3 * x[0] * 0.25
    second = 2 * silu(x[1]) * 3 * x[1] * 0.25  # the id 7 stands for no expert
    torch.testing.assert_close(y, torch.stack([first, second]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, ids", [(0, None), (4, "none"), (1, None)])
def test_few_or_no_rows(backend, T, ids):
    args = problem(T=T)
    if ids == "none":
        args[3].fill_(5)
    y = experts(*args, backend=backend)
    grads = torch.autograd.grad(y.sum(), floating(args))
    assert [g.shape for g in grads] == [t.shape for t in floating(args)]
    if T == 0 or ids == "none":
        assert all((t == 0).all() for t in (y, *grads))
    else:
        assert (y != 0).all() and all((g != 0).any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_ids_raise(backend):
    args = problem()
    args[3][2, 1] = -3
    with pytest.raises(ValueError, match="idx holds -3"):
        experts(*args, backend=backend)


@pytest.mark.parametrize("fail", [
    lambda args: args[3].fill_(-1),
    lambda args: args.append("cuda"),
    lambda args: args.append("triton"),
], ids=["negative id", "no such backend", "a backend that cannot run"])
def test_errors_name_all_shapes(fail, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = problem()
    fail(args)
    shapes = r"x float32 \[10, 6\] on cpu, gate_up .* \[5, 8, 6\] .*, down .* \[5, 6, 4\] .*, idx int64 \[10, 2\] .*, weight float32 \[10, 2\]"
    with pytest.raises(ValueError, match=shapes):
        experts(*args)


@pytest.mark.parametrize("default", [lambda: torch.device("meta"), lambda: default_dtype(torch.float64)], ids=["device", "dtype"])
def test_defaults_of_torch_change_nothing(default, monkeypatch):
    """They are settings of the caller's for his own tensors, and what a first call under them keeps is used by all later ones."""
    monkeypatch.setattr(rows, "Path", lambda name: Path(name + " of another vendor's CPU"))
    monkeypatch.setattr(rows.platform, "processor", lambda: "")
    x, gate_up, down, idx, weight = problem(T=400)
    pays, plain = rows._onednn_pays.__wrapped__(), experts(x, gate_up, down, idx, weight)
    with ThreadPoolExecutor(1) as pool:  # a thread has its own memory

        def run():
            with default():
                assert rows._onednn_pays.__wrapped__() == pays
                return experts(x, gate_up, down, idx, weight)

        assert torch.equal(pool.submit(run).result(), plain)
        assert torch.equal(pool.submit(experts, x, gate_up, down, idx, weight).result(), plain)
    with torch.no_grad():
        few = problem(T=3)
        plain = experts(*few)
        with default():
            assert torch.equal(experts(*few), plain)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", [experts, routed_linear])
def test_exports_for_any_number_of_tokens(op, strict):
    """Padded rows and others in one graph."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, gate_up, down, *_ = problem()
            self.gate_up, self.down = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

        def forward(self, x, idx, weight):
            return op(x, *((self.gate_up, self.down) if op is experts else (self.gate_up,)), idx, weight)

    def some(T):
        x, *_, idx, weight = problem(T)
        return x.detach(), idx, weight.detach()

    any_number = ({0: torch.export.Dim("T", min=1, max=4096)},) * 3
    exported = torch.export.export(Module(), some(64), dynamic_shapes=any_number, strict=strict).module()
    for T in (1, 3, 700):
        assert (rows.row_block(some(T)[1], 5) > 1) == (T == 700)
        torch.testing.assert_close(exported(*some(T)), Module()(*some(T)))


def test_debug_in_a_graph():
    """Where nobody waits for the device: the graph itself looks."""
    args = [t.detach() for t in problem()]
    compiled = torch.compile(lambda *args: experts(*args, debug=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), experts(*args))
    args[3][1] = -2
    with pytest.raises((RuntimeError, ValueError), match=r"negative id|idx holds -2"):
        compiled(*args)


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(10, 6).to_sparse(), "takes dense tensors alone, got x torch.sparse_coo"),
    (0, torch.zeros(10, 6, dtype=torch.float8_e4m3fn), "must be float64, float32, bfloat16 or float16; got x float8_e4m3fn"),
    (0, torch.zeros(10, 5), r"gate_up must be \[5, 8, 6\] and x \[T, 6\]; got x float32 \[10, 5\] on cpu, gate_up float32 \[5, 8, 6\]"),
    (0, torch.zeros(2, 5, 6), r"needs x \[T, D\]"),
    (0, torch.zeros(10, 6, dtype=torch.bfloat16), r"must share a dtype; got x bfloat16 \[10, 6\] on cpu, gate_up float32"),
    (0, torch.zeros(10, 6, dtype=torch.int64), "must be float64, float32, bfloat16 or float16; got x int64"),
    (1, torch.zeros(5, 7, 6), r"gate_up must be \[5, 8, 6\]"),
    (2, torch.zeros(4, 6, 4), r"gate_up must be \[4, 8, 6\]"),
    (3, torch.zeros(10, 3, dtype=torch.int64), r"one shape \[T, K\] with T=10 and K >= 1; got .* idx int64 \[10, 3\] on cpu, weight float32 \[10, 2\]"),
    (3, torch.zeros(9, 2, dtype=torch.int64), "with T=10"),
    (3, torch.zeros(10, dtype=torch.int64), r"idx int64 \[10\]"),
    (3, torch.zeros(10, 2), "idx must be int32 or int64; got .* idx float32"),
    (4, torch.zeros(10, 2, dtype=torch.int64), "must be float64, float32, bfloat16 or float16; got .* weight int64"),
])
def test_experts_refuses(place, value, message):
    args = problem()
    args[place] = value
    for autocast in (False, True):
        if not (autocast and value.dtype == torch.bfloat16):  # which a linear layer takes too
            with pytest.raises(ValueError, match=message.replace("float32", r"(b?float\d\d)")), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                experts(*args)


def test_experts_needs_one():
    x, gate_up, down, idx, weight = problem()
    with pytest.raises(ValueError, match=r"needs an expert at least; .* down float32 \[0, 6, 4\]"):
        experts(x, gate_up[:0], down[:0], idx, weight)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("there", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2), (3, 4)])
def test_tensors_on_two_devices_are_refused(there, backend):
    args = [t.to("meta") if i in there else t for i, t in enumerate(problem())]
    with pytest.raises(ValueError, match=r"experts: all tensors must be on one device; got x .* on (cpu|meta), gate_up .* weight .* on (cpu|meta)"):
        experts(*args, backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' of experts is unknown; allowed: auto, eager, torch"):
        experts(*problem(), backend="cuda")


def test_auto_says_once_what_it_picked(caplog, monkeypatch):
    monkeypatch.setattr(experts_module, "_logged", set())
    with caplog.at_level(logging.INFO, logger="dyn.ops.experts"):
        experts(*problem())
        experts(*problem())
    assert [r.message for r in caplog.records] == ["experts: backend=auto picked torch on cpu"]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    x, gate_up, down, idx, weight = problem(T=5, D=3, F=2, E=4, dtype=torch.float64, ids=6)
    torch.autograd.gradcheck(lambda a, b, c, w: experts(a, b, c, idx, w, "torch", recompute), (x, gate_up, down, weight))


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_forward(keep):
    torch.library.opcheck(torch.ops.dyn.experts.default, (*problem(), keep))


@pytest.mark.parametrize("need_x, need_params", [(True, True), (False, True), (True, False)])
def test_opcheck_backward(need_x, need_params):
    args = [t.detach() for t in problem(ids=7)]
    y, kept, ends, order = torch.ops.dyn.experts(*args, True)
    torch.library.opcheck(torch.ops.dyn.experts_backward.default, (torch.ones_like(y), *args, kept, ends, order, need_x, need_params))


def test_recompute_is_bitwise_the_same_and_keeps_less():
    kept = {}
    results = {}
    for recompute in (False, True):
        args = problem(T=200, dtype=torch.bfloat16)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            y = experts(*args, recompute=recompute)
        kept[recompute] = sum(sizes)
        results[recompute] = y, *torch.autograd.grad(y.float().sin().sum(), floating(args))
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
    assert kept[False] - kept[True] == 200 * 2 * 8  # the pre-activations [S, 2F] and nothing else


def test_results_are_bitwise_repeatable():
    runs = []
    for _ in range(2):
        args = problem(T=99)
        y = experts(*args)
        runs.append((y, *torch.autograd.grad(y.sin().sum(), floating(args))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 7, 255, 256, 32767, 32768])
def test_rows_are_ordered_stably_whatever_the_number_of_experts(num_experts, dtype):
    """Also where ids are of no expert, far beyond what a short number holds."""
    generator = torch.Generator().manual_seed(num_experts)
    idx_TK = torch.randint(num_experts + 3, (97, 3), generator=generator).to(dtype)
    idx_TK[5] = torch.iinfo(dtype).max
    expert_S, slot_S = idx_TK.flatten().clamp(max=num_experts).sort(stable=True)
    ends_E, found_S = rows.arrange("experts", idx_TK, num_experts, {}, 1)
    routed = int((expert_S < num_experts).sum())
    assert torch.equal(found_S[found_S >= 0][:routed], slot_S[:routed])  # what has no expert stands behind, in any order
    counts = ends_E.diff(prepend=ends_E.new_zeros(1))
    if num_experts > 1:  # a single one has padding
        assert torch.equal(counts.long(), expert_S.bincount(minlength=num_experts)[:num_experts])
    assert ends_E.dtype == torch.int32 and found_S.dtype == torch.int64
    idx_TK[96, 2] = -1
    with pytest.raises(ValueError, match="experts: idx holds -1"):
        rows.arrange("experts", idx_TK, num_experts, {}, 1)


@pytest.mark.parametrize("row_cost", [1, 50_000, 1e12])
def test_padding_makes_neighbours_alike_with_rows_of_their_own(row_cost):
    generator = torch.Generator().manual_seed(0)
    idx_TK = torch.multinomial(torch.tensor([5.0, 6, 5, 0, 5, 1, 5, 5, 3]), 1500, True, generator=generator).view(-1, 3)  # the last is none of 8 experts
    ends_E, slot_S = rows.arrange("experts", idx_TK, 8, {}, row_cost)
    assert len(slot_S) == rows.rows_needed(idx_TK, 8) and not (ends_E % 32).any()
    expert = idx_TK.flatten()[torch.where(slot_S < 0, ~slot_S, slot_S)]
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    assert expert[: ends_E[-1]].tolist() == [e for e, size in enumerate(sizes) for _ in range(size)]
    assert torch.equal(slot_S[slot_S >= 0].sort().values, torch.arange(1500))
    least = [-(-n // 32) * 32 for n in idx_TK.flatten().bincount(minlength=8)[:8].tolist()]
    assert (sizes == least) == (row_cost == 1e12) and sizes[3] == 0
    assert all(0 <= size - n <= rows.CALL / row_cost for size, n in zip(sizes, least, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_several_experts_at_once_are_those_of_each(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(256, 24, generator=generator).to(dtype), torch.randn(256, 40, generator=generator).to(dtype)
    weight, ends, calls = torch.randn(6, 24, 40, generator=generator).to(dtype), [64, 128, 128, 160, 192, 256], []
    at_once, runs = rows._mm, rows._runs
    monkeypatch.setattr(rows, "_runs", lambda ends, batched: calls.append([(s.start, s.stop) for s, _ in runs(ends, batched)]) or runs(ends, batched))
    made = [(torch.full((256, 40), torch.nan, dtype=dtype), torch.full((6, 24, 40), torch.nan, dtype=dtype)) for _ in range(2)]
    for (product, outer), batched in zip(made, (True, False), strict=True):
        monkeypatch.setattr(rows, "_mm", lambda *_, batched=batched: nullcontext(batched))
        rows.products(left, weight, ends, product)
        rows.outer_products(left, right, ends, outer)
    assert calls[0] == calls[1] == [(0, 2), (2, 3), (3, 5), (5, 6)] and calls[2] == [(e, e + 1) for e in range(6)]
    torch.testing.assert_close(made[0], made[1])
    assert not made[0][1][2].any()
    for wide in (torch.float32, torch.float64, torch.bfloat16):
        with at_once(ends, left.to(wide)) as batched:
            assert batched == (wide == torch.bfloat16 or (wide == torch.float32 and rows._onednn_pays()))
        with at_once([60, 120, 256], left.to(wide)) as batched:  # a kernel for every number of rows is compiled
            assert not batched


def test_segments_do_not_change_results(monkeypatch):
    """However many experts the elementwise work takes at once."""
    results = []
    for size in (0, 300, 1 << 30):
        monkeypatch.setattr(rows, "_SEGMENT_BYTES", size)
        args = problem(T=60, ids=7, dtype=torch.float64)
        y = experts(*args)
        results.append((y, *torch.autograd.grad(y.sin().sum(), floating(args))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_inference_keeps_nothing():
    with torch.no_grad():
        y = experts(*problem())
    assert not y.requires_grad and y.grad_fn is None
    with torch.inference_mode():
        experts(*problem())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("through_all", [True, False])
def test_few_tokens_without_gradients(through_all, T, K, dtype, monkeypatch):
    """Through all experts or through their own alone."""
    assert experts_module._all_pay(T, K, problem(K=K)[2])  # tiny experts
    monkeypatch.setattr(experts_module, "_all_pay", lambda *_: through_all)
    for ids in (None, 9, 7):  # inside, some and all beyond the experts
        args = problem(T=T, K=K, dtype=dtype, ids=ids)
        if ids == 7:
            args[3] = torch.full((T, K), 7)
        args[1], args[2] = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in args[1:3])
        with torch.no_grad():
            y = experts(*args, backend="torch")
        tolerance = 2e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(y, experts(*args, backend="eager").detach(), rtol=tolerance, atol=tolerance)
    with torch.no_grad(), pytest.raises(ValueError, match="idx holds -1"):
        experts(*args[:3], torch.full((T, K), -1), args[4], backend="torch")


def test_few_tokens_meet_nothing_of_experts_that_they_did_not_choose():
    args = problem(T=3, K=2)
    args[3] = torch.tensor([[0, 1], [1, 9], [0, 9]])
    with torch.no_grad():
        args[1][2:] = float("inf")
        args[2][2:] = float("nan")
        assert experts_module._all_pay(3, 2, args[2])
        torch.testing.assert_close(experts(*args, backend="torch"), experts(*args, backend="eager"))


def test_all_experts_are_for_few_tokens_and_small_experts():
    def pays(T, K, E, D, F, dtype=torch.bfloat16):
        return experts_module._all_pay(T, K, torch.empty(E, D, F, dtype=dtype, device="meta"))

    assert pays(8, 16, 32, 576, 48) and pays(8, 4, 8, 576, 192) and pays(1, 16, 32, 576, 48)
    assert not pays(4096, 16, 32, 576, 48)  # many tokens
    assert not pays(8, 2, 8, 4096, 14336) and not pays(1, 8, 64, 1024, 256)  # large experts; most would not be read
    assert not pays(1, 4, 32, 576, 48) and not pays(2, 8, 128, 576, 48)  # few of many
    assert not pays(1, 16, 32, 576, 48, torch.float16)  # whose single products are quick
    assert not pays(0, 4, 8, 576, 192) and not pays(8, 8, 8, 16, 16)  # nothing to do; nothing done in vain anyway


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("T", [1, 10])
def test_who_watches_sees_one_operation(T):
    args = problem(T=T)
    with torch.no_grad():
        alone = experts(*args, backend="torch")
        with Seen() as seen:
            watched = experts(*args, backend="torch")
        traced = torch.jit.trace(lambda *args: experts(*args, backend="torch"), tuple(args), check_trace=False)
    assert any("dyn.experts" in op for op in seen.ops) and "dyn::experts" in str(traced.graph)
    torch.testing.assert_close(watched, alone)


@pytest.mark.parametrize("T", [1, 10, 200])
def test_transforms_without_gradients(T):
    x, gate_up, down, idx, weight = (t.detach() for t in problem(T=T))
    X = torch.stack([x, 2 * x])
    for op in (lambda v: experts(v, gate_up, down, idx, weight), lambda v: routed_linear(v, gate_up, idx, weight)):
        torch.testing.assert_close(torch.func.vmap(op)(X), torch.stack([op(v) for v in X]))
    y, dY = experts(x, gate_up.requires_grad_(), down, idx, weight), torch.randn(3, T, x.shape[1])
    [batched] = torch.autograd.grad(y, gate_up, dY, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, torch.stack([torch.autograd.grad(y, gate_up, dy, retain_graph=True)[0] for dy in dY]))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (4,), (1, 2), (0, 4)])
def test_only_what_requires_grad_gets_one(wanted):
    args, whole = problem(), problem()
    for i in (0, 1, 2, 4):
        args[i].requires_grad_(i in wanted)
    experts(*args).sin().sum().backward()
    experts(*whole).sin().sum().backward()
    for i in (0, 1, 2, 4):
        assert (args[i].grad is None) == (i not in wanted)
        if i in wanted:
            assert torch.equal(args[i].grad, whole[i].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_and_int32_ids(backend):
    x, gate_up, down, idx, weight = problem()
    views = [t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, gate_up, down)]
    views[2] = torch.cat([views[2], views[2]], dim=2)[:, :, :4]
    strided = [v.requires_grad_() for v in views]
    assert not any(v.is_contiguous() for v in strided)
    plain, other = experts(x, gate_up, down, idx, weight, backend), experts(*strided, idx.int(), weight, backend)
    torch.testing.assert_close(plain, other)
    for a, b in zip(torch.autograd.grad(plain.sum(), (x, gate_up, down)), torch.autograd.grad(other.sum(), strided), strict=True):
        torch.testing.assert_close(a, b)  # the gradient of .sum() is expanded: strides 0 come in as well


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    args = problem(T=40, D=16, F=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(*args, backend=backend)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), floating(args))
    exact = problem(T=40, D=16, F=8, dtype=torch.float64)
    z = experts(*exact, backend="eager")
    for got, want in zip((y, *grads), (z, *torch.autograd.grad(z.square().sum(), floating(exact))), strict=True):
        assert got is y or got.dtype == torch.float32
        assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_gradient_checkpointing():
    plain, other = problem(), problem()
    y, z = experts(*plain), checkpoint(experts, *other, use_reentrant=False)
    assert torch.equal(y, z)
    for a, b in zip(torch.autograd.grad(y.sin().sum(), floating(plain)), torch.autograd.grad(z.sin().sum(), floating(other)), strict=True):
        assert torch.equal(a, b)


def test_compiles_into_one_graph():
    """Routing and experts without a graph break, also for other numbers of tokens and under autocast."""
    torch._dynamo.reset()

    def layer(x, gate_up, down, logits):
        return experts(x, gate_up, down, *route(logits, 2))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (10, 17, 23):
        x, gate_up, down, *_ = problem(T=T)
        logits = torch.randn(T, 5, generator=torch.Generator().manual_seed(T), requires_grad=True)
        leaves = (x, gate_up, down, logits)
        y, z = layer(*leaves), compiled(*leaves)
        torch.testing.assert_close(y, z)
        for a, b in zip(torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(z.sin().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(*leaves), compiled(*leaves))


def test_shapes_without_data():
    args = [t.to("meta") for t in problem()]
    y = experts(*args)
    assert y.shape == (10, 6) and y.is_meta
