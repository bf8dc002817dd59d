"""MoE encoders: every family and head, the balance loss on its way to the task's loss, partition, files, refusals."""

import copy
import inspect
import json
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from dyn.core.partition import kept_count
from dyn.data.tiny import tiny_tokenizer
from dyn.models import encoder
from dyn.models.encoder import FAMILIES, make_moe, moe_layers
from dyn.nn.adapter import attach
from dyn.nn.count import count_parameters, macs_per_sentence
from dyn.nn.linear_experts import LinearExperts
from dyn.nn.masking import prune
from dyn.nn.partial import CRITERIA, compact, make_partial

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40, num_labels=3,
             embedding_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NAMES = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert", "electra": "Electra"}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining")


def dense(family="bert", head="ForSequenceClassification", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{NAMES[family]}Config")(**(SIZES | settings))
    return getattr(transformers, f"{NAMES[family]}{head}")(config)


def batch(B=4, L=8):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 40, (B, L), generator=g)
    mask = (torch.arange(L) < torch.tensor([L, 5, 3, 6][:B])[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}  # padding has id 1, as in RoBERTa


def labels_for(head, inputs):
    ids = inputs["input_ids"]
    return {"ForMaskedLM": dict(labels=ids), "ForSequenceClassification": dict(labels=torch.arange(4) % 3), "ForTokenClassification": dict(labels=ids % 3),
            "ForQuestionAnswering": dict(start_positions=torch.ones(4).long(), end_positions=torch.ones(4).long()),
            "ForMultipleChoice": dict(labels=torch.zeros(2).long())}.get(head, {})


def loss(model, inputs):
    return F.cross_entropy(model(**inputs).logits, torch.arange(4) % 3)


@pytest.mark.parametrize("where", ["both", "out", "int"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_dense_model(family, where):
    model, inputs = dense(family).double().eval(), batch()
    for p in model.get_submodule(family).embeddings.parameters():
        p.requires_grad_(False)
    want, before = model(**inputs).logits, dict(model.named_modules())
    trained = {n for n, p in model.named_parameters() if not p.requires_grad}
    made = make_moe(model, 4, 2, where)
    assert made is model and isinstance(made, type(dense(family))) and not made.training
    torch.testing.assert_close(made(**inputs).logits, want, rtol=0, atol=1e-12)
    layers = moe_layers(made)
    assert len(layers) == (1 if family == "albert" else 3) * (2 if where == "both" else 1)
    assert all(type(before[name]) is nn.Linear for name in layers) and not any("attention" in name for name in layers)
    assert trained == {n for n, p in made.named_parameters() if not p.requires_grad}
    assert {(m.in_features, m.out_features) for m in layers.values()} == {"both": {(16, 24), (24, 16)}, "out": {(24, 16)}, "int": {(16, 24)}}[where]
    noisy = make_moe(dense(family).double().eval(), 4, 2, where, noise=0.1)
    assert 1e-6 < (noisy(**inputs).logits - want).abs().max() < 0.5


@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f"{NAMES[f]}{h}")])
def test_the_balance_loss_reaches_every_head(family, head):
    """It is in aux_loss, in the loss while training, and in the gates' gradient; tuples hold it last but two."""
    model, inputs = make_moe(dense(family, head, num_labels=2 if "Question" in head else 3), 4, 2, balance_weight=0.5).train(), batch()
    if head == "ForMultipleChoice":
        inputs = {k: v.view(2, 2, -1) for k, v in inputs.items()}
    labels = labels_for(head, inputs)
    torch.manual_seed(2)
    out = model(**inputs, **labels)
    assert isinstance(out, transformers.utils.ModelOutput) and out.aux_loss > 0
    calls = 2 * 3
    assert out.expert_load.shape == out.expert_importance.shape == (calls, 4)
    assert (out.expert_load.sum(1) == 2 * batch()["attention_mask"].sum()).all(), "padding does not count"
    torch.testing.assert_close(out.expert_importance.sum(1), torch.full((calls,), float(batch()["attention_mask"].sum())))
    gradients = torch.autograd.grad(out.aux_loss, [p for layer in moe_layers(model).values() for p in layer.gate.parameters()], retain_graph=True)
    assert all(g.any() for g in gradients)
    torch.manual_seed(2)
    as_tuple = model(**inputs, **labels, return_dict=False)
    assert torch.equal(as_tuple[-3], out.aux_loss)
    if labels:
        model.config.balance_weight = 0.0
        torch.manual_seed(2)
        alone = model(**inputs, **labels)
        assert alone.aux_loss == 0
        torch.testing.assert_close(out.loss, alone.loss + out.aux_loss)
        model.config.balance_weight = 0.5
    quiet = model.eval()(**inputs, **labels)
    assert "aux_loss" not in quiet and type(quiet).__name__ in str(type(out).__mro__)
    asked = model(**inputs, **labels, output_router_stats=True)
    assert asked.aux_loss > 0 and (not labels or torch.equal(asked.loss, quiet.loss))
    assert "attention_mask" in inspect.signature(model.forward).parameters


