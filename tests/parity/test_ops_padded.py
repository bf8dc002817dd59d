"""The "torch" back end where it pads each expert's rows (many rows on CPU): equal to eager in float64, whatever the routing."""

import pytest
import torch

from dyn.ops import experts as module
from dyn.ops import rows
from dyn.ops.experts import experts

T, D, F, E, K = 320, 10, 6, 4, 2


def arguments(routing: str, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for shape in ((T, D), (E, 2 * F, D), (E, D, F)))
    idx = torch.rand(T, E, generator=g).topk(K).indices
    if routing == "skewed":
        idx = torch.where(torch.rand(T, 1, generator=g) < 0.9, torch.tensor([[2, 1]]), idx)
    elif routing == "empty":
        idx = torch.tensor([[3, 1]]).expand(T, K)
    elif routing == "sentinel":
        idx = torch.where(torch.rand(T, K, generator=g) < 0.4, E, idx)
    elif routing == "none":
        idx = torch.full((T, K), E)
    weight = torch.rand(T, K, generator=g, dtype=dtype).requires_grad_()
    return x, gate_up, down, idx, weight


@pytest.mark.parametrize("routing", ["even", "skewed", "empty", "sentinel", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_equal_to_eager(routing, recompute):
    args = arguments(routing)
    assert rows.row_block(args[3], E) > 1, "the test is about padding"
    results = []
    for backend in ("eager", "torch"):
        y = experts(*args, backend=backend, recompute=recompute)
        grads = torch.autograd.grad(y.square().sum(), [args[i] for i in (0, 1, 2, 4)], allow_unused=True)
        results.append([y, *(torch.zeros_like(args[i]) if g is None else g for i, g in zip((0, 1, 2, 4), grads, strict=True))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_opcheck():
    x, gate_up, down, idx, weight = arguments("sentinel", torch.float32)
    torch.library.opcheck(module._forward, (x, gate_up, down, idx, weight, True))


def test_row_counts_are_multiples_of_the_block(monkeypatch):
    seen, mm = set(), torch.mm

    def spy(a, b, **kw):
        seen.add(a.shape[0])
        return mm(a, b, **kw)

    monkeypatch.setattr(torch, "mm", spy)
    x, gate_up, down, idx, weight = arguments("even")
    experts(x, gate_up, down, idx, weight, backend="torch")
    assert seen and all(n % rows._ROW_BLOCK == 0 for n in seen)


def results(op, args, backend):
    """Output and gradients of all floating arguments."""
    args = [t.clone().requires_grad_() if t.is_floating_point() else t for t in args]
    y = op(*args, backend=backend)
    return [y, *torch.autograd.grad(y.float().sum(), [t for t in args if t.requires_grad])]


@pytest.mark.parametrize("op", ["experts", "routed_linear"])
@pytest.mark.parametrize("case", ["skipped", "overflows elsewhere", "skipped score"])
def test_what_is_not_finite_stays_with_its_token(op, case):
    """Padding computes with numbers of some token: none that the expert does not see."""
    dtype = torch.float16 if case == "overflows elsewhere" else torch.float32
    x, gate_up, down, idx, weight = (t.detach() for t in arguments("even", dtype))
    if case == "overflows elsewhere":  # its own experts are 2 and 3
        x[0], idx[0], gate_up[:2], gate_up[2:] = 200.0, torch.tensor([2, 3]), 200.0, gate_up[2:] / 100
        x[1:] /= 1000
    else:
        idx[0] = E
        (weight if case == "skipped score" else x)[0] = torch.nan
    assert rows.row_block(idx, E) > 1
    given = (x, gate_up, down, idx, weight) if op == "experts" else (x, gate_up, idx, weight)
    for want, got in zip(*(results(getattr(module, op), given, backend) for backend in ("eager", "torch")), strict=True):
        assert want.isfinite().all()
        assert (got - want).abs().max() <= (2e-2 if dtype == torch.float16 else 1e-5) * want.abs().max()
