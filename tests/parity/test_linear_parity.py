"""Backends of `routed_linear` against the eager reference in float64, the partial form against dense masks, and oneDNN's products against torch.mm's."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dyn.ops import linear as module
from dyn.ops import rows
from dyn.ops.linear import partial_routed_linear, routed_linear

FAST = [name for name in module._BACKENDS if name != "eager"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}  # relative, by norm; bfloat16 has 8 bits
SHAPES = [(33, 13, 7, 5, 3), (7, 6, 5, 1, 1), (50, 10, 3, 16, 16), (640, 24, 86, 4, 2), (1, 8, 4, 6, 2)]  # T I O E K; the fourth is padded


def problem(T, I, O, E, K, dtype, routing="uniform", seed=0):
    """Leaves x, weight, scores, bias in `dtype` (the scores at least float32), and ids."""
    g = torch.Generator().manual_seed(T + 31 * E + seed)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, I), (E, O, I), (E, O)))
    logits = torch.randn(T, E, generator=g, dtype=torch.float64)
    if routing == "skewed":  # nearly all tokens take the first experts, others stay empty
        logits -= 4 * torch.arange(E)
    scores, idx = logits.softmax(-1).topk(K)
    if routing == "sentinels":
        idx = torch.where(torch.rand(T, K, generator=g) < 0.4, E + torch.randint(3, (T, K), generator=g), idx)
    if routing == "one":  # a token names an expert K times
        idx = torch.full_like(idx, E // 2)
    leaves = [x.to(dtype), (weight / I**0.5).to(dtype), scores.to(torch.promote_types(dtype, torch.float32)), bias.to(dtype)]
    return [t.requires_grad_() for t in leaves], idx


def outputs_and_gradients(leaves, idx, backend, bias=True):
    x, weight, scores, b = leaves
    y = routed_linear(x, weight, idx, scores, b if bias else None, backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return y, *torch.autograd.grad(y, leaves if bias else leaves[:3], dy.to(y.dtype))


def assert_near(got, want, tolerance):
    for name, a, b in zip(("y", "dx", "dweight", "dscores", "dbias"), got, want, strict=False):
        error, size = (a.double() - b).norm().item(), b.norm().item()
        assert error <= tolerance * size + 1e-12, f"{name}: relative error {error / max(size, 1e-30):.2g} over {tolerance}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backend_against_eager(shape, routing, dtype, backend):
    leaves, idx = problem(*shape, dtype, routing)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for bias in (True, False):
        got = outputs_and_gradients(leaves, idx, backend, bias)
        assert [t.dtype for t in got] == [leaves[0].dtype] + [t.dtype for t in leaves[: 4 if bias else 3]]
        assert_near(got, outputs_and_gradients(exact, idx, "eager", bias), TOLERANCE[dtype])


@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels", "one"])
def test_grouped_products_against_eager(routing, monkeypatch):
    """The way without host numbers, which CUDA takes, on the CPU's grouped_mm."""
    monkeypatch.setattr(rows, "can_group", lambda *weights: True)
    leaves, idx = problem(48, 16, 8, 6, 2, torch.bfloat16, routing)
    want = outputs_and_gradients([t.detach().double().requires_grad_() for t in leaves], idx, "eager")
    assert_near(outputs_and_gradients(leaves, idx, "torch"), want, TOLERANCE[torch.bfloat16])


