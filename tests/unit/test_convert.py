"""from_dense: what each argument does, what it refuses, and what it leaves alone."""

import copy
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dyn.models import llama_moe_convert
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM, from_dense, prune_dense
from dyn.models.llama_moe_construct import METHODS, Method
from dyn.nn.experts import Gate
from dyn.nn.surgery import count_parameters, freeze, train_only

BATCHES = [torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_construction_takes_rows_and_columns_of_the_dense_weights(method):
    dense = tiny()
    moe = from_dense(dense, num_experts=3 if method == "sharing_inter" else 4, num_experts_per_tok=2, construction=method, batches=BATCHES)
    for i, (layer, made) in enumerate(zip(dense.model.layers, moe.model.layers, strict=True)):
        groups, shared = moe.construction.groups[i], moe.construction.shared[i]
        width = groups.shape[1]
        for e, index in enumerate(groups):
            assert (index.diff() > 0).all()
            torch.testing.assert_close(made.mlp.experts.gate_up_proj[e, :width], layer.mlp.gate_proj.weight[index])
            torch.testing.assert_close(made.mlp.experts.gate_up_proj[e, width:], layer.mlp.up_proj.weight[index])
            if not METHODS[method].refit:
                torch.testing.assert_close(made.mlp.experts.down_proj[e], layer.mlp.down_proj.weight[:, index])
        if METHODS[method].partition:
            assert torch.cat([groups.flatten(), shared]).sort().values.tolist() == list(range(24))
    assert len(moe.construction.source_hash) == 64


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_decides_everything_and_the_dense_model_is_untouched(method):
    dense = tiny()
    before = copy.deepcopy(dense.state_dict())
    num_experts = 3 if method == "sharing_inter" else 4

    def make(seed):
        return from_dense(dense, num_experts=num_experts, num_experts_per_tok=2, construction=method, batches=BATCHES, seed=seed)

    torch.manual_seed(11)
    one = make(5).state_dict()
    torch.manual_seed(12)
    two = make(5).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = make(6).state_dict()
    assert any(not torch.equal(one[k], other[k]) for k in one)
    with torch.no_grad():
        for p in make(5).parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    assert all(p.requires_grad for p in dense.parameters()) and not dense.training


def test_copy_without_reinit_and_scale_one_is_the_dense_model_exactly():
    dense, ids = tiny().double(), BATCHES[0]
    moe = from_dense(dense, num_experts=3, num_experts_per_tok=2, construction="copy", score_scale=1.0)
    torch.testing.assert_close(moe(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-12, rtol=1e-12)
    half = from_dense(dense, num_experts=3, num_experts_per_tok=2, construction="copy", score_scale=1.0, reinit=0.5)
    changed = (half.model.layers[0].mlp.experts.down_proj != moe.model.layers[0].mlp.experts.down_proj).any(1).sum(-1)
    assert changed.tolist() == [12, 12, 12]


def test_score_scales():
    scale = lambda **kw: from_dense(tiny(), num_experts=4, num_experts_per_tok=2, **kw).config.score_scale  # noqa: E731
    assert scale() == 2.0 and scale(score_scale="n") == 4.0 and scale(score_scale="k") == 2.0 and scale(score_scale="sqrt_kn") == 8**0.5
    assert scale(score_scale=[1.5, 2.5]) == [1.5, 2.5]
    learnable = from_dense(tiny(), num_experts=4, num_experts_per_tok=2, score_scale="learnable")
    assert learnable.model.layers[1].mlp.score_scale.item() == 2.0 and learnable.config.learnable_scale
    assert from_dense(tiny(), num_experts=4, num_experts_per_tok=[1, 4]).config.score_scale == [4.0, 1.0]


def test_measured_scale_restores_the_ratio_of_feed_forward_to_residual():
    from dyn.models.llama_moe_measure import dense_ratios
    dense = tiny()
    # With every expert and equal scores the output is FFN / N, whatever the batch: the measured scale must be N.
    exact = from_dense(dense, num_experts=4, num_experts_per_tok=4, gate="uniform", score_scale="measured", batches=BATCHES)
    assert exact.config.score_scale == pytest.approx([4.0, 4.0], rel=1e-4)
    assert all(r > 0 for r in dense_ratios(dense, BATCHES))


def test_measured_scale_of_a_layer_that_adds_nothing():
    dense = tiny()
    dense.model.layers[0].mlp.down_proj.weight.data.zero_()
    scales = from_dense(dense, num_experts=4, num_experts_per_tok=2, score_scale="measured", batches=BATCHES).config.score_scale
    assert scales[0] == 1 and 0 < scales[1] < 100
    dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1: score_scale='measured' found no finite ratio"):
        from_dense(dense, num_experts=4, num_experts_per_tok=2, score_scale="measured", batches=BATCHES)


def test_measured_scales_are_means_over_tokens_and_repeat():
    from dyn.models.llama_moe_measure import dense_ratios
    parts = [BATCHES[0][:1], *BATCHES[0][1:].split(3)]  # of other sizes
    assert dense_ratios(tiny(), parts) == pytest.approx(dense_ratios(tiny(), BATCHES[:1]), rel=1e-5)
    before, scales = torch.get_rng_state(), []
    for _ in range(2):
        settings = dict(gate="random", score_scale="measured", batches=BATCHES, seed=3)
        scales.append(from_dense(tiny(), num_experts=4, num_experts_per_tok=2, **settings).config.score_scale)
        torch.rand(3)
    assert scales[0] == scales[1]
    torch.set_rng_state(before)


@pytest.mark.parametrize("wrong", [dict(moe_intermediate_size=1.5), dict(num_shared_experts=0.5), dict(score_scale="n"), dict(gate_noise="false"),
                                   dict(learnable_scale="no"), dict(sliding_window="x"), dict(num_experts="4"), dict(layer_types="full")])
def test_fields_of_a_wrong_type_are_refused(wrong):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_experts=4, num_experts_per_tok=2,
                 moe_intermediate_size=12)
    LlamaMoeConfig(**sizes, score_scale=[1, 2.0], balance_weight=0)
    with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
        LlamaMoeConfig(**sizes | wrong)
    with pytest.raises(ValueError, match=r"construction=\['random'\] is unknown"):
        from_dense(tiny(), num_experts=4, num_experts_per_tok=2, construction=["random"])


def test_the_result_shares_nothing_with_the_dense_model():
    dense = tiny()
    theta = dense.config.rope_parameters["rope_theta"]
    for made in (from_dense(dense, num_experts=4, num_experts_per_tok=2), prune_dense(dense, 0.5, batches=BATCHES * 3)):
        made.generation_config.max_new_tokens, made.config.rope_parameters["rope_theta"] = 7, 5.0
    assert dense.generation_config.max_new_tokens is None and dense.config.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize("change", ["adapter", "adapter on attention", "integers"])
def test_linears_that_have_been_replaced_are_refused(change):
    dense = tiny()
    if change == "integers":
        torch.ao.quantization.quantize_dynamic(dense, {torch.nn.Linear}, inplace=True)
    else:
        dense.add_adapter(LoraConfig(r=2, target_modules=["q_proj"] if "attention" in change else ["up_proj"]))
    for convert in (lambda: from_dense(dense, num_experts=4, num_experts_per_tok=2), lambda: prune_dense(dense, 0.5, batches=BATCHES)):
        with pytest.raises(ValueError, match=r"model.layers.0.*_proj is a Linear, where an nn.Linear of floating numbers was expected: merge adapters"):
            convert()


def with_bias(dense):
    dense.lm_head = torch.nn.Linear(16, 61)


def with_a_compiled_layer(dense):
    dense.model.layers[1] = torch.compile(dense.model.layers[1])


def with_norm(dense):
    torch.nn.utils.parametrizations.weight_norm(dense.lm_head)


def with_a_head_of_its_own(dense):
    dense.config.tie_word_embeddings = True


@pytest.mark.parametrize(("change", "stray"), [(with_a_head_of_its_own, "lm_head.weight [61, 16] is not the input embeddings"),
                                               (with_bias, "lm_head.bias is of shape [61], by the model's configuration absent"),
                                               (with_a_compiled_layer, "model.layers.1._orig_mod."), (with_norm, "lm_head.parametrizations.")])
def test_weights_that_the_configuration_does_not_know_are_refused_first(change, stray):
    dense = tiny()
    change(dense)
    for convert in (lambda: from_dense(dense, num_experts=4, num_experts_per_tok=2), lambda: prune_dense(dense, 1.0, batches=BATCHES)):
        with pytest.raises(ValueError, match=re.escape(stray)):
            convert()


def test_the_wrapper_of_a_compiled_model_is_looked_through():
    dense = tiny()
    one, two = (from_dense(each, num_experts=4, num_experts_per_tok=2).state_dict() for each in (dense, torch.compile(dense, backend="eager")))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("method", ["coactivation", "calibrated", "gradient", "prune"])
def test_what_surrounds_a_conversion_changes_nothing(method):
    """The caller's default type and autocast, and ids of 32 bits."""
    dense, default = tiny(), torch.get_default_dtype()

    def convert(batches):
        if method == "prune":
            return prune_dense(dense, 0.5, batches=batches).state_dict()
        return from_dense(dense, num_experts=4, num_experts_per_tok=2, construction=method, batches=batches).state_dict()

    plain = convert(BATCHES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            torch.set_default_dtype(torch.float64)
            other = convert([batch.int() for batch in BATCHES])
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(default)
    assert all(torch.equal(value, other[key]) for key, value in plain.items())


def test_what_is_no_model_is_refused():
    for wrong in (None, 5, tiny().config):
        with pytest.raises(ValueError, match=f"dense is a {type(wrong).__name__}; allowed: a causal language model, or the folder or hub id of one"):
            from_dense(wrong)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"leave torch.inference_mode\(\) first"):
        from_dense(tiny())


def test_budgets_by_layer_and_shared_experts(tmp_path):
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=[1, 3], num_shared_experts=[2, 0])
    assert moe.config.moe_intermediate_size == [4, 6]
    assert moe.model.layers[0].mlp.shared_experts.up_proj.weight.shape == (8, 16) and moe.model.layers[1].mlp.shared_experts is None
    moe.save_pretrained(tmp_path)
    loaded = LlamaMoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=BATCHES[0]).logits, moe(input_ids=BATCHES[0]).logits)


