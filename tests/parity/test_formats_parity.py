"""Other layouts: the released LLaMA-MoE-v1 one against a restatement of its forward; exports against transformers' own Mixtral and Qwen2-MoE."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen2MoeForCausalLM

import dyn.models  # noqa: F401
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM, from_official, to_mixtral, to_qwen2_moe

IDS = torch.arange(26).view(2, 13).mul(37).remainder(96)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaMoeForCausalLM:
    """A random model of 2 layers, far from ties, every parameter (noise and scales too) away from its start."""
    settings = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, bos_token_id=3, eos_token_id=[5, 7],
                    pad_token_id=9, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=0, gate="linear",
                    gate_noise=False, score_scale=2.0)
    model = LlamaMoeForCausalLM(LlamaMoeConfig(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * spread if "norm" in name else 1.5 + 0.2 * spread if "score_scale" in name else 0.25 * spread)
    return model.to(dtype)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits.float()


def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


# --- the released layout -------------------------------------------------------------------------------------------------------------


def official_weights(config: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.25 * torch.randn(*shape, generator=generator)

    D, E, heads, kv = config["hidden_size"], config["num_experts"], config["num_attention_heads"], config["num_key_value_heads"]
    head = D // heads
    weights = {"model.embed_tokens.weight": draw(config["vocab_size"], D), "model.norm.weight": 1 + draw(D), "lm_head.weight": draw(config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        p, width = f"model.layers.{i}.", config["size_experts"][i][0]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}{norm}.weight"] = 1 + draw(D)
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            weights[f"{p}self_attn.{name}_proj.weight"] = draw(rows * head, D)
        weights[f"{p}self_attn.o_proj.weight"] = draw(D, heads * head)
        weights[f"{p}self_attn.rotary_emb.inv_freq"] = torch.ones(head // 2)
        if config["gate_network"] == "mlp":
            weights |= {f"{p}mlp.gate.gate_network.0.weight": draw(E, D), f"{p}mlp.gate.gate_network.2.weight": draw(E, E)}
        else:
            weights[f"{p}mlp.gate.gate_network.weight"] = draw(E, D)
        if config["gate_add_noise"]:
            weights[f"{p}mlp.gate.weight_noise.weight"] = draw(E, D)
        if config["add_weight_norm"]:
            weights[f"{p}mlp.calculator.mlp_norm.weight"] = 1.5 + draw(1)
        for e in range(E):
            bank = f"{p}mlp.calculator.experts.weight"
            weights |= {f"{bank}_gate.{e}": draw(width, D), f"{bank}_up.{e}": draw(width, D), f"{bank}_down.{e}": draw(D, width)}
    return weights


OFFICIAL = {
    "model_type": "llama_moe", "architectures": ["LlamaMoEForCausalLM"], "auto_map": {"AutoConfig": "configuration_llama_moe.LlamaMoEConfig"},
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    "num_experts": 4, "num_selects": 2, "size_experts": [[12] * 4] * 2,
    "gate_type": "TopKBalancedNoisyGate", "gate_network": "mlp", "gate_use_softmax": True, "gate_use_balance": True, "gate_balance_loss_weight": 0.02,
    "gate_add_noise": True, "gate_noise_epsilon": 0.03, "calculator_type": "UniversalCalculator", "multiply_gate_scores": True, "score_scale_factor": 4.0,
    "add_weight_norm": False, "drop_tokens": True, "capacity_factor": 1.25,
}


def official_folder(folder, config, weights, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[s::shards]}, folder / file)
        index |= dict.fromkeys(names[s::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def restated(config, w, ids):
    """The official forward in evaluation: LLaMA with multi-head attention, an argsort for the top-k of the gate, and experts one after another."""
    B, L = ids.shape
    D, heads, kv, k = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"], config["num_selects"]
    head = D // heads

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight

    angle = torch.outer(torch.arange(L).float(), config.get("rope_theta", 10000.0) ** -(torch.arange(0, head, 2).float() / head))

    def rotate(x):  # pairs (j, j + head / 2) as complex numbers
        z = torch.complex(x[..., : head // 2], x[..., head // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, w[f"{p}input_layernorm.weight"])
        q, key, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).view(B, L, -1, head).transpose(1, 2) for n in "qkv")
        key, v = (t.repeat_interleave(heads // kv, dim=1) for t in (rotate(key), v))
        scores = (rotate(q) @ key.mT / head**0.5).masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, D) @ w[f"{p}self_attn.o_proj.weight"].T
        h = norm(x, w[f"{p}post_attention_layernorm.weight"]).view(-1, D)
        g = f"{p}mlp.gate.gate_network."
        gate = torch.tanh(h @ w[f"{g}0.weight"].T) @ w[f"{g}2.weight"].T if config["gate_network"] == "mlp" else h @ w[f"{g}weight"].T
        chosen = gate.argsort(dim=-1, descending=True)[:, :k]
        score = gate.gather(1, chosen).softmax(-1)
        factor = config["score_scale_factor"]
        factor = factor[i] if isinstance(factor, list) else factor
        if config["add_weight_norm"]:
            factor = w[f"{p}mlp.calculator.mlp_norm.weight"]
        y = torch.zeros_like(h)
        for e in range(config["num_experts"]):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            bank = f"{p}mlp.calculator.experts.weight"
            out = (F.silu(h[token] @ w[f"{bank}_gate.{e}"].T) * (h[token] @ w[f"{bank}_up.{e}"].T)) @ w[f"{bank}_down.{e}"].T
            y.index_add_(0, token, out * score[token, slot, None] * factor)
        x = x + y.view(B, L, D)
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


@pytest.mark.parametrize("changes", [
    {},
    {"gate_network": "linear", "num_selects": 3},
    {"score_scale_factor": [4.0, 1.25], "rope_theta": 500.0},
    {"gate_add_noise": False, "num_selects": 4},
    {"add_weight_norm": True},
    {"tie_word_embeddings": True},
    {"size_experts": [[12] * 4, [20] * 4]},
], ids=lambda c: "-".join(c) or "released")
@pytest.mark.parametrize("shards", [1, 3])
def test_official_logits(tmp_path, changes, shards):
    config = OFFICIAL | changes
    weights = official_weights(config)
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    model = from_official(official_folder(tmp_path / "v1", config, weights, shards))
    assert not model.training and model.dtype == torch.float32
    torch.testing.assert_close(logits(model), restated(config, weights, IDS), atol=1e-5, rtol=1e-5)


def test_official_model_is_one_of_ours(tmp_path):
    model = from_official(official_folder(tmp_path / "v1", OFFICIAL, official_weights(OFFICIAL)))
    config = model.config
    assert (config.model_type, config.gate, config.gate_noise, config.noise_epsilon, config.balance, config.balance_weight) == (
        "dyn_llama_moe", "mlp", True, 0.03, "importance_load", 0.02)
    assert (config.rms_norm_eps, config.eos_token_id, config.rope_parameters["rope_theta"], config.moe_intermediate_size) == (1e-5, 2, 10000.0, 12)
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()), logits(model), atol=0, rtol=0)
    model.train()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_official_dtype(tmp_path):
    weights = {name: w.to(torch.bfloat16) for name, w in official_weights(OFFICIAL).items()}
    folder = official_folder(tmp_path / "v1", OFFICIAL | {"torch_dtype": "bfloat16"}, weights)
    kept, wide = from_official(folder), from_official(folder, dtype=torch.float32)
    assert kept.dtype == torch.bfloat16 and wide.dtype == torch.float32
    name = "model.layers.1.mlp.calculator.experts.weight_up.2"
    for model in (kept, wide):
        assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[2, 12:], weights[name].to(model.dtype))
    (folder / "model.safetensors").unlink()  # nothing of the model is a view of the file
    assert logits(kept).isfinite().all()


# --- out -----------------------------------------------------------------------------------------------------------------------------

PLAIN = {
    "linear": {},
    "noise": {"gate_noise": True},
    "uniform": {"gate": "uniform", "num_experts_per_tok": 4, "score_scale": 4.0},
    "scales": {"score_scale": [0.5, 3.0]},
    "learnable": {"learnable_scale": True},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16},
    "window": {"sliding_window": 4},
    "top3": {"num_experts": 5, "num_experts_per_tok": 3},
    "llama3-rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 8}},
}
SHARED = {f"shared-{name}": {"num_shared_experts": 1} | PLAIN[name] for name in ("linear", "noise", "uniform", "learnable", "tied", "head_dim", "window")}
SHARED["shared-scales"] = {"num_shared_experts": 3, "score_scale": [0.5, 3.0]}
BIAS = {"bias": {"num_shared_experts": 1, "attention_bias": True},
        "mixed": {"num_shared_experts": 1, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}}


def same_fields(ours, theirs, *names):
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("case", [*PLAIN, *SHARED])
def test_mixtral_logits(tmp_path, case):
    moe = tiny(**(PLAIN | SHARED)[case])
    folder = to_mixtral(moe, tmp_path / "new" / "mixtral", fold_shared=case in SHARED)
    plain = load(MixtralForCausalLM, folder)
    torch.testing.assert_close(logits(plain), logits(moe), atol=1e-5, rtol=1e-5)
    same_fields(moe.config, plain.config, "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "head_dim", "tie_word_embeddings",
                "rms_norm_eps", "rope_parameters", "num_experts_per_tok", "sliding_window")
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is MixtralForCausalLM


@pytest.mark.parametrize("case", [*SHARED, *BIAS])
def test_qwen2_moe_logits(tmp_path, case):
    moe = tiny(**(SHARED | BIAS)[case])
    folder = to_qwen2_moe(moe, tmp_path / "qwen")
    plain = load(Qwen2MoeForCausalLM, folder)
    torch.testing.assert_close(logits(plain), logits(moe), atol=1e-5, rtol=1e-5)
    same_fields(moe.config, plain.config, "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps",
                "rope_parameters", "num_experts_per_tok", "layer_types")


@pytest.mark.parametrize("case", ["window", "head_dim"])
def test_the_settings_matter(case):
    """Were these settings lost in both, the comparisons above would pass all the same."""
    moe, plain = tiny(**PLAIN[case]), tiny()
    if case == "window":
        plain.load_state_dict(moe.state_dict())
        assert (logits(moe) - logits(plain)).abs().max() > 1e-2
    else:
        assert moe.model.layers[0].self_attn.q_proj.out_features == 64


@pytest.mark.parametrize("export", [to_mixtral, to_qwen2_moe])
def test_generate_and_padding(tmp_path, export):
    moe = tiny(seed=3, num_shared_experts=1, sliding_window=6)
    moe.generation_config.max_new_tokens = 12
    moe.generation_config.eos_token_id = None
    folder = to_mixtral(moe, tmp_path / "d", fold_shared=True) if export is to_mixtral else to_qwen2_moe(moe, tmp_path / "d")
    plain = load(MixtralForCausalLM if export is to_mixtral else Qwen2MoeForCausalLM, folder)
    assert plain.generation_config.max_new_tokens == 12
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    ours, theirs = (m.generate(input_ids=IDS, attention_mask=mask, do_sample=False) for m in (moe, plain))
    assert ours.shape == (2, IDS.shape[1] + 12) and torch.equal(ours, theirs)


def test_sharded_export(tmp_path, monkeypatch):
    from dyn.models import llama_moe_formats

    monkeypatch.setattr(llama_moe_formats, "SHARD_BYTES", 20_000)
    moe = tiny()
    folder = to_mixtral(moe, tmp_path / "d")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert all(name in load_file(folder / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(folder / file).values())
    torch.testing.assert_close(logits(load(MixtralForCausalLM, folder)), logits(moe), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_powers_of_two_are_exact(tmp_path, dtype):
    moe = tiny(dtype=dtype, num_shared_experts=1, score_scale=[4.0, 0.3])
    for folder in (to_mixtral(moe, tmp_path / "m", fold_shared=True), to_qwen2_moe(moe, tmp_path / "q")):
        stored = load_file(folder / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {dtype}
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
    down = moe.model.layers[0].mlp.experts.down_proj
    assert torch.equal(stored["model.layers.0.mlp.experts.1.down_proj.weight"], down[1] * 4)
    rounded = stored["model.layers.1.mlp.experts.2.down_proj.weight"].float()
    exact = moe.model.layers[1].mlp.experts.down_proj[2].float() * 0.3
    assert ((rounded - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7).all()
    assert torch.equal(stored["model.layers.0.mlp.shared_expert.down_proj.weight"], moe.model.layers[0].mlp.shared_experts.down_proj.weight * 2)


def test_files_have_the_names_of_mixtral_checkpoints(tmp_path):
    """What vLLM and llama.cpp's converter look for; and what transformers' own save_pretrained writes."""
    moe = tiny()
    folder = to_mixtral(moe, tmp_path / "d")
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in stored and "model.layers.0.block_sparse_moe.gate.weight" in stored
    load(MixtralForCausalLM, folder).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == theirs.keys() and all(torch.equal(stored[name], theirs[name]) for name in theirs)
    shared = to_qwen2_moe(tiny(num_shared_experts=1), tmp_path / "q")
    load(Qwen2MoeForCausalLM, shared).save_pretrained(tmp_path / "theirs-q")
    assert load_file(shared / "model.safetensors").keys() == load_file(tmp_path / "theirs-q" / "model.safetensors").keys()
