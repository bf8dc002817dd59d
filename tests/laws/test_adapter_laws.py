"""What must hold for every adapter on every host, without a reference to compare with."""

from __future__ import annotations

import copy

import pytest
import torch

from dyn.nn.adapter import adapter_parameters, adapters, attach, detach, flatten_prefix, head_parameters, merge, set_active, unmerge
from dyn.nn.adapter_build import FLAGS
from dyn.nn.adapter_sites import sites

FAMILIES = ["bert", "roberta", "xlm_roberta", "electra", "albert", "distilbert", "bart", "llama", "mistral", "qwen2", "qwen3", "llama_moe"]
KINDS = [kind for kind in FLAGS if kind != "fusion"]


def task_of(family):
    return "lm" if family in ("llama_moe", "bart") else "base" if family == "mistral" else "classify"


def run(model, batch):
    return model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))[0]


def stir(model, name="default", seed=1, std=0.3):
    """Give an adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_and_the_head_train(tiny_host, tiny_text, family, kind):
    model, batch = tiny_host(family, task_of(family)), tiny_text()
    before, host = run(model, batch), {key: p.clone() for key, p in model.state_dict().items()}
    attach(model, kind, 8, seed=0)
    stir(model)
    after = run(model, batch)
    assert not torch.allclose(before, after, atol=1e-4)
    after.float().square().mean().backward()
    trained = adapter_parameters(model) | head_parameters(model)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(trained) == {key for key, p in model.named_parameters() if p.grad is not None}
    still = [key for key, p in adapter_parameters(model).items() if p.grad.abs().sum() == 0]
    assert len(still) <= 4 and all(key.endswith((".key", "down.weight", "down.bias")) for key in still)
    assert bool(head_parameters(model)) == (task_of(family) == "classify")
    detach(model)
    assert not sites(model) and model.state_dict().keys() == host.keys()
    assert all(torch.equal(p, host[key]) for key, p in model.state_dict().items())
    assert torch.equal(run(model, batch), before)


@pytest.mark.parametrize(("kind", "init"), [("houlsby", "lora"), ("houlsby", "zero_up"), ("pfeiffer", "lora"), ("parallel", "lora"), ("lora", "lora"),
                                            ("lora", "zero_up")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_start_is_the_host_to_the_bit(tiny_host, tiny_text, family, kind, init):
    model, batch = tiny_host(family, task_of(family)), tiny_text()
    before = run(model, batch)
    assert torch.equal(run(attach(model, kind, 4, init=init), batch), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "bart", "llama"])
def test_mixed_in_a_batch_is_each_alone(tiny_host, tiny_text, family, kind):
    model, batch = tiny_host(family, "lm" if family in ("bart", "llama") else "classify"), tiny_text(5)
    for name, r in (("a", 4), ("b", 3)):
        stir(attach(model, kind, r, name), name, seed=r)
    with torch.no_grad():
        alone = {name: run(set_active(model, name), batch) for name in ("a", "b", None)}
        choice = ["b", None, "a", "a", "b"]
        mixed = run(set_active(model, choice), batch)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    assert torch.allclose(mixed, torch.stack([alone[name][i] for i, name in enumerate(choice)]), atol=2e-6)


def test_heads_go_with_their_adapters(tiny_host, tiny_text):
    model, batch = tiny_host(), tiny_text()
    attach(model, "pfeiffer", 4, "a")
    attach(model, "lora", 4, "b")
    with torch.no_grad():
        for p in head_parameters(model, "b").values():
            p += 1.0
    outputs = {name: run(set_active(model, name), batch) for name in ("a", "b")}
    mixed = run(set_active(model, ["a", "b", "b", "a"]), batch)
    assert torch.allclose(mixed, torch.stack([outputs["a"][0], outputs["b"][1], outputs["b"][2], outputs["a"][3]]), atol=1e-6)
    set_active(model, "a", train=True)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "a") | head_parameters(model, "a"))


@pytest.mark.parametrize("where", [("query", "value"), ("query", "key", "value", "output", "ffn")])
@pytest.mark.parametrize("family", ["bert", "bart", "albert", "qwen2"])
def test_merged_equals_unmerged_and_comes_off_to_the_bit(tiny_host, tiny_text, family, where):
    model, batch = tiny_host(family, task_of(family)), tiny_text()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        apart = run(stir(attach(model, "lora", 4, where=where, head=False), std=0.1), batch)
        merged = run(merge(model), batch)
        assert not torch.equal(model.get_parameter(next(k for k in before if k.endswith(("query.weight", "q_proj.weight")))),
                               before[next(k for k in before if k.endswith(("query.weight", "q_proj.weight")))])
        assert (merged - apart).abs().max() <= 1e-5
        assert torch.equal(run(unmerge(model), batch), apart)
    assert all(torch.equal(model.get_parameter(key), p) for key, p in before.items())


def test_merge_in_float64_and_density(tiny_host):
    """|dY| <= 1e-12, and the change is dense as (1 - (1 - p^2)^r) says (section 7.10)."""
    from dyn.nn.adapter_modules import LoRA

    torch.manual_seed(0)
    x, weight = torch.randn(8, 768, dtype=torch.float64), torch.randn(768, 768, dtype=torch.float64)
    for r, keep, expected in ((10, 0.6, 0.98847), (10, 0.2, 0.33517), (64, 0.2, 0.92666)):
        lora = LoRA(768, 768, r, scaling=3.2, dtype=torch.float64)
        lora.draw("bert")
        with torch.no_grad():
            for p in lora.parameters():
                p *= torch.rand(p.shape) < keep
            assert (x @ (weight + lora.change()).T - (x @ weight.T + lora(x))).abs().max() <= 1e-12
            assert lora.change().count_nonzero().item() / weight.numel() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_fusion_of_one_is_that_adapter(tiny_host, tiny_text, kind):
    """One weight, which is 1, and a value matrix that is the identity."""
    model, batch = tiny_host(), tiny_text()
    alone = run(stir(attach(model, kind, 4, "a", head=False), "a"), batch)
    attach(model, "fusion", name="f", members=["a"], head=False)
    assert torch.allclose(run(model, batch), alone, atol=1e-3)
    attach(model, "fusion", name="static", members=["a"], value=False, head=False)
    assert torch.allclose(run(model, batch), alone, atol=1e-6)


def test_fusion_of_equals_is_one_of_them(tiny_host, tiny_text):
    model, batch = tiny_host(), tiny_text()
    for name in ("a", "b", "c"):
        alone = run(stir(attach(model, "pfeiffer", 4, name, head=False), name), batch)
    attach(model, "fusion", name="f", members=["a", "b", "c"], value=False, head=False)
    assert torch.allclose(run(model, batch), alone, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "reparam"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_checkpointed_layers_give_the_same_gradients(tiny_host, tiny_text, family, kind):
    model, batch = tiny_host(family, task_of(family)), tiny_text()
    model.config.use_cache = False
    stir(attach(model, "prefix", 4, reparam=True, width=8) if kind == "reparam" else attach(model, kind, 4))
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(m, key, None), float):
                setattr(m, key, 0.0)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train().zero_grad()
        run(model, batch).float().square().mean().backward()
        found.append({key: p.grad.clone() for key, p in adapter_parameters(model).items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("kind", [*KINDS, "fusion"])
def test_a_copy_is_whole(tiny_host, tiny_text, kind):
    model, batch = tiny_host(), tiny_text()
    if kind == "fusion":
        attach(attach(model, "pfeiffer", 4, "a"), "fusion", name="default", members=["a"])
    else:
        attach(model, kind, 4)
    expected = run(stir(model), batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    set_active(model, None)
    assert torch.equal(run(twin, batch), expected)
    detach(twin)
    assert run(twin, batch).isfinite().all()


@pytest.mark.parametrize("kind", ["prefix", "mam"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_a_flattened_prefix_is_the_same(tiny_host, tiny_text, family, kind):
    model, batch = tiny_host(family, task_of(family)), tiny_text()
    expected = run(stir(attach(model, kind, 4, reparam=True, width=8)), batch)
    assert torch.equal(run(flatten_prefix(model), batch), expected)
    flat = attach(tiny_host(family, task_of(family)), kind, 4, width=8)
    assert {key: p.shape for key, p in adapter_parameters(model).items()} == {key: p.shape for key, p in adapter_parameters(flat).items()}
    assert adapters(model) == adapters(flat) and all(p.requires_grad for p in adapter_parameters(model).values())
    with pytest.raises(ValueError, match="has no re-parametrised prefix"):
        flatten_prefix(model)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_meets_the_precisions_of_the_host(tiny_host, tiny_text, kind):
    model, batch = tiny_host(), tiny_text()
    parts, found = [m for m in model.modules() if not list(m.children())], []
    for adapted in (False, True):
        if adapted:
            stir(attach(model, kind, 4))
        seen = []
        hooks = [m.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output.dtype)) for m in parts]  # these run after the adapter's
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            run(model, batch)
        for hook in hooks:
            hook.remove()
        found.append(seen)
    assert found[0] == found[1] and torch.bfloat16 in found[0]


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "lora"])
@pytest.mark.parametrize("family", ["bert", "albert", "electra"])
def test_encoders_with_experts_are_hosts_too(tiny_host, tiny_text, family, kind):
    from dyn.models.encoder import make_moe

    model, batch = make_moe(tiny_host(family), 4, 2), tiny_text()
    before = run(model, batch)
    assert torch.equal(run(attach(model, kind, 4, init="lora"), batch), before)
    assert not torch.allclose(run(stir(model), batch), before, atol=1e-3)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model) | head_parameters(model))
    with pytest.raises(ValueError, match="has no linear map of its own"):
        attach(model, "lora", 4, "other", where="ffn")
