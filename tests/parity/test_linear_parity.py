"""Backends of `routed_linear` against the eager reference in float64, the partial form against dense masks, and oneDNN's products against torch.mm's."""

import pytest
import torch

from dyn.ops import linear as module
from dyn.ops import rows
from dyn.ops.linear import partial_routed_linear, routed_linear

FAST = [name for name in module._BACKENDS if name != "eager"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}  # relative, by norm; bfloat16 has 8 bits
SHAPES = [(33, 13, 7, 5, 3), (7, 6, 5, 1, 1), (50, 10, 3, 16, 16), (640, 24, 86, 4, 2), (1, 8, 4, 6, 2)]  # T I O E K; the fourth is padded


def problem(T, I, O, E, K, dtype, routing="uniform"):
    """Leaves x, weight, scores, bias in `dtype` (the scores at least float32), and ids."""
    g = torch.Generator().manual_seed(T + 31 * E)
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


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN linear op")
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_onednn_products(layout, monkeypatch):
    """The float32 way of CPUs other than Intel's, forced: products and outer products, an empty expert, padded and other row counts."""
    monkeypatch.setattr(rows, "_onednn_pays", lambda: True)
    calls, op = [], rows._onednn
    monkeypatch.setattr(rows, "_onednn", lambda *args: (calls.append(1), op(*args))[1])
    g = torch.Generator().manual_seed(0)
    left, right, weight = (torch.randn(*s, generator=g) for s in ((150, 13), (150, 6), (4, 13, 6)))
    if layout == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    ends = [64, 64, 118, 150]
    out, outer = torch.empty(150, 6), torch.empty(4, 13, 6)
    rows.products(left, weight, ends, out)
    rows.outer_products(left, right, ends, outer)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        some = slice(start, end)
        torch.testing.assert_close(out[some].double(), left[some].double() @ weight[e].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outer[e].double(), left[some].double().t() @ right[some].double(), rtol=1e-5, atol=1e-5)
    assert len(calls) == 4  # 64 and 32 rows, twice; 54 rows go to torch.mm


@pytest.mark.parametrize("fault", ["values", "missing", "arguments", "intel"])
def test_onednn_is_not_trusted_blindly(fault, monkeypatch):
    monkeypatch.setattr(rows.platform, "processor", lambda: "Intel" if fault == "intel" else "x86_64")
    if fault == "values":
        monkeypatch.setattr(rows, "_onednn", lambda left, right: left @ right + 1)
    elif fault == "missing":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    elif fault == "arguments":
        monkeypatch.setattr(rows, "_onednn", lambda left, right: torch.ops.aten.mm(left))
    rows._onednn_pays.cache_clear()
    try:
        assert rows._onednn_pays() is False
    finally:
        rows._onednn_pays.cache_clear()
