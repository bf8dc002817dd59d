"""The Triton backend on a device: parity in all dtypes, capture in a CUDA graph, no waiting for the device."""

from __future__ import annotations

import pytest
import torch

from dyn.ops import triton_launch
from dyn.ops.experts import experts
from dyn.ops.route import route
from dyn.ops.triton_few import is_few
from dyn.ops.triton_order import order_rows, read_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not triton_launch.HAS_TRITON, reason="needs triton"),
]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # relative, by norm
# T, D, F, E, K: odd, narrow, of LLaMA-MoE's and Qwen3's widths with fewer tokens, and many rows an expert.
SHAPES = [(33, 13, 7, 5, 3), (300, 96, 86, 4, 2), (2048, 4096, 688, 16, 4), (1024, 2048, 768, 128, 8), (8192, 512, 688, 4, 4), (3, 256, 128, 8, 2)]


def problem(T, D, F, E, K, dtype, routing="uniform"):
    g = torch.Generator("cuda").manual_seed(T + E)
    x, gate_up, down = (torch.randn(*s, generator=g, device="cuda") for s in ((T, D), (E, 2 * F, D), (E, D, F)))
    logits = torch.randn(T, E, generator=g, device="cuda")
    if routing == "skewed":
        logits -= 4 * torch.arange(E, device="cuda")
    idx, weight = route(logits, K, backend="eager")
    if routing == "sentinels":
        idx = torch.where(torch.rand(T, K, generator=g, device="cuda") < 0.4, E, idx)
    return [t.to(dtype).requires_grad_() for t in (x, gate_up / D**0.5, down / F**0.5)] + [weight.requires_grad_()], idx


def outputs_and_gradients(leaves, idx, backend="triton", recompute=False):
    x, gate_up, down, weight = leaves
    y = experts(x, gate_up, down, idx, weight, backend, recompute)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda").to(leaves[0].dtype)
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_eager(shape, routing, dtype):
    leaves, idx = problem(*shape, dtype, routing)
    x, gate_up, down, weight = (t.detach().double().requires_grad_() for t in leaves)
    want = experts(x, gate_up, down, idx, weight, "eager")
    dy = torch.randn(want.shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda").to(dtype).double()
    want = want, *torch.autograd.grad(want, (x, gate_up, down, weight), dy)
    got = outputs_and_gradients(leaves, idx)
    again = outputs_and_gradients(leaves, idx, recompute=True)
    for name, a, b, c in zip(("y", "dx", "dgate_up", "ddown", "dweight"), got, want, again, strict=True):
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm() + 1e-12, name
        assert torch.equal(a, c), f"{name}: recomputed, and run again, it differs"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
@pytest.mark.parametrize("shape", [(1, 4096, 688, 16, 4), (8, 4096, 688, 16, 4), (20, 13, 7, 5, 3), (16, 2048, 768, 64, 8), (5, 96, 1400, 4, 2)], ids=str)
def test_few_tokens_without_gradients(shape, routing, dtype):
    leaves, idx = problem(*shape, dtype, routing)
    assert is_few(idx.numel(), leaves[2])
    x, gate_up, down, weight = (t.detach() for t in leaves)
    want = experts(x.double(), gate_up.double(), down.double(), idx, weight.double(), "eager")
    got = experts(x, gate_up, down, idx, weight, "triton")
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm() + 1e-12


def test_tf32_only_where_torch_allows_it():
    leaves, idx = problem(512, 256, 128, 4, 2, torch.float32)
    exact = outputs_and_gradients(leaves, idx)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = outputs_and_gradients(leaves, idx)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(exact[0], rounded[0]) and (exact[0] - rounded[0]).norm() < 5e-3 * exact[0].norm()


@pytest.mark.parametrize("T, K, E", [(1, 1, 1), (64, 8, 128), (500, 1, 7), (5000, 8, 128), (40000, 2, 16), (300, 4, 300)])
def test_order_is_a_stable_sort(T, K, E):
    idx = torch.randint(E + 2, (T, K), device="cuda")
    order = read_order(order_rows(idx, E, 128), T * K, E)
    ids, slot = idx.flatten().clamp(max=E).sort(stable=True)
    num_rows = int((ids < E).sum())
    assert torch.equal(order.slot_S[:num_rows].long(), slot[:num_rows])
    assert torch.equal(order.start_E.long(), torch.searchsorted(ids, torch.arange(E + 1, device="cuda")))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_route_against_eager(biased, renormalise, score):
    logits = torch.randn(1000, 60, device="cuda", requires_grad=True)
    kwargs = dict(renormalise=renormalise, score=score, bias_E=torch.randn(60, device="cuda") if biased else None, scale=2.5)
    (idx, weight), (want_idx, want) = (route(logits, 4, backend=b, **kwargs) for b in ("triton", "eager"))
    assert torch.equal(idx, want_idx)
    torch.testing.assert_close(weight, want)
    d = torch.randn(1000, 4, device="cuda")
    torch.testing.assert_close(torch.autograd.grad(weight, logits, d), torch.autograd.grad(want, logits, d))


def step(leaves, router):
    """Forward and backward of a routed layer, all by Triton."""
    x, gate_up, down, _ = leaves
    y = experts(x, gate_up, down, *route(x.detach() @ router, 4, backend="triton"), "triton")
    return y, *torch.autograd.grad(y, (x, gate_up, down), torch.ones_like(y))


def test_nothing_waits_for_the_device():
    leaves, _ = problem(512, 256, 688, 16, 4, torch.bfloat16)
    router = torch.randn(256, 16, device="cuda", dtype=torch.bfloat16)
    step(leaves, router)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(leaves, router)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_in_a_cuda_graph():
    """One graph, replayed on other tokens with other routing."""
    leaves, _ = problem(512, 256, 688, 16, 4, torch.bfloat16)
    router = torch.randn(256, 16, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(leaves, router)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, router)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(leaves, router), strict=True))


