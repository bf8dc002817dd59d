"""Parameter counts of LLaMA-MoE (specification section 8, facts 10-16), on the meta device at full size."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from dyn import config
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.models.packaged import EMBEDDED_CONFIGS
from dyn.nn.experts import Experts, Gate
from dyn.nn.surgery import count_parameters, freeze

ROOT = Path(__file__).parents[2]
DENSE, FFN = 6_738_415_616, 4_328_521_728


def build(num_experts, k, width, **changes):
    base = EMBEDDED_CONFIGS["meta-llama/Llama-2-7b-hf"]
    fields = base | dict(num_experts=num_experts, num_experts_per_tok=k, moe_intermediate_size=width, gate="mlp", gate_noise=True) | changes
    with torch.device("meta"):
        return LlamaMoeForCausalLM(LlamaMoeConfig(**fields))


@pytest.mark.parametrize(("num_experts", "k", "width", "gate", "total", "active"), [
    (16, 4, 688, "mlp", 6_742_618_112, 3_492_024_320),
    (16, 2, 688, "mlp", 6_742_618_112, 2_950_959_104),
    (8, 2, 1376, "mlp", 6_740_514_816, 3_492_024_320),
    (16, 4, 688, "linear", 6_742_609_920, 3_492_024_320),
    (8, 2, 1376, "linear", 6_740_512_768, 3_492_024_320),
])
def test_released_shapes(num_experts, k, width, gate, total, active):
    model = build(num_experts, k, width, gate=gate)
    counts = count_parameters(model)
    assert counts["total"] == total and counts["active"] == active
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    assert sum(p.numel() for m in experts for p in m.parameters()) == FFN
    assert sum(p.numel() for p in experts[0].parameters()) // num_experts == 3 * 4096 * width == {688: 8_454_144, 1376: 16_908_288}[width]
    assert counts["total"] - counts["gate"] == DENSE


@pytest.mark.parametrize(("num_experts", "frozen"), [(16, 4_202_496), (8, 2_099_200)])
def test_freezing_the_gates_freezes_only_the_gates(num_experts, frozen):
    model = build(num_experts, 2, 11008 // num_experts)
    assert freeze(model, Gate) == frozen
    by_name = sum(p.numel() for n, p in model.named_parameters() if "gate" in n) - frozen
    assert by_name == 2 * 1_442_840_576  # our gate_up_proj holds the SwiGLU gate and up matrices of all experts


# Residual layouts. The published totals have an mlp gate, its noise and a linear residual gate [4096, R]; ours adds shared experts with weight 1 and no gate.
@pytest.mark.parametrize(("routed", "residual", "width", "k", "total"), [
    (14, 2, 688, 2, 6_742_354_048), (7, 1, 1376, 1, 6_740_383_264), (15, 1, 688, 3, 6_742_486_048), (13, 3, 688, 1, 6_742_222_112)])
def test_residual_layouts(routed, residual, width, k, total):
    model = build(routed, k, width, num_shared_experts=residual)
    counts = count_parameters(model)
    assert counts["active"] == 3_492_024_320
    assert counts["total"] + 32 * 4096 * residual == total


def test_llama3_8b_two_of_eight():
    base = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    made = LlamaMoeConfig(**base, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1792, gate="linear", gate_noise=False, score_scale=4.0)
    with torch.device("meta"):
        counts = count_parameters(LlamaMoeForCausalLM(made))
    assert counts["active"] == 3_802_402_816 and counts["gate"] == 1_048_576 and counts["total"] - counts["gate"] == 8_030_261_248


def test_the_paper_profile_as_a_dry_run():
    """Facts 12, 13, 25, 26, through the experiment's own defaults."""
    spec = importlib.util.spec_from_file_location("golden_llama_moe_cpt", ROOT / "experiments" / "llama_moe_cpt.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = module.plan(config.load(module.Config, "llama_moe_cpt", "paper", root=ROOT))
    assert plan["parameters"]["total"] == 6_742_618_112 and plan["parameters"]["activated (without gates)"] == 3_492_024_320
    assert plan["training"] == {"tokens a step": 14_680_064, "steps": 13_623, "tokens": 199_986_511_872, "devices": 112}
    assert plan["FLOPs"]["forward, a token"] > 2 * 3_492_024_320 - 2 * 32000 * 4096
    assert 5 < plan["memory, GiB a device (estimate)"]["total"] < 80
