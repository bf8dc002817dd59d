"""`score`: each criterion against its definition, and what it leaves untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyn.core.saliency import METHODS, gradient, score, select


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3)).to(dtype)


def data(dtype=torch.float64, sizes=(6, 4)):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=g)) for n in sizes]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).double(), batch[1], reduction="sum")


WEIGHTS = ["0.weight", "4.weight"]


def test_snip_is_the_gradient_of_a_mask_of_ones():
    model, batches = network().eval(), data()
    masks = {name: torch.ones_like(model.get_parameter(name), requires_grad=True) for name in WEIGHTS}
    masked = {name: model.get_parameter(name).detach() * m for name, m in masks.items()}
    total = sum(F.cross_entropy(torch.func.functional_call(model, masked, b[0]), b[1], reduction="sum") for b in batches)
    expected = torch.autograd.grad(total, list(masks.values()))
    for got, want in zip(score(model, batches, loss, "snip", WEIGHTS).values(), expected, strict=True):
        torch.testing.assert_close(got, want.abs(), rtol=1e-12, atol=1e-14)


def test_chunks_of_summed_losses_add_up():
    model, [whole] = network(), data(sizes=(10,))
    parts = list(zip(whole[0].split(3), whole[1].split(3), strict=True))
    for one, two in zip(score(model, [whole], loss).values(), score(model, parts, loss).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_grasp_is_weight_times_hessian_times_gradient():
    model, batches = network().eval(), data()
    named = {name: model.get_parameter(name) for name in WEIGHTS}
    sizes = [p.numel() for p in named.values()]

    def total(flat):
        parts = {n: part.view_as(p) for (n, p), part in zip(named.items(), flat.split(sizes), strict=True)}
        return sum(F.cross_entropy(torch.func.functional_call(model, parts, b[0]), b[1], reduction="sum") for b in batches)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    gradient, hessian = torch.func.grad(total)(flat), torch.func.hessian(total)(flat)
    got = torch.cat([s.flatten() for s in score(model, batches, loss, "grasp", WEIGHTS).values()])
    torch.testing.assert_close(got, flat * (hessian @ gradient), rtol=1e-9, atol=1e-12)


def test_synflow_of_two_layers_by_hand():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    got = score(model, [torch.randn(6, 3).double()], None, "synflow", ["0.weight", "2.weight"])
    one, two = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    torch.testing.assert_close(got["0.weight"], 6 * one * two.sum(0)[:, None])
    torch.testing.assert_close(got["2.weight"], 6 * two * one.sum(1)[None])
    own = score(model, None, None, "synflow", "weight", flow=lambda m: m(torch.ones(1, 3).double()).sum())
    torch.testing.assert_close(own["0.weight"], got["0.weight"] / 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nothing_is_disturbed(method, dtype):
    model, batches = network(dtype), data(torch.float32 if dtype == torch.bfloat16 else dtype)  # a bfloat16 network is scored in float32
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[4].bias.grad = torch.ones_like(model[4].bias)
    before, modes, state = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    found = score(model, batches, loss, method, WEIGHTS, seed=3)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(model.get_parameter(n).grad is None for n in WEIGHTS) and model[4].bias.grad.eq(1).all()
    wide = method == "synflow" or (dtype == torch.float64 and method != "random")
    assert all(s.dtype == (torch.float64 if wide else torch.float32) for s in found.values())
    again = score(model, batches, loss, method, WEIGHTS, seed=3)
    assert list(found) == WEIGHTS and all(torch.equal(found[n], again[n]) for n in WEIGHTS)


def test_autocast_around_is_left_out():
    model, batches = network(torch.float32), data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = score(model, batches, loss)
    for one, two in zip(inside.values(), score(model, batches, loss).values(), strict=True):
        assert torch.equal(one, two)


def test_an_error_in_the_loss_leaves_all_as_it_was():
    model = network().train()
    with pytest.raises(KeyError):
        score(model, data(), lambda m, b: {}["missing"])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_is_selected():
    model = network()
    assert list(select(model, None)) == WEIGHTS
    assert list(select(model, r"^4\.")) == ["4.weight", "4.bias"]
    model[4].weight = model[4].weight.requires_grad_(False)
    assert list(select(model, None)) == ["0.weight"]


@pytest.mark.parametrize(("kwargs", "words"), [
    (dict(method="snap"), "method='snap' is unknown; allowed: random, magnitude, snip"),
    (dict(params="*.weight"), r"params='\*.weight' is no regular expression: nothing to repeat"),
    (dict(params="adapter"), "finds no parameter of Sequential; it has 0.weight"),
    (dict(params=["0.wait"]), r"no parameter '0\.wait'"),
    (dict(batches=[]), "looks at data, and there are no batches"),
    (dict(batches=[], method="synflow"), "looks at data, and there are no batches"),
    (dict(loss_fn=lambda m, b: m(b[0])), r"finite scalar tensor, got \[6, 3\]"),
    (dict(loss_fn=lambda m, b: loss(m, b) * float("nan")), "finite scalar"),
    (dict(loss_fn=lambda m, b: m[4].bias.sum(), params=["0.weight"]), "does not depend on any scored parameter"),
])
def test_refusals(kwargs, words):
    with pytest.raises(ValueError, match=words):
        score(**dict(model=network(), batches=data(), loss_fn=loss) | kwargs)


def test_synflow_over_ids_asks_for_a_flow():
    with pytest.raises(ValueError, match=r"whose input is torch\.int64; give flow"):
        score(nn.Embedding(4, 3), [torch.zeros(2, dtype=torch.int64)], None, "synflow")


def test_gradient_keeps_its_sign_and_is_summed_over_batches():
    model, batches = network(), data()
    signed = gradient(model, batches, loss, WEIGHTS)
    for (name, g), snip in zip(signed.items(), score(model, batches, loss, "snip", WEIGHTS).values(), strict=True):
        torch.testing.assert_close((g * model.get_parameter(name)).abs(), snip)
        assert (g < 0).any() and (g > 0).any() and model.get_parameter(name).grad is None
    with pytest.raises(ValueError, match="a gradient looks at data, and there are no batches"):
        gradient(model, [], loss, WEIGHTS)