def test_rows_beyond_32_bits():
    """Elements of the pre-activations past 2**31: offsets of rows must not overflow."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a device with 40 GiB")
    T, F = 2**17 + 64, 8192 + 64
    x, gate_up, down = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) / 8 for s in ((T, 64), (1, 2 * F, 64), (1, 64, F)))
    leaves = [t.requires_grad_() for t in (x, gate_up, down)]
    idx, weight = torch.zeros(T, 1, dtype=torch.int64, device="cuda"), torch.ones(T, 1, device="cuda")
    y = experts(*leaves, idx, weight, "triton")
    (dx,) = torch.autograd.grad(y, leaves[0], torch.ones_like(y))
    tail = [x.detach()[-100:].requires_grad_(), *leaves[1:]]
    z = experts(*tail, idx[-100:], weight[-100:], "eager")
    (dz,) = torch.autograd.grad(z, tail[0], torch.ones_like(z))
    for a, b in ((y[-100:], z), (dx[-100:], dz)):
        assert (a - b).float().norm() < 2e-2 * b.float().norm()


def test_columns_beyond_32_bits():
    """A transposed x, whose last column starts past element 2**31: the weights' gradient must find it."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a device with 40 GiB")
    x = torch.randn(520, 2**22, device="cuda", dtype=torch.bfloat16).t()
    gate_up, down = (torch.randn(*s, device="cuda", dtype=torch.bfloat16).div_(8).requires_grad_() for s in ((1, 32, 520), (1, 520, 16)))
    idx, weight = torch.zeros(2**22, 1, dtype=torch.int64, device="cuda"), torch.ones(2**22, 1, device="cuda")
    dy = torch.randn(2**22, 520, device="cuda", dtype=torch.bfloat16)
    got, want = (torch.autograd.grad(experts(each, gate_up, down, idx, weight, "triton"), (gate_up, down), dy) for each in (x, x.contiguous()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).float().norm() < 2e-2 * b.float().norm()


def test_compiles_into_one_graph():
    leaves, idx = problem(300, 128, 96, 4, 2, torch.bfloat16)

    def layer(x, gate_up, down, weight):
        return experts(x, gate_up, down, idx, weight)

    compiled = torch.compile(layer, fullgraph=True)
    y, z = layer(*leaves), compiled(*leaves)
    torch.testing.assert_close(y, z)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