def gradients(model, inputs, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**inputs, labels=torch.arange(4) % 3)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_gradient_checkpointing(family):
    plain = make_moe(dense(family, hidden_dropout_prob=0.2), 4, 2, balance_weight=1.0).train()
    out, expected = gradients(plain, batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name in transformers is about to change
        held = copy.deepcopy(plain)
        held.gradient_checkpointing_enable({"use_reentrant": False})
        again, found = gradients(held, batch())
        assert torch.equal(out.loss, again.loss) and all(torch.equal(expected[name], found[name]) for name in expected)
        held.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant=True; use gradient_checkpointing_enable"):
            gradients(held, batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_feed_forward(family):
    """Chunks of a layer's application are counted together, with the padding that lies in them."""
    model = make_moe(dense(family, chunk_size_feed_forward=2), 4, 2).double().eval()
    whole = make_moe(dense(family), 4, 2).double().eval()
    whole.load_state_dict(model.state_dict())
    one, other = (m(**batch(), output_router_stats=True) for m in (model, whole))
    torch.testing.assert_close(one.logits, other.logits)
    assert torch.equal(one.expert_load, other.expert_load)
    torch.testing.assert_close(one.aux_loss, other.aux_loss)


def test_a_whole_graph():
    model, inputs = make_moe(dense(num_hidden_layers=1), 4, 2).train(), batch()
    torch.manual_seed(0)
    want = model(**inputs, labels=torch.arange(4) % 3)
    torch._dynamo.reset()
    torch.manual_seed(0)
    out = torch.compile(model, fullgraph=True, backend="eager")(**inputs, labels=torch.arange(4) % 3)
    out.loss.backward()
    assert out.aux_loss > 0 and out.expert_load.shape == want.expert_load.shape and all(p.grad is not None for p in model.parameters())


def test_the_compact_encoder_exports():
    model = make_partial(make_moe(dense(num_hidden_layers=1), 4, 2, noise=0.2), None, None, keep=0.4, method="random").eval()
    made = compact(model)
    exported = torch.export.export(made, (batch()["input_ids"],), {"attention_mask": batch()["attention_mask"]})
    torch.testing.assert_close(exported.module()(batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits, model(**batch()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_of_copies_is_not_all_static(family, caplog):
    """Fresh copies have no mode-switch gradient: positions are ranked by removal, and the log says so."""
    model = make_moe(dense(family), 4, 2).double()
    with caplog.at_level(logging.WARNING):
        make_partial(model, [batch()], loss, keep=0.4)
    assert "so alike that switching a position's mode changes nothing; positions are ranked by |sum_k W_k dL/dW_k|" in caplog.text
    layers = moe_layers(model).values()
    total, dynamic = sum(m.weight[0].numel() for m in layers), sum(int(m.partial.mask.sum()) for m in layers)
    assert dynamic == kept_count(total, 0.4, "up") and all(m.partial.mask.any() for m in layers)
    by_removal = make_partial(make_moe(dense(family), 4, 2).double(), [batch()], loss, keep=0.4, method="removal")
    assert all(torch.equal(a.partial.mask, b.partial.mask) for a, b in zip(layers, moe_layers(by_removal).values(), strict=True))
    caplog.clear()
    make_partial(make_moe(dense(family), 4, 2, noise=0.05).double(), [batch()], loss, keep=0.4)
    assert "removing" not in caplog.text
    with pytest.raises(ValueError, match="they say nothing"):
        make_partial(make_moe(dense(family), 4, 2), [batch()], lambda m, b: 0 * loss(m, b), keep=0.4)


def test_partial_copies_still_are_the_dense_model():
    model, want = dense().double().eval(), dense().double().eval()(**batch()).logits
    make_partial(make_moe(model, 4, 2), [batch()], loss, keep=0.3)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-10, atol=1e-10)


def partial(family="bert", scales="both", keep=0.4, **kwargs):
    model = make_partial(make_moe(dense(family), 4, 2, noise=0.2, **kwargs), None, None, keep=keep, method="random", scales=scales).eval()
    for layer in moe_layers(model).values():
        if layer.partial.phi is not None:
            nn.init.constant_(layer.partial.phi, 0.4)
    return model


def test_every_criterion_ranks_experts():
    for method in CRITERIA:
        model = make_moe(dense(), 4, 2, noise=0.1, gate_std=0.02)
        inputs = batch() | labels_for("ForSequenceClassification", batch())
        make_partial(model, [inputs], loss, keep=0.4, method=method, rounds=2)
        masks = [layer.partial.mask for layer in moe_layers(model).values()]
        assert sum(int(m.sum()) for m in masks) == kept_count(sum(m.numel() for m in masks), 0.4, "up"), method


def test_synflow_sees_a_feed_forward_at_a_time():
    model, x = make_moe(dense(), 4, 2, noise=0.1), torch.ones(16)
    first, second = (layer.weight.detach().abs() for layer in list(moe_layers(model).values())[:2])
    through = {"first": (second.mean(0).sum(0)[:, None] / 4 * first).mean(0), "second": (second / 4 * (first.mean(0) @ x)).mean(0)}
    make_partial(model, [batch()], None, keep=0.3, method="synflow", rounds=1, scope="local")
    for wanted, layer in zip(through.values(), moe_layers(model).values(), strict=False):
        mask = layer.partial.mask
        assert wanted[mask].min() >= wanted[~mask].max() * (1 - 1e-5)


@pytest.mark.parametrize("scales", ["s", "d"])
def test_a_single_factor_comes_back(tmp_path, scales):
    model = partial("bert", scales)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits, rtol=0, atol=1e-6)
    made = AutoModelForSequenceClassification.from_config(again.config)
    for layer in moe_layers(made).values():
        layer.add_partial(scales)
    made.load_state_dict(model.state_dict())
    assert all(layer.partial.phi.requires_grad for net in (again, made) for layer in moe_layers(net).values())


def test_a_second_partition_freezes_nothing():
    net = nn.Sequential(*(LinearExperts(8, 8, 4, 2) for _ in range(2)))
    net[0].weight.data *= 1e-3
    for keep in (0.5, 0.3):
        make_partial(net, None, None, keep=keep, method="magnitude", rounds=1)
        assert net[0].form == "static" and net[0].partial.static.requires_grad and net[0].partial.phi.requires_grad


def test_a_static_encoder_counts_and_trains():
    model = make_partial(make_moe(dense(), 4, 2, noise=0.1), None, None, keep=0.0, method="random")
    layers = moe_layers(model).values()
    assert all(layer.form == "static" and not layer.weight.requires_grad for layer in layers)
    assert macs_per_sentence(model, 8) > 0
    loss(model.train(), batch() | labels_for("ForSequenceClassification", batch())).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name), "several processes would wait for it"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scales", ["both", "none", "prune"])
def test_files(tmp_path, family, scales):
    """Plain, masked and compact folders come back through the Auto classes without remote code, as they were, in safetensors."""
    inputs = batch()
    model = partial(family, scales)
    plain = make_moe(dense(family), 4, 2, "out", gate_noise=False, balance_weight=0.3).eval()
    for name, made in {"plain": plain, "masked": model, "compact": compact(model), "expanded": compact(model, expand=True)}.items():
        made.save_pretrained(tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["config.json", "model.safetensors"]
        assert made.config.moe_form is None, "only the file says so"
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert type(again) is type(made) and not again.training
        torch.testing.assert_close(again(**inputs).logits, made(**inputs).logits, rtol=0, atol=1e-6)
        assert count_parameters(again)["stored"] == count_parameters(made)["stored"]
    assert (tmp_path / "compact" / "model.safetensors").read_bytes() == (tmp_path / "expanded" / "model.safetensors").read_bytes()
    assert again.config.num_experts == 4 and again.config.model_type == f"dyn_moe_{family}"
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact", expand=True)
    assert all(m.partial.expand for m in moe_layers(fast).values())
    torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-6)
    short = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked", dtype=torch.bfloat16)
    assert all(m.partial.mask.dtype == torch.bool and m.weight.dtype == torch.bfloat16 for m in moe_layers(short).values())
    saved, twice = load_file(tmp_path / "masked" / "model.safetensors"), tmp_path / "twice"
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked").save_pretrained(twice)
    assert all(torch.equal(saved[key], value) for key, value in load_file(twice / "model.safetensors").items())


def test_all_dynamic_and_all_static_files(tmp_path):
    for keep in (0.0, 1.0):
        for name, made in {"masked": partial(keep=keep), "compact": compact(partial(keep=keep))}.items():
            made.save_pretrained(tmp_path / name)
            again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
            torch.testing.assert_close(again(**batch()).logits, made(**batch()).logits, rtol=0, atol=1e-6)


def test_the_encoder_alone_and_its_tokenizer(tmp_path):
    """A folder of an encoder gives one with a new head; its tokenizer is found."""
    bare = make_partial(make_moe(dense(head="Model"), 4, 2), None, None, keep=0.4, method="random").eval()
    bare.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5).eval()
    assert headed(**batch()).logits.shape == (4, 5)
    torch.testing.assert_close(headed.bert(**batch()).last_hidden_state, bare(**batch()).last_hidden_state, rtol=0, atol=1e-6)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch()).last_hidden_state, bare(**batch()).last_hidden_state, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == tiny_tokenizer()("a").input_ids


