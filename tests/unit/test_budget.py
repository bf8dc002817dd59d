"""Budgets by layer from measured losses."""

import copy

import pytest
import torch

from dyn.models.llama_moe import from_dense, layer_budgets
from dyn.models.llama_moe_budget import around
from dyn.models.llama_moe_diagnose import domain_losses
from tests.unit.test_calibrated import SIZES, loud, text
from tests.unit.test_convert import tiny


@pytest.fixture(scope="module")
def dense():
    """Three layers, the second of which does next to nothing; logits are large enough for the others to matter."""
    model = loud(tiny(**SIZES))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
        model.lm_head.weight.mul_(20)
    return model


def own(dense, batches):
    """Text drawn from the model itself, so that a change costs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return [dense.generate(b[:, :4], max_new_tokens=28, min_new_tokens=28, do_sample=True, top_k=0, pad_token_id=0) for b in batches]


def test_the_layer_that_matters_least_gets_least_and_the_mean_stays(dense):
    before = copy.deepcopy(dense.state_dict())
    seen, batches, held_out = [], text(10), own(dense, text(8, seed=50))
    settings = dict(num_experts=8, construction="calibrated", batches=batches)
    ks = layer_budgets(dense, num_experts_per_tok=4, held_out=held_out, on_layer=lambda *at: seen.append(at), **settings)
    assert sum(ks) == 12 and ks[1] == min(ks) and ks[1] < 4 and len(seen) == 15
    moe = from_dense(dense, num_experts_per_tok=ks, **settings)
    assert sum(moe.config.active_width(i) for i in range(3)) == 3 * 24
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items()) and all(p.requires_grad for p in dense.parameters())


def test_what_is_measured_is_one_converted_layer(dense):
    """The first layer alone, against a mixture put into the dense model by hand."""
    from dyn.models import llama_moe_budget as budget
    from dyn.models.llama_moe_diagnose import _AsDense
    batches, held_out, found = text(10), text(2, seed=50), []
    allocate = budget.allocate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "allocate", lambda loss_UB, *rest: found.append(loss_UB) or allocate(loss_UB, *rest))
        layer_budgets(dense, num_experts=8, num_experts_per_tok=4, batches=batches, held_out=held_out, levels=[4])
    moe, mixed = from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches), copy.deepcopy(dense)
    mixed.model.layers[0].mlp = _AsDense(moe.model.layers[0].mlp)
    assert found[-1][0, 0].item() == pytest.approx(domain_losses(mixed, {"a": held_out})["a"], rel=1e-5)


def test_levels_about_the_mean():
    assert around(16, 32) == [6, 11, 16, 21, 26] and around(24, 32) == [20, 22, 24, 26, 28] and around(2, 4) == [1, 2, 3] and around(4, 4) == [4]
    for n in range(1, 40):
        for k in range(1, n + 1):
            found = around(k, n)
            assert k in found and found[0] >= 1 and found[-1] <= n


@pytest.mark.parametrize(("changes", "words"), [
    (dict(construction="kmeans"), "construction='kmeans' has no budgets to measure; allowed: calibrated"),
    (dict(levels=[5, 6]), "total=72 cannot be reached"), (dict(levels=[6, 2]), "ascending"), (dict(held_out=[]), "batches is empty"),
    (dict(num_experts=7, num_experts_per_tok=3), "no whole number"), (dict(batches=[]), "batches is empty")])
def test_budgets_that_cannot_be_measured(dense, changes, words):
    with pytest.raises(ValueError, match=words):
        layer_budgets(dense, **dict(num_experts=8, num_experts_per_tok=4, batches=text(), held_out=text(1)) | changes)
