"""Parameter groups, the schedule's edges, refusals."""

import pytest
import torch
from torch import nn

from dyn.nn.experts import Experts, Gate
from dyn.train.optim import OptimConfig, cosine_clipped, make_optimizer, param_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm((2, 4))  # a norm with a matrix
        self.experts = Experts(3, 4, 2)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_matrices_decay_the_rest_does_not():
    net = Net()
    decayed, plain = param_groups(net, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in (net.embed.weight, net.experts.gate_up_proj, net.experts.down_proj, net.linear.weight)}
    assert {id(p) for p in plain["params"]} == {id(p) for p in (net.norm.weight, net.norm.bias, net.linear.bias, net.scale)}
    assert len(decayed["params"]) == 4  # the tied head once


def test_frozen_parameters_stay_out():
    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        make_optimizer(net, OptimConfig())
    net.linear.bias.requires_grad_(True)
    assert [group["weight_decay"] for group in param_groups(net, 0.1)] == [0.0]


def test_optimizer_is_adamw_of_the_config():
    optimizer = make_optimizer(Net(), OptimConfig(lr=1e-3, betas=(0.8, 0.9), weight_decay=0.2))
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["fused"]
    assert make_optimizer(Net().to(torch.bfloat16), OptimConfig()).param_groups[0]["fused"]


def test_gates_have_their_own_rate_and_decay_as_others():
    net = nn.ModuleDict({"gate": Gate(4, 3, 2, "mlp"), "proj": nn.Linear(4, 4)})
    groups = make_optimizer(net, OptimConfig(lr=1e-3, gate_lr=1e-5, weight_decay=0.2)).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(1e-3, 0.2, 1), (1e-5, 0.2, 2), (1e-3, 0.0, 1)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in net["gate"].parameters()}
    optimizer, before = make_optimizer(net, OptimConfig(lr=1e-3, gate_lr=0.0)), [p.clone() for p in net["gate"].parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, net["gate"].parameters(), strict=True))
    assert [g["lr"] for g in make_optimizer(Net(), OptimConfig(lr=1e-3, gate_lr=1e-5)).param_groups] == [1e-3, 1e-3]  # nothing to apply it to


def test_schedule_edges():
    assert cosine_clipped(0, 10, 0) == 1.0
    assert cosine_clipped(10, 10, 0, floor=0.0) == pytest.approx(0.0)
    assert cosine_clipped(1000, 10, 2, floor=0.25) == 0.25
    assert cosine_clipped(5, 10, 0, floor=0.0) == pytest.approx(0.5)  # not rescaled to end at the floor
    assert cosine_clipped(5, 10, 0, floor=0.3) == pytest.approx(0.5)


@pytest.mark.parametrize(("field", "value"), [("lr", -1.0), ("floor", 1.5), ("betas", (0.9, 1.0)), ("clip", -0.1), ("warmup_steps", -1), ("gate_lr", -1.0)])
def test_refusals_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"optim.{field}="):
        OptimConfig(**{field: value})
