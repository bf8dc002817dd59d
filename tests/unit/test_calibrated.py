"""Conversion without training: calibrated and its kin, and prune_dense."""

import copy
import dataclasses
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dyn.models import llama_moe_calibrate as calibrate
from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense, prune_dense, to_mixtral, to_qwen2_moe
from dyn.models.llama_moe_calibrate import geometry
from dyn.models.llama_moe_construct import METHODS
from tests.unit.test_convert import tiny

FITTED = [name for name, method in METHODS.items() if method.needs == "activations"]
SIZES = dict(vocab_size=61, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)


def text(batches=5, seed=0):
    return [torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(seed + i)) for i in range(batches)]


def loud(model):
    """Weights large enough for the feed-forward networks to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.mlp.parameters():
                weight.normal_(0, 0.4)
    return model


@pytest.fixture(scope="module")
def dense():
    return loud(tiny(**SIZES))


@torch.no_grad()
def distance(model, dense, ids):
    return (model(input_ids=ids).logits - dense(input_ids=ids).logits).square().mean().item()


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize(("n", "k"), [(8, 4), (32, 16), (4, 3), (4, 1), (2, 1), (96, 48)])
def test_every_token_passes_through_exactly_its_share_of_neurons(dense, method, n, k):
    moe = from_dense(dense, num_experts=n, num_experts_per_tok=k, construction=method, batches=text())
    assert moe.config.num_experts <= max(32, n)
    seen = []
    hooks = [layer.mlp.register_forward_hook(lambda _, __, out: seen.append(out[1].idx_TK)) for layer in moe.model.layers]
    moe(input_ids=text(1, seed=9)[0])
    for hook in hooks:
        hook.remove()
    for i, idx_TK in enumerate(seen):
        groups, shared = moe.construction.groups[i], moe.construction.shared[i]
        for chosen in idx_TK:
            assert len(torch.cat([groups[chosen].flatten(), shared]).unique()) == 48 * k // n
        assert moe.config.active_width(i) == 48 * k // n


def test_budgets_by_layer(dense):
    moe = from_dense(dense, num_experts=8, num_experts_per_tok=[2, 4, 6], construction="calibrated", batches=text())
    assert [moe.config.active_width(i) for i in range(3)] == [12, 24, 36]
    assert torch.isfinite(moe(input_ids=text(1)[0]).logits).all()


@pytest.mark.parametrize("width", [48, 64, 1536, 11008, 14336, 18944])
@pytest.mark.parametrize("shares", [[0.25], [0.5], [0.75], [1], [0.75, 0.5, 1], [0.25, 0.75], [0.875, 0.625], [0.125, 1]])
def test_geometry_adds_up(width, shares):
    actives = [int(width * share) for share in shares]
    experts, *by_layer = geometry(width, actives, 32)
    for active, k, size, shared in zip(actives, *by_layer, strict=True):
        assert (experts + shared) * size == width and (k + shared) * size == active and 1 <= k <= experts <= 32
        assert shared >= 0 and (k == experts) == (active == width)


def test_layers_have_groups_of_their_own_width():
    """32 groups a layer, of which 6 to 24 are left out: narrow ones where little is left out."""
    assert geometry(1536, [1536, 1488, 1344, 1152, 960], 32)[2] == [48, 8, 8, 16, 24]
    assert geometry(1536, [1152] * 2, 32) == (32, [8, 8], [16, 16], [64, 64])


@pytest.mark.parametrize("family", [(MistralForCausalLM, MistralConfig, dict(sliding_window=4)), (Qwen2ForCausalLM, Qwen2Config, {}),
                                    (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=8)), None])
def test_with_nothing_left_out_the_refit_changes_nothing(family, dense):
    if family is not None:
        torch.manual_seed(0)
        dense = loud(family[0](family[1](**SIZES, **family[2])).eval())
    pruned = prune_dense(dense, 1.0, batches=text())
    assert type(pruned) is type(dense)
    moe = from_dense(dense, num_experts=8, num_experts_per_tok=8, construction="calibrated", batches=text())
    for i, (layer, same) in enumerate(zip(dense.model.layers, pruned.model.layers, strict=True)):
        torch.testing.assert_close(same.mlp.down_proj.weight, layer.mlp.down_proj.weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(same.mlp.up_proj.weight, layer.mlp.up_proj.weight)
        groups = moe.construction.groups[i]
        torch.testing.assert_close(moe.model.layers[i].mlp.experts.down_proj, layer.mlp.down_proj.weight[:, groups].transpose(0, 1), atol=1e-4, rtol=0)
    ids = text(1, seed=7)[0]
    for model in (pruned, moe):
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-3, rtol=0)


def test_the_refit_and_the_routing_help(dense):
    batches, ids = text(20), text(1, seed=99)[0]
    error = {"prune": distance(prune_dense(dense, 0.5, batches=batches), dense, ids),
             "prune, no refit": distance(prune_dense(dense, 0.5, batches=batches, refit=False), dense, ids)}
    error |= {m: distance(from_dense(dense, num_experts=8, num_experts_per_tok=4, construction=m, batches=batches), dense, ids) for m in (*FITTED, "random")}
    assert error["prune"] < error["prune, no refit"]
    assert error["calibrated"] < min(error["cmoe"], error["expert_weaver"], error["random"], error["prune"])


def test_strengths_of_the_repair(dense, monkeypatch):
    """The control's own from many tokens on, or what it is told; a mixture's is always the stronger one."""
    seen, refit = [], calibrate._refit
    monkeypatch.setattr(calibrate, "_refit", lambda *args: seen.append(args[-1]) or refit(*args))
    batches = text()
    for many in (1 << 30, 1):
        monkeypatch.setattr(calibrate, "MANY", many)
        prune_dense(dense, 0.5, batches=batches)
        from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches)
    prune_dense(dense, 0.5, batches=batches, repair_ridge=0.5)
    assert seen == [1.0] * 6 + [0.1] * 3 + [1.0] * 3 + [0.5] * 3
    with pytest.raises(ValueError, match="repair_ridge=0 must be above 0"):
        prune_dense(dense, 0.5, batches=batches, repair_ridge=0)


def test_what_the_refit_saw_is_what_the_model_does(dense):
    """The streams end where the finished model ends: no drift between the statistics and the model."""
    seen = []
    refit = calibrate._refit

    def spy(layer, mlp, streams, *rest):
        seen.append(streams[1][0].clone())  # the stream before the feed-forward, behind the layers already converted
        return refit(layer, mlp, streams, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_refit", spy)
        batches = text()
        moe = from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches)
    inputs = []
    hooks = [layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in moe.model.layers]
    moe(input_ids=batches[0])
    for hook in hooks:
        hook.remove()
    for before, after in zip(seen, inputs, strict=True):
        torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("importance", ["energy", "taylor"])
def test_the_control_keeps_the_most_important_neurons(dense, importance):
    """Energies around their means on the inputs that the pruned model gives each layer, weighted by the dense stream behind it; or |h dL/dh| there."""
    batches = text(8)
    pruned = prune_dense(dense, 0.5, batches=batches, importance=importance)
    ids, reached = torch.cat(batches), 0
    streams, gates, losses = {}, {}, []
    for model in (dense, pruned):
        hooks = [layer.register_forward_hook(lambda _, __, out, i=i, model=model: streams.__setitem__((model, i), out.flatten(0, 1)))
                 for i, layer in enumerate(model.model.layers)]
        hooks += [layer.mlp.register_forward_pre_hook(lambda _, args, i=i, model=model: gates.__setitem__((model, i), args[0].flatten(0, 1)))
                  for i, layer in enumerate(model.model.layers)]
        with torch.no_grad():
            model(input_ids=ids)
        [hook.remove() for hook in hooks]
    if importance == "taylor":
        hs = []
        hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), hs.append(args[0]))[1])
                 for layer in dense.model.layers]
        for batch in batches:
            logits = dense(input_ids=batch).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").backward()
        [hook.remove() for hook in hooks]
        dense.zero_grad()
        losses = [sum((h * h.grad).abs().sum((0, 1)).detach() for h in hs[i::3]) for i in range(3)]
    for i, (whole, small) in enumerate(zip(dense.model.layers, pruned.model.layers, strict=True)):
        x, omega, norm = gates[pruned, i], 1 / streams[dense, i].square().sum(1), whole.mlp.down_proj.weight.detach().norm(dim=0)
        h = (torch.nn.functional.silu(whole.mlp.gate_proj(x)) * whole.mlp.up_proj(x)).detach()
        mean = (omega[:, None] * h).sum(0) / omega.sum()
        score = losses[i] if losses else (omega[:, None] * (h - mean).square()).sum(0) * norm.square()
        peak = (h.square() * omega[:, None]).amax(0) * norm.square()
        loudest = [n for n in peak.argsort(descending=True).tolist() if peak[n] > 0.2][:6]  # written seldom and never missed: always kept
        wanted = loudest + [n for n in score.argsort(descending=True).tolist() if n not in loudest]
        kept = [int((whole.mlp.up_proj.weight == row).all(1).nonzero()) for row in small.mlp.up_proj.weight]
        assert sorted(kept) == sorted(wanted[:24]), i
        reached += len(set(loudest) - set(score.topk(24).indices.tolist()))
    assert reached or importance == "energy"  # the rule for loud neurons was met


def test_a_control_with_budgets_of_its_own(dense, tmp_path):
    """Layers that keep less are filled up with zeros, so that a plain class loads it."""
    batches, ids = text(), text(1, seed=9)[0]
    pruned = prune_dense(dense, [0.25, 0.5, 0.75], batches=batches)
    assert pruned.config.intermediate_size == 36
    for layer, kept in zip(pruned.model.layers, (12, 24, 36), strict=True):
        assert all(int(w.any(1).sum()) == kept for w in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T))
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, pruned(input_ids=ids).logits)
    even, same = prune_dense(dense, [0.5] * 3, batches=batches), prune_dense(dense, 0.5, batches=batches)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in even.state_dict().items())


def test_a_folder_gives_what_an_object_gives(dense, tmp_path):
    dense.save_pretrained(tmp_path / "dense")
    for make in (lambda source: from_dense(source, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=text()),
                 lambda source: prune_dense(source, 0.25, batches=text())):
        one, two = make(dense), make(tmp_path / "dense")
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_the_pruned_model_is_a_plain_one_and_the_dense_one_stays(dense, tmp_path):
    before = copy.deepcopy(dense.state_dict())
    pruned = prune_dense(dense, 0.5, batches=text(), importance="taylor")
    assert pruned.config.intermediate_size == 24 and dense.config.intermediate_size == 48
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = text(1)[0]
    torch.testing.assert_close(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
    with torch.no_grad():
        for weight in pruned.parameters():
            weight.zero_()
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items()) and all(p.requires_grad for p in dense.parameters())


def test_exports_keep_the_logits(dense, tmp_path):
    moe = from_dense(dense, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=text())
    ids = text(1, seed=3)[0]
    moe.save_pretrained(tmp_path / "ours")
    to_qwen2_moe(moe, tmp_path / "qwen")
    to_mixtral(moe, tmp_path / "mixtral", fold_shared=True)
    for folder in ("ours", "qwen", "mixtral"):
        loaded = (LlamaMoeForCausalLM if folder == "ours" else AutoModelForCausalLM).from_pretrained(tmp_path / folder, experts_implementation="eager")
        torch.testing.assert_close(loaded(input_ids=ids).logits, moe(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(batches=[torch.zeros(1, 8, dtype=torch.long)]), "batches hold 8 tokens; the regression of 24 active neurons"),
    (dict(batches=[torch.full((4, 16), 61)]), "do not fit vocab_size=61: is this the model's own tokenizer"),
    (dict(batches=None), "needs batches"), (dict(batches=[]), "batches is empty"), (dict(batches=[torch.zeros(0, 16, dtype=torch.long)]), "B >= 1"),
    (dict(batches=[torch.full((4, 16), torch.nan)]), r"got torch.float32 \[4, 16\]"),
    (dict(num_experts=48, num_experts_per_tok=1, batches=[torch.zeros(1, 8, dtype=torch.long)]), "batches hold 8 tokens, fewer than there are experts"),
    (dict(gate="mlp"), "fits a linear gate; got gate='mlp'"),
    (dict(score_scale="n"), "fits experts that weigh 1 each, score_scale='k'; got 'n'"),
    (dict(num_experts=7, num_experts_per_tok=3), "is 20.5714 neurons, no whole number"), (dict(num_experts_per_tok=9), "num_experts_per_tok=9"),
    (dict(num_experts_per_tok=4.0), "num_experts_per_tok=4.0 must be an int, or a list of such"),
    (dict(num_experts_per_tok=["4"] * 3), "num_experts_per_tok='4' must be an int"),
    (dict(num_experts=5, num_experts_per_tok=2, num_shared_experts=2), "num_experts . num_shared_experts = 7 does not divide")])
def test_what_cannot_be_calibrated_is_refused(dense, changes, words):
    settings = dict(num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=text()) | changes
    with pytest.raises(ValueError, match=words):
        from_dense(dense, **settings)


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification])
def test_a_network_without_a_language_model_head_is_refused(dense, cls):
    other = cls(dense.config)
    for convert in (prune_dense, lambda net, batches: from_dense(net, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=batches)):
        with pytest.raises(ValueError, match=f"{cls.__name__} has no model.layers or no lm_head; give the causal language model"):
            convert(other, batches=text())


@pytest.mark.parametrize(("changes", "words"), [
    (dict(keep=float("nan")), "keep=nan must lie in"),
    (dict(keep=0), r"keep=0 must lie in \(0, 1\]"), (dict(keep=1.5), "keep=1.5"), (dict(keep=0.3), "keep=0.3 of intermediate_size=48 is 14.4 neurons"),
    (dict(keep=[0.5, 0.5]), "keep has 2 entries; one value or one for each of the 3 layers"), (dict(keep=[0.5, 0.5, 2]), r"keep=2 must lie in"),
    (dict(keep="half"), r"keep='half' must lie in \(0, 1\]"), (dict(keep=None), "keep=None must lie in"), (dict(keep=True), "keep=True must lie in"),
    (dict(keep=1 / 3), r"nearest: Fraction\(16, 48\)"), (dict(keep=0.001), r"nearest: Fraction\(1, 48\)"),
    (dict(batches=None), "batches=None gives it no text"),
    (dict(importance="size"), "importance='size' is unknown"), (dict(batches=[torch.zeros(1, 8, dtype=torch.long)]), "batches hold 8 tokens")])
def test_what_cannot_be_pruned_is_refused(dense, changes, words):
    with pytest.raises(ValueError, match=words):
        prune_dense(dense, **dict(keep=0.5, batches=text()) | changes)


def test_a_folder_is_taken_apart_layer_by_layer(dense, tmp_path, monkeypatch):
    from dyn.models import llama_moe_convert as convert
    dense.save_pretrained(tmp_path)
    mlps, alive, load, method = [], [], convert.load_dense, METHODS["calibrated"]

    def loaded(path):
        model = load(path)
        mlps.extend(weakref.ref(layer.mlp) for layer in model.model.layers)
        return model

    def split(source):
        alive.append(sum(mlp() is not None for mlp in mlps))
        return method.split(source)

    monkeypatch.setattr(convert, "load_dense", loaded)
    monkeypatch.setitem(METHODS, "calibrated", dataclasses.replace(method, split=split))
    moe = from_dense(tmp_path, num_experts=8, num_experts_per_tok=4, construction="calibrated", batches=text())
    assert alive == [3, 2, 1] and all(p.requires_grad for p in moe.parameters())


@pytest.mark.parametrize("make", [lambda dense: from_dense(dense, construction="calibrated", batches=text()),
                                  lambda dense: prune_dense(dense, 0.5, batches=text())])
def test_a_broken_checkpoint_is_refused_by_layer(dense, make):
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 1: hidden states are not finite in torch\.float32"):
        make(broken)


def test_a_list_by_layer_saves_loads_and_is_refused_by_exports(dense, tmp_path):
    moe = from_dense(dense, num_experts=8, num_experts_per_tok=[2, 4, 6], construction="calibrated", batches=text())
    moe.save_pretrained(tmp_path / "ours")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), text(1, seed=3)[0]
    assert loaded.config.num_experts_per_tok == moe.config.num_experts_per_tok
    torch.testing.assert_close(loaded(input_ids=ids).logits, moe(input_ids=ids).logits)
    for export in (to_qwen2_moe, lambda *rest: to_mixtral(*rest, fold_shared=True)):
        with pytest.raises(ValueError, match="num_experts_per_tok="):
            export(moe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for name, value in (("num_shared_experts", [1, 2]), ("moe_intermediate_size", [6] * 4), ("num_experts_per_tok", [4, 4])):
        with pytest.raises(ValueError, match=f"{name} has {len(value)} entries; one value or one for each of the 3 layers"):
            from_dense(dense, **dict(num_experts=8, num_experts_per_tok=4) | {name: value}, construction="calibrated", batches=text())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_dense_model_comes_along(dense, mode):
    source = copy.deepcopy(dense).train(mode)
    made = [from_dense(source, construction=m, batches=text()) for m in ("calibrated", "random")] + [prune_dense(source, 0.5, batches=text())]
    assert all(m.training == mode for model in (*made, source) for m in model.modules()) and all(p.requires_grad for m in made for p in m.parameters())