MASKS = {
    "unstructured": lambda g, O, I: torch.rand(O, I, generator=g) < 0.4, "inputs": lambda g, O, I: (torch.rand(I, generator=g) < 0.4).expand(O, I),
    "outputs": lambda g, O, I: (torch.rand(O, 1, generator=g) < 0.4).expand(O, I), "all": lambda g, O, I: torch.ones(O, I, dtype=torch.bool),
    "none": lambda g, O, I: torch.zeros(O, I, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("form", ["merged", "factorised"])
@pytest.mark.parametrize("bias", [True, False])
def test_partial_against_dense_masks(mask, form, bias):
    """padnet section 3.2, written with the mask as a factor."""
    (x, dynamic, scores, b), idx = problem(40, 9, 7, 5, 3, torch.float64, "sentinels")
    g = torch.Generator().manual_seed(2)
    static, phi = torch.randn(7, 9, generator=g, dtype=torch.float64, requires_grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    M = MASKS[mask](g, 7, 9)
    masked = 2 * phi.sigmoid() * M * dynamic + 2 * (-phi).sigmoid() * ~M * static
    want = routed_linear(x, masked, idx, scores, b if bias else None, "eager")
    on, off = 2 * phi.sigmoid(), 2 * (-phi).sigmoid()
    got = partial_routed_linear(x, dynamic, static, M, idx, scores, b if bias else None, dynamic_scale=on, static_scale=off, form=form)
    leaves = [x, dynamic, static, phi, scores] + ([b] if bias else [])
    for a, c in zip((got, *torch.autograd.grad(got.sin().sum(), leaves)), (want, *torch.autograd.grad(want.sin().sum(), leaves)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", ["merged", "factorised"])
def test_partial_under_autocast(form):
    (x, dynamic, scores, b), idx = problem(40, 9, 7, 5, 3, torch.float32)
    M, static = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) < 0.5, torch.ones(7, 9)
    want = partial_routed_linear(x, dynamic, static, M, idx, scores, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = partial_routed_linear(x, dynamic, static, M, idx, scores, b, form=form)
    assert got.dtype == torch.bfloat16 and (got - want).norm() < 2e-2 * want.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("ends", [[64, 64, 96, 160], [64, 64, 118, 150]])
def test_onednn_products(layout, ends, monkeypatch):
    """The float32 way of CPUs other than Intel's, forced: products and outer products, an empty expert, padded and other row counts."""
    monkeypatch.setattr(rows, "_onednn_pays", lambda: True)
    used, way = [], rows._by_onednn
    monkeypatch.setattr(rows, "_by_onednn", lambda: (used.append(1), way())[1])
    before = torch.backends.mkldnn.matmul.fp32_precision
    g = torch.Generator().manual_seed(0)
    left, right, weight = (torch.randn(*s, generator=g) for s in ((ends[-1], 13), (ends[-1], 6), (4, 13, 6)))
    if layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    out, outer = torch.empty(ends[-1], 6), torch.empty(4, 13, 6)
    rows.products(left, weight, ends, out)
    rows.outer_products(left, right, ends, outer)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        some = slice(start, end)
        torch.testing.assert_close(out[some].double(), left[some].double() @ weight[e].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outer[e].double(), left[some].double().t() @ right[some].double(), rtol=1e-5, atol=1e-5)
    assert len(used) == (2 if ends[-1] == 160 else 0)  # a row count that is not padded would have a kernel compiled for it
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("fault", ["values", "missing", "intel"])
def test_onednn_is_not_trusted_blindly(fault, monkeypatch):
    monkeypatch.setattr(rows.platform, "processor", lambda: "Intel" if fault == "intel" else "x86_64")

    @contextlib.contextmanager
    def rounding():
        if fault == "missing":
            raise AttributeError("fp32_precision")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    monkeypatch.setattr(rows, "_by_onednn", rounding)
    rows._onednn_pays.cache_clear()
    try:
        assert rows._onednn_pays() is False
    finally:
        rows._onednn_pays.cache_clear()


def test_a_users_precision_survives_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), rows._by_onednn():
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"


def test_threads_at_once(monkeypatch):
    """Each has rows of its own; and the user's precision is back afterwards."""
    monkeypatch.setattr(rows, "_onednn_pays", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    problems = [problem(1300, 9, 7, 5, 3, torch.float32, seed=seed) for seed in range(4)]

    def run(p):
        (x, w, scores, b), idx = p
        return [routed_linear(x, w, idx, scores, b, backend="torch") for _ in range(20)][-1]

    want = [run(p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(run, problems), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the other threads' products may go to oneDNN meanwhile
    assert torch.backends.mkldnn.matmul.fp32_precision == before
