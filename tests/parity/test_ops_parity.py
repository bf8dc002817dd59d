"""Backends of `experts` against the eager reference in float64, and against transformers' own experts."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dyn.ops import experts as experts_module
from dyn.ops import rows
from dyn.ops.experts import experts
from dyn.ops.route import route

BACKENDS = [name for name in experts_module._BACKENDS if name != "triton"]  # which has tests/interpreter and tests/gpu
FAST = [name for name in BACKENDS if name != "eager"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}  # relative, by norm; bfloat16 has 8 bits
SHAPES = [(33, 13, 7, 5, 3), (64, 16, 8, 4, 2), (7, 6, 5, 1, 1), (50, 10, 3, 16, 16), (40, 24, 86, 3, 2), (1, 8, 4, 6, 2)]  # T D F E K


def problem(T, D, F, E, K, dtype, routing="uniform"):
    """Leaves x, gate_up, down, weight in `dtype` (the weight at least float32) with weights of a trained network's scale, and ids."""
    g = torch.Generator().manual_seed(T + 31 * E)
    x, gate_up, down = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, D), (E, 2 * F, D), (E, D, F)))
    logits = torch.randn(T, E, generator=g, dtype=torch.float64)
    if routing == "skewed":  # nearly all tokens take the first experts, others stay empty
        logits -= 4 * torch.arange(E)
    idx, weight = route(logits, K)
    if routing == "sentinels":
        idx = torch.where(torch.rand(T, K, generator=g) < 0.4, E + torch.randint(3, (T, K), generator=g), idx)
    if routing == "one":
        idx = torch.full_like(idx, E // 2)
    leaves = [x.to(dtype), (gate_up / D**0.5).to(dtype), (down / F**0.5).to(dtype), weight.to(torch.promote_types(dtype, torch.float32))]
    return [t.requires_grad_() for t in leaves], idx


def outputs_and_gradients(leaves, idx, backend, **kwargs):
    x, gate_up, down, weight = leaves
    y = experts(x, gate_up, down, idx, weight, backend, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def assert_near(got, want, tolerance):
    for name, a, b in zip(("y", "dx", "dgate_up", "ddown", "dweight"), got, want, strict=True):
        error, size = (a.double() - b).norm().item(), b.norm().item()
        assert error <= tolerance * size + 1e-12, f"{name}: relative error {error / max(size, 1e-30):.2g} over {tolerance}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backend_against_eager(shape, routing, dtype, backend):
    leaves, idx = problem(*shape, dtype, routing)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = outputs_and_gradients(exact, idx, "eager")
    for recompute in (False, True):
        got = outputs_and_gradients(leaves, idx, backend, recompute=recompute)
        assert [t.dtype for t in got] == [leaves[0].dtype] + [t.dtype for t in leaves]
        assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels", "one"])
def test_grouped_products_against_eager(dtype, routing, monkeypatch):
    """The way without host numbers, which CUDA takes, on the CPU's grouped_mm."""
    monkeypatch.setattr(rows, "can_group", lambda *weights: True)
    leaves, idx = problem(48, 16, 8, 6, 2, dtype, routing)
    want = outputs_and_gradients([t.detach().double().requires_grad_() for t in leaves], idx, "eager")
    assert_near(outputs_and_gradients(leaves, idx, "torch"), want, TOLERANCE[dtype])


def test_what_grouped_products_need():
    """16 bytes are 8 numbers of bfloat16; a CPU's weights never qualify, since there the loop is faster."""
    weight = torch.zeros(4, 16, 24, dtype=torch.bfloat16)
    assert rows.aligned(weight) and rows.aligned(weight.transpose(1, 2))
    assert not rows.can_group(weight)
    for misfit in (weight[:, :, :20], weight[:, :12], weight[:, :, 4:20], weight[:, :, ::3], torch.zeros(4, 16, 86, dtype=torch.bfloat16)):
        assert not rows.aligned(misfit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sentinels", [False, True])
def test_against_mixtral_experts(backend, sentinels):
    config = MixtralConfig(hidden_size=12, intermediate_size=10, num_local_experts=5, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = MixtralExperts(config).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    leaves, idx = problem(31, 12, 10, 5, 2, torch.float64, "sentinels" if sentinels else "uniform")
    x, _, _, weight = leaves
    mine = [x, theirs.gate_up_proj, theirs.down_proj, weight]
    want = theirs(x, idx.clamp(max=4), weight.masked_fill(idx >= 5, 0))  # not every version takes sentinels in its own loop
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert_near(outputs_and_gradients(mine, idx, backend), (want, *torch.autograd.grad(want, mine, dy)), 1e-12)


def test_inside_a_mixtral_model(monkeypatch):
    """Every layer of a small random model computed by ours from what its experts get: the same logits."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager",
    )
    model = MixtralForCausalLM(config).double().eval()
    ids = torch.randint(40, (2, 9))
    calls = []

    def ours(self, hidden_states, top_k_index, top_k_weights):
        calls.append(top_k_index)
        return experts(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights, "torch")

    with torch.no_grad():
        want = model(ids).logits
        monkeypatch.setattr(MixtralExperts, "forward", ours)
        got = model(ids).logits
    assert len(calls) == 2
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_route_is_mixtrals_router():
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=8, num_experts_per_tok=2))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    _, weight, idx = router(logits)
    ours_idx, ours_weight = route(logits, 2)
    assert torch.equal(idx, ours_idx)
    torch.testing.assert_close(ours_weight, weight)
