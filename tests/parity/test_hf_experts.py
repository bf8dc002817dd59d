"""`experts_implementation="dyn"` in tiny random models of transformers: logits and all gradients of the eager implementation."""

import pytest
import torch
import transformers
from torch import nn

from dyn.models import experts_interface  # registers "dyn"
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM

SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "mixtral, gelu": lambda: transformers.MixtralConfig(**SMALL, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, hidden_act="gelu"),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=10, shared_expert_intermediate_size=14, num_experts=5, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=6, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, intermediate_size=7, num_experts=8, num_experts_per_tok=4, pad_token_id=0, eos_token_id=1),
    "ours": lambda: LlamaMoeConfig(
        **SMALL, intermediate_size=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, gate="linear", gate_noise=False),
}
PRODUCTS = ("mixtral, gelu",)  # those whose gate is not SwiGLU


def tiny(name: str, implementation: str = "eager"):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    kind = LlamaMoeForCausalLM if name == "ours" else transformers.AutoModelForCausalLM
    model = kind._from_config(config) if name == "ours" else kind.from_config(config)
    for p in model.parameters():  # larger than the initialisation, so that no expert is next to nothing
        nn.init.normal_(p, std=0.3)
    model.set_experts_implementation(implementation)
    return model.eval()


def logits_and_gradients(model):
    ids = torch.randint(2, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, b in want.items():
        a = got[name]
        assert (a is None) == (b is None), name
        if b is not None:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, f"{name}: {(a - b).norm() / b.norm():.2g}"


@pytest.fixture
def calls(monkeypatch):
    """Names of our ops in the order in which models called them."""
    seen = []
    for name in ("experts", "routed_linear"):
        op = getattr(experts_interface, name)
        monkeypatch.setattr(experts_interface, name, lambda *args, op=op, name=name: (seen.append(name), op(*args))[1])
    return seen


@pytest.mark.parametrize("name", list(CONFIGS))
def test_set_at_run_time(name, calls):
    model = tiny(name)
    want = logits_and_gradients(model)
    assert calls == []
    model.set_experts_implementation("dyn")
    got = logits_and_gradients(model)
    assert calls == 2 * (["routed_linear"] * 2 if name in PRODUCTS else ["experts"])
    assert_same(got, want)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_from_pretrained(name, tmp_path, calls):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="dyn", dtype=torch.float32).eval()
    assert loaded.config._experts_implementation == "dyn"
    assert_same(logits_and_gradients(loaded), logits_and_gradients(model))
    assert set(calls) == {"routed_linear" if name in PRODUCTS else "experts"}


def experts_of(kind: str):
    """A module of experts of one family, filled, with no model around it."""
    if kind == "minimax_m3_vl":
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts as Experts
        from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextConfig as Config
        config = Config(hidden_size=12, intermediate_size=10, num_local_experts=5)
    else:
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config as Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts as Experts
        config = Config(hidden_size=12, moe_intermediate_size=10, n_routed_experts=5, swiglu_limit=0.5)
    config._experts_implementation = "eager"
    module = Experts(config)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    return module, config


@pytest.mark.parametrize("kind", ["minimax_m3_vl", "deepseek_v4"])
@pytest.mark.parametrize("sentinels", [False, True])
def test_a_gate_of_its_own(kind, sentinels, calls):
    module, config = experts_of(kind)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(23, 12, generator=g, requires_grad=True), torch.rand(23, 3, generator=g, requires_grad=True)
    idx = torch.rand(23, 5, generator=g).topk(3).indices
    if sentinels:
        idx = torch.where(torch.rand(23, 3, generator=g) < 0.4, 5, idx)
    results = []
    for implementation in ("eager", "dyn"):
        config._experts_implementation = implementation
        # Not every version of transformers takes sentinels in its own loop: what they stand for is a weight of zero.
        y = module(x, idx, weight) if implementation == "dyn" else module(x, idx.clamp(max=4), weight.masked_fill(idx == 5, 0))
        leaves = {"x": x, "weight": weight, **dict(module.named_parameters())}
        results.append({"y": y} | dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True)))
    assert calls == ["routed_linear"] * 2
    assert_same(*results)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_no_tokens(name):
    model = tiny(name, "dyn")
    module = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    assert module(torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 16)


def test_other_layouts_are_refused():
    config = transformers.GptOssConfig(**SMALL, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("dyn")
    with pytest.raises(ValueError, match=r"needs is_transposed=False; GptOssExperts has is_transposed=True"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("flag", list(experts_interface.LAYOUT))
def test_every_flag_is_named(flag):
    module, config = experts_of("minimax_m3_vl")
    config._experts_implementation = "dyn"
    setattr(module, flag, not experts_interface.LAYOUT[flag])
    with pytest.raises(ValueError, match=f"needs {flag}={experts_interface.LAYOUT[flag]}"):
        module(torch.zeros(1, 12), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
