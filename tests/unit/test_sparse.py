"""The network of an adapter experiment: what is attached and kept, what rows are called and compared with, what is refused."""

import dataclasses

import pytest
import torch

from dyn.nn.adapter import adapter_parameters
from dyn.nn.masking import masks
from dyn.nn.structured import dead_units
from dyn.train.sparse import SparseConfig, prune_again, round_steps, sparsify, with_controls

silent = dict(log=lambda _: None)


def net():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                                    max_position_embeddings=16))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, 50, (4, 8), generator=generator), "labels": torch.randint(0, 2, (4,), generator=generator)} for _ in range(count)]


def loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize(("changes", "words", "controls"), [
    ({}, "houlsby 64, snip 0.6", ["full fine-tuning", "houlsby 64", "houlsby 38", "houlsby 64, random 0.6", "houlsby 64, snip 0.6, shuffled"]),
    (dict(kind="none"), "full fine-tuning", []), (dict(keep=1.0), "houlsby 64", ["full fine-tuning"]),
    (dict(factor=4, keep=None), "houlsby 256, snip 1/4", ["full fine-tuning", "houlsby 64", "houlsby 256, random 1/4", "houlsby 256, snip 1/4, shuffled"]),
    (dict(shuffle=True, keep=0.2), "houlsby 64, snip 0.2, shuffled", ["houlsby 64", "houlsby 64, snip 0.2"]),
    (dict(method="erdos_renyi"), "houlsby 64, erdos-renyi 0.6", ["full fine-tuning", "houlsby 64"]),
    (dict(kind="mam", r=8, keep=0.5), "mam 8, snip 0.5", ["full fine-tuning", "mam 8", "mam 4, length 8", "mam 8, random 0.5", "mam 8, snip 0.5, shuffled"]),
    (dict(keep=0.2, scope="erdos_renyi"), "houlsby 64, snip 0.2, erdos-renyi",
     ["full fine-tuning", "houlsby 64", "houlsby 13", "houlsby 64, random 0.2, erdos-renyi", "houlsby 64, snip 0.2, erdos-renyi, shuffled"]),
    (dict(kind="mam", r=512, flags={"length": 30}, prefix=True, scope="local", rounds=5), "mam 512, snip 0.6, local, 5 rounds, prefix too, length 30",
     ["full fine-tuning", "mam 512, length 30", "mam 307, length 30", "mam 512, random 0.6, local, 5 rounds, prefix too, length 30",
      "mam 512, snip 0.6, local, 5 rounds, shuffled, prefix too, length 30"]),
    (dict(rounds=5, by_epoch=True, keep=0.5), "houlsby 64, snip 0.5, 5 rounds by epoch",
     ["full fine-tuning", "houlsby 64", "houlsby 32", "houlsby 64, random 0.5, 5 rounds by epoch", "houlsby 64, snip 0.5, 5 rounds by epoch, shuffled"]),
    (dict(kind="pfeiffer", fuse=True, method="random"), "pfeiffer 64, random 0.6, fused",
     ["full fine-tuning", "pfeiffer 64, random 0.6", "pfeiffer 64, fused"]),
])
def test_rows_have_names_and_controls(changes, words, controls):
    cfg = SparseConfig(**changes)
    cfg.check()
    assert cfg.what() == words and cfg.controls() == controls


