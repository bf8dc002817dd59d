"""Budgets by layer from measured losses."""

import copy

import pytest
import torch

from dyn.models.llama_moe import from_dense, layer_budgets, prune_dense
from dyn.models.llama_moe_budget import EXPONENT, between, divergence
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


@pytest.mark.parametrize(("construction", "levels"), [("calibrated", None), ("calibrated", [2, 4, 6]), ("prune", None), ("cmoe", [3, 4])])
def test_the_layer_that_matters_least_gets_least_and_the_mean_stays(dense, construction, levels):
    before = copy.deepcopy(dense.state_dict())
    seen, batches, held_out = [], text(10), own(dense, text(8, seed=50))
    ks = layer_budgets(dense, num_experts=8, num_experts_per_tok=4, construction=construction, batches=batches, held_out=held_out, levels=levels,
                       on_layer=lambda *at: seen.append(at))
    assert sum(ks) == 12 and ks[1] == min(ks) and ks[1] < 4 and seen == [(k, i) for k in levels or [4] for i in range(3)]
    if construction == "prune":
        kept = prune_dense(dense, [k / 8 for k in ks], batches=batches)
        assert sum(int(layer.mlp.down_proj.weight.any(0).sum()) for layer in kept.model.layers) == 3 * 24
    else:
        moe = from_dense(dense, num_experts=8, num_experts_per_tok=ks, construction=construction, batches=batches)
        assert sum(moe.config.active_width(i) for i in range(3)) == 3 * 24
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items()) and all(p.requires_grad for p in dense.parameters())


def test_what_is_measured_is_one_converted_layer(dense):
    """The first layer alone, against a mixture put into the dense model by hand."""
    from dyn.models import llama_moe_budget as budget
    from dyn.models.llama_moe_diagnose import _AsDense
    batches, held_out, found = text(10), text(2, seed=50), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "between", lambda loss_UB, *rest: found.append(loss_UB) or between(loss_UB, *rest))
        layer_budgets(dense, num_experts=8, num_experts_per_tok=4, batches=batches, held_out=held_out)
    moe, mixed = from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches), copy.deepcopy(dense)
    mixed.model.layers[0].mlp = _AsDense(moe.model.layers[0].mlp)
    with torch.no_grad():
        ours, theirs = (torch.cat([model(input_ids=ids).logits for ids in held_out]).log_softmax(-1) for model in (mixed, dense))
    assert found[-1].shape == (3, 1) and found[-1][0, 0].item() == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(dense):
    held_out = text(2)
    with torch.no_grad():
        hidden = [dense.model(input_ids=ids)[0] for ids in held_out]
    assert divergence(dense, held_out, hidden) == pytest.approx(0, abs=1e-6)
    assert divergence(dense, held_out, [-h for h in hidden]) > 0.1


def test_losses_between_levels_follow_powers_and_end_in_nothing():
    one = between(torch.tensor([[0.4], [0.1]]), [4], [2, 4, 6, 8], 8)
    torch.testing.assert_close(one, torch.tensor([[0.4], [0.1]]) * torch.tensor([6 / 4, 1.0, 2 / 4, 0.0]) ** EXPONENT)
    cubic = lambda ks: torch.tensor([[3.0], [0.5]]) * (8 - torch.tensor(ks)) ** 3  # noqa: E731
    torch.testing.assert_close(between(cubic([2, 4, 7]), [2, 4, 7], list(range(1, 9)), 8), cubic(list(range(1, 9))))


@pytest.mark.parametrize(("changes", "words"), [
    (dict(construction="kmeans"), "construction='kmeans' has no budgets to measure; allowed: calibrated, cmoe, expert_weaver, prune"),
    (dict(levels=[5, 8]), r"levels=\[5, 8\] must be ascending numbers from 1 to num_experts - 1 = 7"), (dict(levels=[6, 2]), "ascending"),
    (dict(num_experts_per_tok=9), "num_experts_per_tok=9 must be between 1 and num_experts=8"), (dict(held_out=[]), "batches is empty"),
    (dict(num_experts=7, num_experts_per_tok=3), "no whole number"),
    (dict(num_experts="8"), "num_experts='8' must be an int"), (dict(num_experts_per_tok=[4, 4]), r"num_experts_per_tok=\[4, 4\] must be an int"),
    (dict(levels=[2.0, 4.0]), r"levels\[0\]=2.0 must be an int"), (dict(batches=[]), "batches is empty")])
def test_budgets_that_cannot_be_measured(dense, changes, words):
    with pytest.raises(ValueError, match=words):
        layer_budgets(dense, **dict(num_experts=8, num_experts_per_tok=4, batches=text(), held_out=text(1)) | changes)
