"""Adapters in transformers' own models against the formulas of SparseAdapter section 1 written out, and prefixes against its key/value cache."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dyn.nn.adapter import adapter_parameters, attach, set_active
from dyn.nn.adapter_build import FLAGS
from dyn.nn.adapter_sites import sites

KINDS = [kind for kind in FLAGS if kind != "fusion"]


def stir(model, name="default", seed=1, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def block(a, x, scale=1.0, norm=None):
    """A(x) of section 1.1 from a dict of one block's parameters."""
    h = x if norm is None else F.layer_norm(x, x.shape[-1:], a["norm.weight"], a["norm.bias"])
    return scale * (torch.relu(h @ a["down.weight"].T + a["down.bias"]) @ a["up.weight"].T + a["up.bias"])


def attention(x, m, mask, prefix=None, heads=4):
    q, k, v = m.query(x), m.key(x), m.value(x)
    if prefix is not None:
        k, v = (torch.cat([p.expand(len(x), -1, -1), t], 1) for p, t in zip(prefix, (k, v), strict=True))
        mask = torch.cat([mask.new_ones(len(x), prefix[0].shape[0]), mask], 1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weight = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["houlsby", "official", "pfeiffer", "parallel", "lora", "prefix", "mam"])
def test_bert_is_the_formula(tiny_host, tiny_text, kind, implementation):
    host, batch = tiny_host("bert", "base", attn_implementation=implementation), tiny_text()
    options = {"official": True} if kind == "official" else {}
    model = stir(attach(copy.deepcopy(host), "houlsby" if kind == "official" else kind, 4, **options))
    own = adapter_parameters(model)

    def at(i, place):
        start = f"encoder.layer.{i}.{place}.default."
        return {key.removeprefix(start): p for key, p in own.items() if key.startswith(start)}

    with torch.no_grad():
        x, mask = host.embeddings(batch["input_ids"]), batch["attention_mask"]
        for i, layer in enumerate(host.encoder.layer):
            inner, out = layer.attention.self, layer.attention.output
            if kind == "lora":
                inner = copy.deepcopy(inner)
                for part in ("query", "value"):
                    p = at(i, f"attention.self.{part}.lora")
                    getattr(inner, part).weight += 32 / 4 * p["B.weight"] @ p["A.weight"]
            prefix = at(i, "attention.self.prefix")
            h = out.dense(attention(x, inner, mask, (prefix["key"], prefix["value"]) if prefix else None))
            if kind in ("houlsby", "official"):
                a = at(i, "attention.output.dense.sequential" if kind == "official" else "attention.output.dropout.sequential")
                h = h + block(a, h, norm="in" if kind == "official" else None)
            x = out.LayerNorm(h + x)
            h = layer.output.dense(layer.intermediate(x))
            if kind in ("houlsby", "official"):
                h = h + block(at(i, "output.dropout.sequential"), h, norm="in" if kind == "official" else None)
            if kind in ("parallel", "mam"):
                h = h + block(at(i, "output.parallel"), x, scale=4.0)
            if kind == "pfeiffer":
                h = h + block(at(i, "output.LayerNorm.sequential"), layer.output.LayerNorm(x + h))
            x = layer.output.LayerNorm(x + h)
        assert len(own) == sum(len(at(i, place)) for i in range(2) for place in {k.split(".default")[0].split(".", 3)[3] for k in own})
        found = model(**batch)[0]
    assert torch.allclose(found[mask == 1], x[mask == 1], atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "llama_moe"])
def test_a_prefix_is_a_filled_cache(tiny_host, tiny_text, family, implementation):
    """transformers' own cache, filled with the prefix, positions starting at 0 behind it."""
    # A window that holds all, since a cache would let the prefix fall out of it.
    window = {"sliding_window": None} if family == "mistral" else {}
    host, batch = tiny_host(family, "lm", attn_implementation=implementation, **window), tiny_text()
    model = stir(attach(copy.deepcopy(host), "prefix", 3), std=1.0)
    cache = DynamicCache(config=host.config)
    own, samples = adapter_parameters(model), len(batch["input_ids"])
    for i in range(2):
        pair = (own[f"model.layers.{i}.self_attn.prefix.default.{part}"] for part in ("key", "value"))
        cache.update(*(p.detach().unflatten(-1, (2, -1)).transpose(0, 1).expand(samples, -1, -1, -1) for p in pair), i)
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = host(input_ids=batch["input_ids"], attention_mask=F.pad(mask, (3, 0), value=1), past_key_values=cache,
                        position_ids=torch.arange(mask.shape[1])[None]).logits
        assert torch.allclose(model(**batch).logits[mask == 1], expected[mask == 1], atol=2e-5)
        unpadded = model(input_ids=batch["input_ids"][:1]).logits  # without a mask: sdpa masks by itself
        assert torch.allclose(unpadded, expected[:1], atol=2e-5)


@pytest.mark.parametrize("kind", [*KINDS, "reparam"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bart", "llama_moe"])
def test_generation_with_a_cache_is_without(tiny_host, tiny_text, family, kind):
    model = tiny_host(family, "lm")
    stir(attach(model, "prefix", 4, reparam=True, width=8) if kind == "reparam" else attach(model, kind, 4))
    batch = tiny_text(3, 6)
    if family != "bart":  # generation goes on from the right end
        batch = {key: t.flip(1) for key, t in batch.items()}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        found = [model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["houlsby", "prefix", "lora"])
def test_beams_follow_their_sample(tiny_host, tiny_text, kind):
    model, batch = tiny_host("bart", "lm"), tiny_text(3, 6)
    for name, r in (("a", 4), ("b", 2)):
        stir(attach(model, kind, r, name), name, seed=r)
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False)
    alone = {name: set_active(model, name).generate(**batch, **options) for name in ("a", "b", None)}
    mixed = set_active(model, ["b", None, "a"]).generate(**batch, **options)
    assert torch.equal(mixed, torch.stack([alone[name][i] for i, name in enumerate(("b", None, "a"))]))
    with pytest.raises(ValueError, match="chosen for 3 samples, the batch has 4"):
        model(**tiny_text(4))


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_compiled_without_a_break(tiny_host, tiny_text, family):
    """One graph of all kinds, each on its sample: every hook is in it."""
    model, batch = tiny_host(family, "base"), tiny_text(5)
    names = ["houlsby", "pfeiffer", "mam", "lora", "fusion"]
    for name in names:
        attach(model, name, name=name, **({"members": ["houlsby"]} if name == "fusion" else {"r": 4}))
        stir(model, name)
    set_active(model, names)
    expected = model(**batch, use_cache=False)[0]
    torch._dynamo.reset()  # graphs of other tests in this process count towards its limit
    found = torch.compile(model, backend="eager", fullgraph=True)(**batch, use_cache=False)[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_other_attention_functions_are_refused(tiny_host, tiny_text):
    model = tiny_host()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs attn_implementation 'eager' or 'sdpa', got 'flex_attention'"):
        attach(model, "prefix", 4)
    assert not sites(model) and all(p.requires_grad for p in model.parameters())
    model.config._attn_implementation = "sdpa"
    attach(model, "prefix", 4)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs attn_implementation"):
        model(**tiny_text())


def test_the_attention_function_can_change(tiny_host, tiny_text):
    model, batch = stir(attach(tiny_host(), "prefix", 4)), tiny_text()
    with torch.no_grad():
        first = model(**batch)[0]
        model.set_attn_implementation("eager")
        outputs = model(**batch, output_attentions=True)
    assert torch.allclose(outputs.logits, first, atol=1e-6) and outputs.attentions[0].shape == (4, 4, 10, 14)