@pytest.mark.parametrize(("changes", "message"), [
    (dict(factor=4), "keep=0.6 with factor=4: Large-Sparse keeps 1 / factor exactly"), (dict(keep=None), "without a factor give keep"),
    (dict(keep=0.0), r"keep=0.0 must lie in \(0, 1\]"), (dict(keep=1.0, shuffle=True), "shuffle=true permutes a mask, and there is none"),
    (dict(kind="prefix"), "a prefix is all that there is to prune; set prefix=true"),
    (dict(form="2:4", keep=0.5, rounds=3), "two of every four at once; rounds=3"),
    (dict(form="2:4", keep=0.5, method="erdos_renyi"), "method=erdos_renyi, scope=global do not go with it"),
    (dict(method="erdos_renyi", scope="local"), "which scope=local excludes"),
    (dict(by_epoch=True), "by_epoch=true spreads rounds=2 or more of form=mask .* got rounds=1"), (dict(by_epoch=True, rounds=2, form="flat"), "form=flat"),
    (dict(by_epoch=True, rounds=2, method="erdos_renyi"), "method=erdos_renyi"), (dict(by_epoch=True, rounds=2, rescale=True), "rescale=True"),
    (dict(by_epoch=True, rounds=2, keep=1.0), "by_epoch=true finds a mask, and there is none"),
    (dict(by_epoch=True, rounds=2, kind="none"), "by_epoch=true finds a mask"), (dict(form="2:4", keep=0.5, r=6), "4 does not divide r=6"),
    (dict(form="unit", kind="mam", prefix=True), "form=unit takes units out of bottlenecks"), (dict(flags={"alfa": 1}), "houlsby has no flag 'alfa'"),
    (dict(r=0), "r=0 must be at least 1"), (dict(samples=0), "samples=0 must be at least 1"),
])
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**changes).check()


@pytest.mark.parametrize("changes", [dict(), dict(kind="lora"), dict(kind="mam"), dict(kind="mam", prefix=True), dict(kind="mam", flags={"length": 3})])
@pytest.mark.parametrize("pruned", [dict(factor=4, keep=None), dict(keep=0.5)])
def test_a_pruned_adapter_and_its_twin_train_as_many_weights(changes, pruned):
    """Apart from biases, and from a pruned prefix beside a factor-less twin, whose prefix is as long as its r."""
    cfg = SparseConfig(r=8, samples=4, **changes, **pruned)
    facts = [sparsify(net(), one, batches, loss, **silent) for one in (cfg, cfg.twin())]
    biases = 0 if changes.get("kind") == "lora" else 2 * 2 * (cfg.r * cfg.factor - cfg.twin().r) / (2 if changes.get("kind") == "mam" else 1)
    assert facts[0]["adapter_parameters"] - facts[1]["adapter_parameters"] == biases


def test_full_fine_tuning_leaves_the_network():
    model = net()
    facts = sparsify(model, SparseConfig(kind="none"), batches, loss, **silent)
    assert facts["trained_parameters"] == sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", ["mask", "flat", "unit", "2:4"])
def test_what_is_kept_is_counted_in_every_form(form):
    model, lines = net(), []
    facts = sparsify(model, SparseConfig(r=8, keep=0.5, form=form, samples=8), batches, loss, log=lines.append)
    dense = sparsify(net(), SparseConfig(r=8, keep=1.0), batches, loss, **silent)
    assert facts["weights"] == dense["weights"] == dense["kept"] == 2 * 2 * 2 * 8 * 16 and facts["kept"] == facts["weights"] // 2 and facts["keep"] == 0.5
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert dense["trained_parameters"] == dense["adapter_parameters"] + dense["head_parameters"] and dense["mask"] == ""
    if form == "unit":
        assert facts["trained_parameters"] == trained and not masks(model)
    else:
        biases = sum(p.numel() for key, p in adapter_parameters(model).items() if key.endswith("bias"))
        assert facts["adapter_parameters"] == facts["kept"] + biases == dense["adapter_parameters"] - facts["weights"] // 2
        assert facts["mask"] and set(facts["density"]) == set(masks(model))
        for key, mask in masks(model).items():
            assert facts["density"][key] == mask.double().mean().item()
    assert len(lines) == 1 and "512 of 1,024 adapter weights train" in lines[0]
    assert facts["head_parameters"] == 2 * 16 + 2 and not model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize(("kind", "keep", "told"), [("houlsby", 0.02, True), ("houlsby", 0.9, False), ("lora", 0.9, False), ("parallel", 0.9, False)])
