"""What pruning does to adapters on real hosts: every kind, score and form trains with pruned weights at zero, and acts as the dense weights that it names."""

from __future__ import annotations

import copy

import pytest
import torch

from dyn.nn.adapter import adapter_parameters, attach, fusion_penalty, merge, set_active, unmerge
from dyn.nn.adapter_sites import adapter_modules
from dyn.nn.masking import PRUNING, dense_weights, drop_masks, masks, prune, set_masks
from dyn.nn.structured import dead_units

FAMILIES = ["bert", "roberta", "electra", "albert", "distilbert", "bart", "llama", "qwen3", "llama_moe"]
KINDS = ["houlsby", "pfeiffer", "parallel", "lora", "prefix", "mam"]


def task_of(family):
    return "lm" if family in ("llama_moe", "bart") else "classify"


def run(model, batch):
    return model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))[0]


def loss(model, batch):
    return (run(model, batch).float() - 0.5).square().mean()


def train(model, batch, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_train_alike_on_every_host(tiny_host, tiny_text, family, kind):
    batch, outputs = tiny_text(), []
    for form in ("mask", "flat"):
        model = attach(tiny_host(family, task_of(family)), kind, 8, seed=0)
        host = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
        prune(model, [batch, tiny_text(seed=1)], loss, keep=0.3, form=form, prefix=True)
        train(model, batch)
        total = sum(m.numel() for m in masks(model).values())
        assert sum(int(m.sum()) for m in masks(model).values()) == total - round(0.7 * total)
        assert all(not w[~m].any() for w, m in zip(dense_weights(model).values(), masks(model).values(), strict=True))
        assert set(masks(model)) <= set(adapter_parameters(model)) and all(torch.equal(p, model.get_parameter(key)) for key, p in host.items())
        outputs.append(run(model, batch))
        plain = drop_masks(copy.deepcopy(model))
        assert torch.equal(run(plain, batch), outputs[-1]), "it acts as its dense weights do"
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("kind", ["houlsby", "lora", "mam"])
def test_every_score_on_an_encoder_and_a_decoder(tiny_host, tiny_text, kind, method):
    for family in ("bert", "llama"):
        model = attach(tiny_host(family), kind, 8, seed=0)
        before = {key: p.clone() for key, p in model.named_parameters()}
        prune(model, [tiny_text()], loss, method, keep=0.5)
        found = masks(model)
        assert sum(int(m.sum()) for m in found.values()) * 2 == sum(m.numel() for m in found.values())
        for key, p in model.named_parameters():
            assert torch.equal(p, torch.where(found[key], before[key], 0) if key in found else before[key])
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "lora"])
@pytest.mark.parametrize("family", ["bert", "albert", "bart", "llama"])
def test_units_of_a_real_adapter(tiny_host, tiny_text, family, kind):
    """Narrowed, it computes what it did with the other units at zero."""
    batch = tiny_text()
    model = attach(tiny_host(family, task_of(family)), kind, 8, seed=0, init="bert")
    wide = copy.deepcopy(model)
    prune(model, [batch], loss, keep=0.5, form="unit", scope="local")
    found, modules = {}, adapter_modules(wide)
    for path, small in adapter_modules(model).items():
        first, second = small.prunable
        inner, outer = (modules[path].get_parameter(weight) for weight in small.prunable)
        kept = (inner[:, None] == small.get_parameter(first)).all(-1).any(1)  # rows that are still there
        assert kept.sum() == 4
        found |= {f"{path}.{first}": kept[:, None].expand(inner.shape), f"{path}.{second}": kept.expand(outer.shape)}
    set_masks(wide, found)
    torch.testing.assert_close(run(model, batch), run(wide, batch), rtol=1e-4, atol=1e-5)
    assert set(dead_units(wide).values()) == {4} and set(dead_units(model).values()) == {0}
    train(model, batch)


def test_lora_merges_its_masked_weights(tiny_host, tiny_text):
    batch = tiny_text()
    for form in ("mask", "flat", "2:4", "unit"):
        model = attach(tiny_host("bert"), "lora", 8, seed=0, init="bert")
        prune(model, [batch], loss, keep=0.5, form=form)
        separate = run(train(model, batch), batch)
        torch.testing.assert_close(run(merge(model), batch), separate, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(unmerge(model), batch), separate)


def test_several_adapters_keep_their_own_masks(tiny_host, tiny_text):
    """By default the one that trains is pruned; per sample, each acts with its own mask."""
    batch = tiny_text()
    model = attach(tiny_host("bert"), "pfeiffer", 8, name="one", seed=0)
    prune(model, [batch], loss, keep=0.5)
    first = masks(model)
    attach(model, "pfeiffer", 8, name="two", seed=1)
    prune(model, [batch], loss, keep=0.25, form="flat")
    assert all(torch.equal(masks(model)[key], m) for key, m in first.items()) and len(masks(model)) == 2 * len(first)
    assert all("two" in key for key in set(masks(model)) - set(first))
    alone = {name: run(set_active(model, name), batch) for name in ("one", "two")}
    mixed = run(set_active(model, ["one", "two", "one", "two"]), batch)
    for i, name in enumerate(["one", "two", "one", "two"]):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=1e-5)


def test_fusion_of_pruned_members_is_pruned_on_demand(tiny_host, tiny_text):
    batch = tiny_text()
    model = tiny_host("bert")
    for i, name in enumerate(("one", "two")):
        prune(attach(model, "pfeiffer", 8, name=name, seed=i), [batch], loss, keep=0.5)
    members = masks(model)
    attach(model, "fusion", name="both", members=["one", "two"], seed=2)
    with pytest.raises(ValueError, match="kind fusion have no weight that is pruned by default; say prefix=True or fusion=True"):
        prune(model, [batch], loss)
    for form in ("mask", "flat"):
        copied = prune(copy.deepcopy(model), [batch], lambda m, b: loss(m, b) + fusion_penalty(m, "both"), keep=0.6, fusion=True, form=form)
        found = {key: m for key, m in masks(copied).items() if key not in members}
        assert all("both" in key for key in found) and {key: m.shape for key, m in found.items() if m.shape != (32, 32)} == {}
        assert sum(int(m.sum()) for m in found.values()) == len(found) * 1024 - round(0.4 * len(found) * 1024)
        values = [w for key, w in dense_weights(copied).items() if key.endswith("value.weight")]
        torch.testing.assert_close(fusion_penalty(copied, "both"), 0.01 * sum((torch.eye(len(w)) - w).square().sum() for w in values))
        train(copied, batch)
        assert all(torch.equal(masks(copied)[key], m) and not copied.get_parameter(key)[~m].any() for key, m in members.items())
