"""Distillation over the calibration text, after a conversion."""

import copy
import math

import pytest
import torch

from dyn.models.llama_moe import from_dense, prune_dense
from dyn.models.llama_moe_align import align
from dyn.models.llama_moe_budget import divergence
from tests.unit.test_budget import own
from tests.unit.test_calibrated import SIZES, loud, text
from tests.unit.test_convert import tiny


@pytest.fixture(scope="module")
def dense():
    model = loud(tiny(**SIZES))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def batches(dense):
    return own(dense, text(10))


def apart(net, dense, batches):
    with torch.no_grad():
        return divergence(net, batches, [dense.model(input_ids=ids)[0] for ids in batches])


def converted(dense, batches, kind):
    if kind == "moe":
        return from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches)
    return prune_dense(dense, 0.5, batches=batches)


@pytest.mark.parametrize("kind", ["moe", "prune"])
def test_predictions_come_nearer_and_gates_head_and_parent_stay(dense, batches, kind):
    net, parent, seen = converted(dense, batches, kind), copy.deepcopy(dense.state_dict()), []
    start, before = copy.deepcopy(net.state_dict()), apart(net, dense, batches)
    align(net, dense, batches, passes=20, rate=3e-3, on_step=lambda *at: seen.append(at))
    assert apart(net, dense, batches) < 0.8 * before
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) == 20
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, start[name])}
    still = {name for name in start if ".gate.weight" in name or "embed" in name or "lm_head" in name}
    assert moved == set(start) - still - {name for name in start if name.endswith("inv_freq")}
    assert all(torch.equal(value, parent[name]) for name, value in dense.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_the_seed_decides_and_no_pass_changes_nothing(dense, batches):
    nets = [converted(dense, batches, "prune") for _ in range(4)]
    for net, passes, seed in zip(nets, (0, 1, 1, 1), (0, 0, 0, 1), strict=True):
        align(net, dense, [row for b in batches for row in b.split(1)] * 10, passes=passes, rate=1e-3, seed=seed)
    start, one, two, other = (net.model.layers[0].mlp.down_proj.weight for net in nets)
    assert torch.equal(one, two) and not torch.equal(one, start) and not torch.equal(one, other)
    assert torch.equal(start, converted(dense, batches, "prune").model.layers[0].mlp.down_proj.weight)


def test_weights_end_as_the_mean_over_the_second_half_of_the_steps(dense, batches):
    net, seen = converted(dense, batches, "prune"), []
    weight = net.model.layers[1].mlp.down_proj.weight
    align(net, dense, batches, passes=5, rate=1e-3, on_step=lambda *_: seen.append(weight.detach().clone()))
    assert len(seen) == 5 and not torch.equal(weight, seen[-1])
    torch.testing.assert_close(weight, torch.stack(seen[2:]).mean(0))


def test_zeros_that_fill_narrow_layers_up_stay(dense, batches):
    net = prune_dense(dense, [0.5, 0.25, 0.5], batches=batches)
    align(net, dense, batches, passes=2, rate=1e-3)
    widths = [int(layer.mlp.down_proj.weight.any(0).sum()) for layer in net.model.layers]
    assert widths[1] * 2 == widths[0] == widths[2] and not net.model.layers[1].mlp.gate_proj.weight[widths[1]:].any()


def test_refusals(dense, batches):
    with pytest.raises(ValueError, match="dtype=bfloat16: distillation over the calibration text needs float32"):
        align(converted(dense, batches, "prune").bfloat16(), dense, batches)
    with pytest.raises(ValueError, match="do not fit vocab_size"):
        align(converted(dense, batches, "prune"), dense, [batches[0] + 10_000])
    for settings, words in ((dict(passes=-1), "passes=-1 must be an int, 0 or more"), (dict(rate=0.0), "rate=0.0 above 0"),
                            (dict(passes=1.5), "passes=1.5 must be an int"), (dict(rate=math.inf), "rate=inf above 0 and finite")):
        with pytest.raises(ValueError, match=words):
            align(converted(dense, batches, "prune"), dense, batches, **settings)
    with pytest.raises(ValueError, match="vocab_size=67 of the network is not its parent's 61"):
        align(tiny(**SIZES | {"vocab_size": 67}), dense, batches)
    with pytest.raises(ValueError, match=r"diverged at step \d+ of 30: lower rate=1e\+30"):
        align(converted(dense, batches, "prune"), dense, batches, passes=30, rate=1e30)
    net = converted(dense, batches, "prune")
    net.model.layers[0].mlp.down_proj.weight.requires_grad_(True).register_hook(lambda grad: grad * math.nan)
    with pytest.raises(ValueError, match="diverged at step 1 of 1"):  # no loss is seen behind the last step
        align(net, dense, batches[:1], passes=1)