def test_a_folder_is_consumed_in_its_own_dtype(tmp_path):
    dense = tiny().to(torch.bfloat16)
    dense.save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\ncard\n")
    moe = from_dense(tmp_path, num_experts=4, num_experts_per_tok=2)
    assert moe.dtype == torch.bfloat16 and moe.construction.source_license == "mit" and moe.construction.source == tmp_path.name
    same = from_dense(dense, num_experts=4, num_experts_per_tok=2)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in moe.state_dict().items())


def test_a_folder_is_consumed_when_its_graphs_are_all_in(tmp_path, monkeypatch):
    """Two layers a pass over the text, of three: the last pass still needs the first layers."""
    monkeypatch.setattr(llama_moe_convert, "CHUNK_BYTES", 2 * 4 * 24**2)
    dense = tiny(num_hidden_layers=3)
    dense.save_pretrained(tmp_path)
    made = [from_dense(source, num_experts=4, num_experts_per_tok=2, construction="coactivation", batches=BATCHES) for source in (tmp_path, dense)]
    assert all(torch.equal(a, b) for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True))


@pytest.mark.parametrize(("changes", "words"), [
    (dict(num_experts=7), "num_experts.*7 does not divide intermediate_size=24; nearest: 6, 8"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok=5.*num_experts=4"),
    (dict(num_experts_per_tok=[1]), "num_experts_per_tok has 1 entries"),
    (dict(num_experts="4"), "num_experts='4' must be an int"),
    (dict(num_experts=4.0, construction="calibrated", batches=BATCHES), "num_experts=4.0 must be an int"),
    (dict(num_experts=True), "num_experts=True must be an int"),
    (dict(num_experts=7, num_shared_experts=-1, construction="sharing_inter", batches=BATCHES), "num_shared_experts=-1 must be at least 0"),
    (dict(construction="kmean"), "did you mean 'kmeans'"),
    (dict(construction="gradient"), "needs batches"),
    (dict(construction="gradient", batches=[torch.full((4, 8), 61)]), "vocab_size=61"),
    (dict(construction="gradient", batches=[BATCHES[:1]] * 3), "3 lists"),
    (dict(moe_intermediate_size=5), "keeps every neuron once"),
    (dict(construction="gradient", num_shared_experts=2, batches=BATCHES), "sharing_inter"),
    (dict(score_scale="twice"), "score_scale='twice'"),
    (dict(score_scale=[1.0]), "score_scale has 1 entries"),
    (dict(gate="uniform"), "uniform"),
    (dict(gate="switch"), "switch.*num_experts_per_tok=1"),
    (dict(gate="best"), "gate='best'"),
    (dict(balance="even"), "balance='even'"),
    (dict(reinit=0.5), "reinit"), (dict(overlap=True), "overlap=True belongs to construction='sharing_inter', got 'random'"),
    (dict(features="gate"), "features='gate' belongs to construction='kmeans', got 'random'"),
    (dict(construction="kmeans", features="rows"), "features='rows' is unknown; allowed: up, gate"),
    (dict(construction="copy", reinit=2.0), r"\[0, 1\]"),
])
def test_refusals_name_the_field(changes, words):
    with pytest.raises(ValueError, match=words):
        from_dense(tiny(), **dict(num_experts=4, num_experts_per_tok=2) | changes)


@pytest.mark.parametrize(("groups", "message"), [
    (lambda E, F: torch.zeros(E, F, dtype=torch.int64), "an expert holds a neuron twice"),
    (lambda E, F: torch.arange(E * F).view(E, F) + 1, "neurons 1..24 lie outside 0..23"),
    (lambda E, F: torch.arange(E * F).view(F, E), r"groups \[6, 4\] must be \[0\] and \[4, 6\]"),
])
def test_a_construction_of_ones_own_that_is_wrong(groups, message, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method(lambda s: (torch.empty(0, dtype=torch.int64), groups(s.num_experts, s.group_size))))
    with pytest.raises(ValueError, match=f"construction='mine', layer 0: .*{message}"):
        from_dense(tiny(), num_experts=4, num_experts_per_tok=2, construction="mine")


def test_other_families_are_refused_by_the_field(tmp_path):
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        from_dense(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)))
    for convert in (from_dense, lambda net: prune_dense(net, batches=BATCHES)):
        with pytest.raises(ValueError, match="Linear has no config: give a causal language model"):
            convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mlp_bias=True"):
        from_dense(tiny(mlp_bias=True), num_experts=4)
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        from_dense(tiny(hidden_act="gelu"), num_experts=4)
    with pytest.raises(ValueError, match=r"no config\.json"):
        from_dense(tmp_path)