def test_files_that_do_not_fit(tmp_path):
    dense().save_pretrained(tmp_path / "dense")
    model = partial()
    kind = type(model)
    with pytest.raises(ValueError, match="is no MoE encoder, or of other settings; load a dense one with its own class and call make_moe"):
        kind.from_pretrained(tmp_path / "dense")
    compact(model).save_pretrained(tmp_path / "compact")
    file = tmp_path / "compact" / "model.safetensors"
    state, name = load_file(file), next(iter(moe_layers(model)))
    state[f"{name}.partial.bits"][0] ^= 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: the bits say \d+ of 384 positions are dynamic, and there are values for \d+"):
        kind.from_pretrained(tmp_path / "compact")
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    (tmp_path / "compact" / "config.json").write_text(json.dumps(config | {"moe_dynamic": [1, 2]}))
    with pytest.raises(ValueError, match=r"has modes of 2 layers of experts in the form 'compact'; the model has 6"):
        kind.from_pretrained(tmp_path / "compact")


@pytest.mark.parametrize("change", [{"moe_dynamic": [None, 1, 1, 1, 1, 1]}, {"moe_scales": "prune"}, {"moe_dynamic": ["a", 1, 1, 1, 1, 1]}], ids=str)
def test_configurations_that_are_not_the_files(change, tmp_path):
    model = partial()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if "moe_dynamic" in change:
        change = {"moe_dynamic": change["moe_dynamic"][:1] + config["moe_dynamic"][1:]}
    file.write_text(json.dumps(config | change))
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=r"of other settings|moe_dynamic|has a dynamic positions"):
        type(model).from_pretrained(tmp_path)


