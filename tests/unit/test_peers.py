"""Adapters of packages that are not installed here, against stand-ins in plain torch that keep to the peers' own calling conventions."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.layer import Case, Layer, Reference

CASE = Case("tiny", T=24, D=16, F=12, E=4, K=2)


@pytest.fixture
def install(monkeypatch):
    """install("a.b", name=object): a module to import for the length of a test."""
    monkeypatch.setattr(peers, "need_cuda", lambda layer: None)

    def put(name: str, **members) -> None:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:i])) or ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)
            if i > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module, raising=False)
        for key, member in members.items():
            monkeypatch.setattr(sys.modules[name], key, member, raising=False)

    return put


def by_expert(rows, weights, expert):
    """Row i times the transposed matrix of its expert."""
    return torch.einsum("si,soi->so", rows, weights[expert])


def agrees(name):
    layer = Layer(CASE, "fp32", "skewed", "cpu")
    return Reference(layer).error(layer, peers.PEERS[name](layer)) < 1e-5


def test_liger(install):
    def apply(x, gate_up, down, ids, weights):
        assert ids.dtype == torch.int32 and weights.shape == ids.shape
        token, expert = torch.arange(len(x)).repeat_interleave(ids.shape[1]), ids.flatten().long()
        gate, up = by_expert(x[token], gate_up, expert).chunk(2, dim=-1)
        rows = by_expert(F.silu(gate) * up, down, expert) * weights.flatten()[:, None]
        return torch.zeros_like(x).index_add(0, token, rows)

    install("liger_kernel.ops.fused_moe", LigerFusedMoEFunction=SimpleNamespace(apply=apply))
    assert agrees("Liger-Kernel")


def test_moe_ops(install):
    """Places of rows come slot by slot, [K * T]; offsets start with 0."""

    def permute(x, ids, num_out_tokens=0, E=None):
        order = ids.flatten().argsort(stable=True)
        offsets = F.pad(torch.bincount(ids.flatten(), minlength=E).cumsum(0), (1, 0))
        return x[order // ids.shape[1]], order.argsort().view(ids.shape).T.flatten(), offsets

    def grouped_gemm(rows, weights, offsets, trans_b=True):
        assert trans_b
        return by_expert(rows, weights, torch.arange(len(weights)).repeat_interleave(offsets.diff()))

    def unpermute(rows, places, weights, num_tokens, k):
        return sum(rows[places.view(k, num_tokens)[j]] * weights[:, j, None] for j in range(k))

    install("moe_ops", permute=permute, grouped_gemm=grouped_gemm, unpermute=unpermute)
    assert agrees("moe-ops")


def test_moe_ops_refuses_other_numbers_of_experts(install):
    install("moe_ops", permute=None, grouped_gemm=None, unpermute=None)
    with pytest.raises(peers.Refused, match="power of 2"):
        peers.moe_ops(Layer(Case("tiny", T=8, D=16, F=12, E=6, K=2), "fp32", "uniform", "cpu"))


def test_scattermoe(install):
    """Weights [E, inputs, outputs]; grouped rows are in expert order, others in the order of slots."""

    def flatten_sort_count(ids, num_experts):
        expert, slot = ids.flatten().sort()
        return expert, slot, torch.bincount(expert, minlength=num_experts).cumsum(0)

    def parallel_linear(x, weights, k, expert, slot, offsets, expert_biases=None, gates=None, grouped_in=False, grouped_out=False):
        rows = by_expert(x if grouped_in else x[slot // k], weights.transpose(1, 2), expert)
        if not grouped_out:
            rows = rows[slot.argsort()]
        return rows if gates is None else (gates.unsqueeze(1) @ rows.view(*gates.shape, -1)).squeeze(1)

    install("scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    assert agrees("ScatterMoE")


@pytest.mark.parametrize("flag", ["concat_layout", "is_concatenated_gate_up", None])
def test_sonicmoe(install, flag):
    """Weights [outputs, inputs, E]; triples of token, expert and score, tokens ascending."""

    def run(x, score, token, expert, w1, w2, E, concatenated):
        assert concatenated and w1.shape[-1] == E and token.diff().min() >= 0 and expert.dtype == token.dtype == torch.int32
        expert, token = expert.long(), token.long()
        gate, up = by_expert(x[token], w1.permute(2, 0, 1), expert).chunk(2, dim=-1)
        rows = by_expert(F.silu(gate) * up, w2.permute(2, 0, 1), expert) * score[:, None]
        return torch.zeros_like(x).index_add(0, token, rows), None

    def first(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, activation_type, is_inference_mode_enabled=False, concat_layout=False):
        return run(x, router_scores, token_indices, expert_indices, w1, w2, E, concat_layout)

    def second(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, activation_type, is_inference_mode_enabled=False,
               is_concatenated_gate_up=False):
        return run(x, router_scores, token_indices, expert_indices, w1, w2, E, is_concatenated_gate_up)

    def interleaved(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, activation_type, is_inference_mode_enabled=False):
        raise AssertionError("never called")

    install("sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    version = {"concat_layout": first, "is_concatenated_gate_up": second, None: interleaved}[flag]
    install("sonicmoe.functional", moe_general_routing_inputs=version)
    if flag is None:
        with pytest.raises(peers.Refused, match="interleaved"):
            agrees("SonicMoE")
    else:
        assert agrees("SonicMoE")