def test_a_source_that_lacks_weights_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM, model\.layers\.1\.mlp\.up_proj\.weight first"):
        from_dense(tmp_path, num_experts=4, num_experts_per_tok=2)


def test_freezing_is_by_identity():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2, gate="mlp", gate_noise=True)
    assert freeze(moe, Gate) == count_parameters(moe)["gate"] == 2 * (16 * 4 + 4 * 4 + 16 * 4)
    assert all(layer.mlp.experts.gate_up_proj.requires_grad for layer in moe.model.layers)
    assert freeze(moe, moe.lm_head) == 61 * 16
    with pytest.raises(ValueError, match="has no such Conv2d"):
        freeze(moe, torch.nn.Conv2d)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_training_gates_alone_is_by_identity(kind):
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2, gate=kind, score_scale="learnable")
    assert train_only(moe, Gate) == count_parameters(moe)["gate"] == count_parameters(moe)["trainable"]
    assert {name for name, p in moe.named_parameters() if p.requires_grad} == {name for name, _ in moe.named_parameters() if ".mlp.gate." in name}
    moe(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    assert all((p.grad is not None and bool(p.grad.any())) == p.requires_grad for p in moe.parameters())
    with pytest.raises(ValueError, match="train_only: LlamaMoeForCausalLM has no such Conv2d"):
        train_only(moe, torch.nn.Conv2d)
    with pytest.raises(ValueError, match="no parameters, so nothing would be trained"):
        train_only(from_dense(tiny(), num_experts=4, num_experts_per_tok=2, gate="random"), Gate)


def test_selection_bias_moves_towards_the_idle_expert():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2, balance="bias").train()
    load = moe(input_ids=BATCHES[0], labels=BATCHES[0]).expert_load
    moe.update_selection_bias(load)
    for layer, load_E in zip(moe.model.layers, load, strict=True):
        bias = layer.mlp.gate.selection_bias
        assert (bias[load_E < load_E.mean()] > 0).all() and (bias[load_E > load_E.mean()] < 0).all()
    with pytest.raises(ValueError, match="balance='bias'"):
        from_dense(tiny(), num_experts=4, num_experts_per_tok=2).update_selection_bias(load)