def test_models_are_pickled():
    for model in (partial(), compact(partial())):
        assert pickle.dumps(model) and getattr(encoder, type(model).__name__) is type(model)
    with pytest.raises(AttributeError, match="no attribute 'MoeGPT2Model'"):
        encoder.MoeGPT2Model  # noqa: B018


def test_other_models_of_a_configuration_stay_as_they_are():
    config = BertConfig(**SIZES)
    one, other = BertModel(config), BertModel(config)
    make_moe(one, 4, 2)
    assert other.config.model_type == "bert" and not hasattr(other.config, "num_experts")
    assert one.config is one.encoder.config and one.config.model_type == "dyn_moe_bert"
    made = type(one)(one.config)  # a new one from a configuration
    assert len(moe_layers(made)) == 6 and made(**batch()).last_hidden_state.shape == (4, 8, 16)


def replaced():
    model = dense()
    model.bert.encoder.layer[1].output.dense = nn.Identity()
    return model


def tied(of):
    model = dense()
    first, last = model.bert.encoder.layer[0].output, model.bert.encoder.layer[2].output
    if of == "layer":
        last.dense = first.dense
    else:
        setattr(last.dense, of, getattr(first.dense, of))
    return model


@pytest.mark.parametrize(("model", "settings", "message"), [
    *((lambda of=of: tied(of), {}, r"bert.encoder.layer.0.output.dense shares its parameters with another place") for of in ("layer", "weight", "bias")),
    (lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)), {},
     r"GPT2Model \(model_type 'gpt2'\) is not supported; allowed: bert, roberta, albert"),
    (lambda: nn.Linear(3, 3), {}, r"Linear \(model_type None\) is not supported"), (lambda: make_moe(dense(), 4, 2), {}, "has experts already"),
    (dense, dict(num_experts=2, num_experts_per_tok=3), r"num_experts_per_tok=3 must be between 1 and num_experts=2, both integers \(make_moe\)"),
    (dense, dict(num_experts_per_tok=0), "num_experts_per_tok=0 must be between 1"),
    (dense, dict(where="in"), "where='in' is unknown; allowed: both, out, int"),
    (dense, dict(gate="top"), "gate='top' is unknown"),
    (dense, dict(gate="switch", num_experts_per_tok=1), "gate='switch' gives scores that do not sum to one"),
    (dense, dict(noise=-1.0), "noise=-1.0 must be at least 0"), (dense, dict(balance_weight=float("nan")), "balance_weight=nan must be at least 0, and finite"),
    (replaced, {}, r"bert.encoder.layer.1.output.dense is a Identity, where an nn.Linear was expected"),
    (lambda: dense(is_decoder=True), {}, "is a decoder"),
])
def test_refusals(model, settings, message):
    made = model()
    before = {name: type(m) for name, m in made.named_modules()}
    with pytest.raises(ValueError, match=message):
        make_moe(made, **settings)
    assert {name: type(m) for name, m in made.named_modules()} == before, "nothing half done"


