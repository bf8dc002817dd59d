"""Conversions on a device give what they give on the CPU: the same groups where rounding decides nothing, else losses that are close."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense, layer_budgets, prune_dense
from dyn.models.llama_moe_align import align
from dyn.models.llama_moe_diagnose import domain_losses
from tests.unit.test_budget import own
from tests.unit.test_calibrated import loud, text
from tests.unit.test_convert import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
CLOSE = dict(rtol=1e-3, atol=1e-3)  # of logits of about 10
N = 64  # neurons


@pytest.fixture(scope="module")
def dense():
    """Three layers on the CPU, whose predictions depend on all of them; rows of up projections are in four groups that no rounding could mix up."""
    model = loud(tiny(hidden_size=32, intermediate_size=N, num_hidden_layers=3, num_key_value_heads=1, num_attention_heads=2))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            up_ND = layer.mlp.up_proj.weight
            up_ND.mul_(0.1).add_(torch.randn(4, 32)[torch.randperm(N) % 4], alpha=0.4)
    return model


@pytest.fixture(scope="module")
def batches(dense):
    return own(dense, text(12))


@pytest.fixture(scope="module")
def held_out(dense):
    return own(dense, text(4, seed=50))


def on(device, dense):
    return copy.deepcopy(dense).to(device)


def loss(net, held_out):
    return domain_losses(net, {"": held_out})[""]


@torch.no_grad()
def logits(net, ids):
    return net(input_ids=ids.to(net.device)).logits.cpu()


def assert_on_device(net):
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {DEVICE}


@pytest.mark.parametrize("method", ["random", "kmeans"])
def test_weights_alone_decide(method, dense, batches):
    ours, theirs = (from_dense(on(device, dense), num_experts=4, num_experts_per_tok=2, construction=method) for device in (DEVICE, "cpu"))
    assert_on_device(ours)
    for one, two, layer, made in zip(ours.construction.groups, theirs.construction.groups, dense.model.layers, ours.model.layers, strict=True):
        assert one.device.type == "cpu" and sorted(one.tolist()) == sorted(two.tolist())
        torch.testing.assert_close(made.mlp.experts.down_proj.cpu(), layer.mlp.down_proj.weight[:, one].transpose(0, 1))
        if method == "kmeans":  # the planted groups, in any order: restarts that end alike differ by rounding alone
            unit_EFD = torch.nn.functional.normalize(layer.mlp.up_proj.weight[one], dim=-1)
            assert (unit_EFD @ unit_EFD.transpose(1, 2)).min() > 0.6
    if method == "random":  # gates are drawn on the CPU
        torch.testing.assert_close(logits(ours, batches[0]), logits(theirs, batches[0]), **CLOSE)


def test_pruning(dense, batches, held_out, tmp_path):
    ours, theirs = (prune_dense(on(device, dense), 0.5, batches=batches) for device in (DEVICE, "cpu"))
    assert_on_device(ours)
    for one, two in zip(ours.model.layers, theirs.model.layers, strict=True):
        torch.testing.assert_close(one.mlp.gate_proj.weight.cpu(), two.mlp.gate_proj.weight)  # the same neurons
        torch.testing.assert_close(one.mlp.down_proj.weight.cpu(), two.mlp.down_proj.weight, **CLOSE)  # refitted alike
    assert loss(ours, held_out) == pytest.approx(loss(theirs, held_out), abs=1e-2)
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again.to(DEVICE), held_out[0]), logits(ours, held_out[0]))


def calibrated(device, dense, batches):
    """All that a conversion in closed form may do, from budgets to a pass of distillation; (the model, loss before that pass, budgets)."""
    parent = on(device, dense)
    budgets = layer_budgets(parent, num_experts=8, num_experts_per_tok=4, batches=batches[2:6], held_out=batches[:2])
    net = from_dense(parent, num_experts=8, num_experts_per_tok=budgets, construction="calibrated", batches=batches)
    before = copy.deepcopy(net)
    align(net, parent, [row for batch in batches for row in batch.split(1)] * 20, passes=1, rate=1e-3)
    assert all(torch.equal(value.cpu(), dense.state_dict()[name]) for name, value in parent.state_dict().items())
    return net, before, budgets


def test_calibration_budgets_and_a_pass_of_distillation(dense, batches, held_out, tmp_path):
    (ours, before, budgets), (theirs, cpu_before, cpu_budgets) = (calibrated(device, dense, batches) for device in (DEVICE, "cpu"))
    assert_on_device(ours)
    # Groups follow gates that follow groups: where they part by a rounding error they stay apart, so only what comes out is compared.
    assert sum(budgets) == sum(cpu_budgets) == 12 and all(abs(one - two) <= 1 for one, two in zip(budgets, cpu_budgets, strict=True))
    for (groups, shared), k in zip(zip(ours.construction.groups, ours.construction.shared, strict=True), budgets, strict=True):
        assert torch.cat([groups.flatten(), shared]).sort().values.tolist() == list(range(N)) and 1 <= k <= 8
    dropped = from_dense(on(DEVICE, dense), num_experts=8, num_experts_per_tok=4, construction="random")
    parent, worst = loss(dense, held_out), loss(dropped, held_out)
    assert parent < loss(before, held_out) < worst
    assert loss(ours, batches) < loss(before, batches)  # what it was distilled on: too little text to help on other text
    for one, two in ((before, cpu_before), (ours, theirs)):
        assert loss(one, held_out) == pytest.approx(loss(two, held_out), abs=0.02 * (worst - parent))

    ours.save_pretrained(tmp_path)
    again = LlamaMoeForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_experts_per_tok == ours.config.num_experts_per_tok
    for one, two in zip(again.construction.groups, ours.construction.groups, strict=True):
        assert torch.equal(one, two)
    torch.testing.assert_close(logits(again, held_out[0]), logits(ours, held_out[0]), **CLOSE)
    assert all(torch.equal(value, ours.state_dict()[name].cpu()) for name, value in again.state_dict().items())
    torch.testing.assert_close(logits(again.to(DEVICE), held_out[0]), logits(ours, held_out[0]))
