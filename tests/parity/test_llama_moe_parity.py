"""The converted model against transformers' dense ones: same hidden states where theory says so, for every family."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Trainer, TrainingArguments

import dyn.models  # noqa: F401  (registers dyn_llama_moe)
from dyn.models.llama_moe import LlamaMoeForCausalLM, from_dense

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_bias_head": LlamaConfig(**SIZES, attention_bias=True, head_dim=12),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(0))


def tiny(family: str = "llama", dtype=torch.float32):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype).eval()
    with torch.no_grad():  # non-trivial norms and biases
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0 if p.mean() > 0.5 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 2])
def test_every_expert_with_equal_scores_and_scale_n_is_the_dense_model(family, shared):
    dense = tiny(family)
    moe = from_dense(dense, num_experts=4, num_experts_per_tok=4, num_shared_experts=shared, gate="uniform", score_scale="n")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    for attention_mask in (None, mask):
        with torch.no_grad():
            want = dense(input_ids=IDS, attention_mask=attention_mask).logits
            got = moe(input_ids=IDS, attention_mask=attention_mask).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_gives_equal_logits_and_the_manifest(family, tmp_path):
    moe = from_dense(tiny(family), num_experts=4, num_experts_per_tok=2, gate="mlp", gate_noise=True, seed=3).eval()
    moe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert list(tmp_path.glob("model-*.safetensors")), "sharded"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaMoeForCausalLM)
    assert loaded.config._experts_implementation == "dyn"
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, moe(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
    assert loaded.construction.seed == 3 and loaded.construction.source_hash == moe.construction.source_hash
    for got, want in zip(loaded.construction.groups, moe.construction.groups, strict=True):
        torch.testing.assert_close(got, want)


def test_experts_implementations_agree():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).eval()
    logits = {}
    for name in ("dyn", "eager", "batched_mm", "grouped_mm"):
        moe.set_experts_implementation(name)
        with torch.no_grad():
            logits[name] = moe(input_ids=IDS).logits
    for name, value in logits.items():
        torch.testing.assert_close(value, logits["eager"], atol=1e-5, rtol=1e-5, msg=name)


def test_generation_with_cache_equals_generation_without():
    moe = from_dense(tiny("mistral"), num_experts=4, num_experts_per_tok=2, seed=1).eval()
    arguments = dict(input_ids=IDS[:, :6], max_new_tokens=8, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(moe.generate(**arguments), moe.generate(**arguments, use_cache=False))


def test_outputs_come_in_the_order_of_transformers(tmp_path):
    dense = tiny()
    moe = from_dense(dense, num_experts=4, num_experts_per_tok=2).eval()
    for net in (dense, moe):
        assert net(input_ids=IDS, labels=IDS)[0].dim() == 0 and net(input_ids=IDS, labels=IDS, return_dict=False)[1].shape == (2, 14, 97)
        assert net(input_ids=IDS)[0].shape == (2, 14, 97) and isinstance(net.model(input_ids=IDS, return_dict=False), tuple)
        assert net.model(input_ids=IDS).past_key_values.get_seq_length() == 14 and net.model(input_ids=IDS, use_cache=False).past_key_values is None
    moe.config.return_dict = False
    assert isinstance(moe(input_ids=IDS), tuple) and isinstance(moe.model(input_ids=IDS), tuple)
    moe.config.return_dict = True
    trainer = Trainer(moe, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), eval_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (2, 14, 97)


@pytest.mark.parametrize("settings", [dict(num_experts_per_tok=2), dict(num_experts_per_tok=1, gate="switch", balance="switch", capacity_factor=0.5)])
def test_gradient_checkpointing_changes_no_gradient(settings):
    grads = []
    for checkpointing in (False, True):
        moe = from_dense(tiny(), num_experts=4, gate_noise=True, seed=2, **settings).train()
        if checkpointing:
            moe.gradient_checkpointing_enable()
        torch.manual_seed(5)  # same gate noise
        output = moe(input_ids=IDS, labels=IDS)
        assert output.loss > output.lm_loss and output.aux_loss > 0
        output.loss.backward()
        grads.append({n: p.grad.clone() for n, p in moe.named_parameters()})
        assert all(g is not None for g in grads[-1].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


def test_the_loss_has_every_layers_losses_times_their_weights():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).train()
    moe.config.balance_weight, moe.config.z_loss_weight = 0.3, 0.07
    seen, hooks = [], [layer.mlp.gate.register_forward_hook(lambda gate, _, routed: seen.append(gate.statistics(routed.choice))) for layer in moe.model.layers]
    output = moe(input_ids=IDS, labels=IDS)
    for hook in hooks:
        hook.remove()
    wanted = sum(0.3 * routed.balance_loss + 0.07 * routed.z_loss for routed in seen)
    assert len(seen) == 3 and all(routed.z_loss > 0 for routed in seen)
    torch.testing.assert_close(output.aux_loss, wanted.to(output.aux_loss.dtype))
    torch.testing.assert_close(output.loss, output.lm_loss + wanted)


def test_the_balance_loss_is_a_share_where_steps_are_accumulated():
    """As transformers' Trainer does, who gives the targets of the whole step to every part of it."""
    moe, gradients = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).train(), []
    moe.config.balance_weight = 1000.0
    for parts in (1, 4):
        moe.zero_grad()
        for _ in range(parts):  # all alike, so that the balance is of the same tokens
            moe(input_ids=IDS, labels=IDS, num_items_in_batch=torch.tensor(parts * IDS[:, 1:].numel())).loss.backward()
        gradients.append(moe.model.layers[0].mlp.gate.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("where", ["config", "call"])
def test_hidden_states_and_attention_are_given_out(where, tmp_path):
    dense = tiny()
    moe = from_dense(dense, num_experts=4, num_experts_per_tok=4, gate="uniform", score_scale="n").eval()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for model in (dense, moe):
        model.set_attn_implementation("eager")
        for name, value in wanted.items() if where == "config" else ():
            setattr(model.config, name, value)
    with torch.no_grad():
        theirs, ours = (model(input_ids=IDS, **(wanted if where == "call" else {})) for model in (dense.eval(), moe))
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name])
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    moe.config.output_attentions = False
    moe.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="output_attentions=True needs attn_implementation='eager'; sdpa makes no attention weights"):
        moe(input_ids=IDS, output_attentions=True)
    moe.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).last_hidden_state, ours.hidden_states[-1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_logits_are_given_out(checkpointing):
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2, gate_noise=True).train()
    if checkpointing:
        moe.gradient_checkpointing_enable()
    seen = [[] for _ in moe.model.layers]
    for layer, inputs in zip(moe.model.layers, seen, strict=True):
        layer.mlp.gate.register_forward_hook(lambda gate, args, _, inputs=inputs: inputs.append(args[0].detach()))
    output = moe(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert moe(input_ids=IDS).router_logits is None
    for layer, inputs, logits_TE in zip(moe.model.layers, seen, output.router_logits, strict=True):
        torch.testing.assert_close(logits_TE, layer.mlp.gate.logits(inputs[0]), atol=0, rtol=0)
    output.router_logits[-1].sum().backward()
    assert moe.model.layers[-1].mlp.gate.weight.grad.abs().sum() > 0
    moe.eval()
    torch.testing.assert_close(moe.model(IDS, output_router_logits=True).router_logits, moe(input_ids=IDS, output_router_logits=True).router_logits)
    moe.config.output_router_logits = True
    assert len(moe(input_ids=IDS).router_logits) == len(seen) and moe(input_ids=IDS, output_router_logits=False).router_logits is None
    plain = from_dense(tiny(), num_experts=4, num_experts_per_tok=4, gate="uniform")
    with pytest.raises(ValueError, match="output_router_logits=True: a gate of kind 'uniform' has no logits"):
        plain(input_ids=IDS, output_router_logits=True)


def test_padding_is_not_in_the_statistics():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).eval()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    output = moe(input_ids=IDS, attention_mask=mask, output_router_stats=True)
    assert output.expert_load.shape == (3, 4)
    assert output.expert_load.sum(-1).tolist() == [2 * mask.sum()] * 3
    assert (output.dropped_mass > 0).all() and (output.dropped_mass < 1).all()


def test_packed_documents_do_not_see_each_other():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).eval()
    packed = IDS[:1]
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with torch.no_grad():
        together = moe(input_ids=packed, position_ids=positions, use_cache=False).logits
        alone = moe(input_ids=packed[:, 6:], use_cache=False).logits
    torch.testing.assert_close(together[:, 6:], alone, atol=1e-5, rtol=1e-5)


def test_compiles():
    moe = from_dense(tiny(), num_experts=4, num_experts_per_tok=2).eval()
    with torch.no_grad():
        want = moe(input_ids=IDS, use_cache=False).logits
        got = torch.compile(moe, backend="aot_eager", fullgraph=True)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