def test_a_subclass_of_somebody_elses():
    class Mine(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            return super().forward(input_ids, attention_mask, **kwargs)

    model = make_moe(Mine(BertConfig(**SIZES)), 4, 2).train()
    assert isinstance(model, Mine) and model(*batch().values()).aux_loss > 0


@pytest.mark.parametrize("hang", [
    lambda net: attach(net, "lora", 4, where=("query", "ffn")), lambda net: prune(net, method="magnitude", params=r"layer.\d.output\.dense\.weight", keep=0.5),
    lambda net: net.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *args: None),
    lambda net: nn.utils.parametrizations.weight_norm(net.bert.encoder.layer[1].output.dense), lambda net: torch_prune.identity(
        net.bert.encoder.layer[1].output.dense, "weight")], ids=["adapter", "mask", "hook", "norm", "torch's mask"])
def test_what_hangs_on_a_linear_is_not_dropped(hang):
    net = dense()
    hang(net)
    kept = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"make_moe: bert\.encoder\.layer\.\d\.(intermediate|output)\.dense .*replace feed-forward layers before"):
        make_moe(net, 4, 2)
    assert [type(m) for m in net.modules()] == kept


def test_all_layers_or_none(monkeypatch):
    net, real, made = dense(), LinearExperts.from_linear, []

    def fails(*args, **kwargs):
        made.append(args)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(LinearExperts, "from_linear", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_moe(net, 4, 2)
    assert len(made) == 3 and not any(isinstance(m, LinearExperts) for m in net.modules())


def test_static_values_train_in_the_compact_form_too():
    net = make_partial(make_moe(dense(), 4, 2), [], None, keep=0, method="random")
    for made in (net, compact(net)):
        static = [p for name, p in made.named_parameters() if name.endswith("partial.static")]
        assert len(static) == 6 and all(p.requires_grad for p in static)