def test_units_without_effect_are_told(kind, keep, told):
    lines, model = [], net()
    sparsify(model, SparseConfig(kind=kind, r=8, keep=keep, method="random"), lambda: [], loss, log=lines.append)
    assert ("units of bottlenecks do nothing any more" in lines[-1]) is told is any(dead_units(model).values())


def test_large_sparse_trains_as_many_weights_as_its_dense_twin():
    cfg = SparseConfig(r=4, factor=3, keep=None)
    facts, dense = (sparsify(net(), each, batches, loss, **silent) for each in (cfg, cfg.twin()))
    assert facts["kept"] == dense["weights"] and facts["weights"] == 3 * dense["weights"]


def test_masks_follow_from_the_seed_and_the_data_alone():
    cfg = SparseConfig(r=8, samples=8)
    hashes = [sparsify(net(), cfg, data, loss, seed=seed, **silent)["mask"] for seed, data in ((0, batches), (0, lambda: batches()[:2]), (1, batches))]
    assert hashes[0] == hashes[1] != hashes[2]  # eight samples are two batches of four
    asked = []
    sparsify(net(), dataclasses.replace(cfg, method="random"), lambda: asked.append(1) or batches(), loss, **silent)
    assert not asked


@pytest.mark.parametrize("shuffle", [False, True])
def test_rounds_by_epoch_score_what_is_trained_by_then(shuffle):
    """Budgets are those of rounds before the training (p^(e/n)); what is out stays out, at zero with its moments, and scores are of the trained weights."""
    cfg = SparseConfig(r=8, keep=0.5, rounds=3, by_epoch=True, shuffle=shuffle, samples=8)
    model = net()
    facts = [sparsify(model, cfg, batches, loss, **silent)]
    before = {key: mask.clone() for key, mask in masks(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in (1, 2):
        for batch in batches():
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = {key: p.detach().clone() for key, p in adapter_parameters(model).items()}
        facts.append(prune_again(model, cfg, number, batches, loss, optimizer))
        for key, mask in masks(model).items():
            p = model.get_parameter(key)
            assert not (mask & ~before[key]).any() and torch.equal(p, weights[key].where(mask, 0))
            assert all(not value[~mask].any() and value[mask].any() for value in optimizer.state[p].values() if value.shape == p.shape)
        before = {key: mask.clone() for key, mask in masks(model).items()}
    assert [f["kept"] for f in facts] == [round(1024 * 0.5 ** (t / 3)) for t in (1, 2, 3)]
    untrained = net()
    sparsify(untrained, dataclasses.replace(cfg, by_epoch=False), batches, loss, **silent)
    assert any(not torch.equal(mask, before[key]) for key, mask in masks(untrained).items())
    assert prune_again(model, cfg, 2, batches, loss, optimizer)["mask"] == facts[-1]["mask"]  # as a resume that meets the round's step again


def test_controls_of_rounds_by_epoch():
    dense, twin, row, *masked = with_controls(SparseConfig(rounds=5, by_epoch=True, prefix=True, form="mask"))
    assert not any(one.by_epoch for one in (dense, twin)) and all(one.by_epoch for one in (row, *masked))
    for one in (dense, twin, row, *masked):
        one.check()


def test_rounds_come_one_an_epoch_or_closer():
    assert round_steps(5, 1000, 100.0) == [100, 200, 300, 400] and round_steps(5, 12, 100.0) == [2, 4, 7, 9] and round_steps(3, 9, 0.5) == [1, 2]
    with pytest.raises(ValueError, match="rounds=5 do not fit into a training of 4 steps"):
        round_steps(5, 4, 1.0)


def test_prefixes_are_counted_where_they_are_pruned():
    plain, pruned = (sparsify(net(), SparseConfig(kind="mam", r=4, keep=0.5, prefix=prefix), batches, loss, **silent) for prefix in (False, True))
    assert pruned["weights"] == plain["weights"] + 2 * 2 * 4 * 16 and all(f["kept"] * 2 == f["weights"] for f in (plain, pruned))
    assert sparsify(net(), SparseConfig(kind="prefix", r=4, keep=1.0), batches, loss, **silent)["keep"] == 1.0
