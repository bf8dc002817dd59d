import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.data.mixture import MixtureLoader, domain_weights, update_weights, validation_batches
from dyn.data.tiny import tiny_tokens
from dyn.data.tokens import Tokens, blocks_of_epoch


def _loader(weights="uniform", **settings):
    domains = {name: splits["train"] for name, splits in tiny_tokens().items()}
    return MixtureLoader(domains, weights, **{"block_size": 16, "batch_size": 4, "num_batches": 10, "seed": 3, **settings})


def test_weights_from_names_and_mappings():
    assert domain_weights("uniform", ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert domain_weights({"b": 3, "a": 1}, ["a", "b"]) == {"a": 0.25, "b": 0.75}
    assert domain_weights({"a": 0, "b": 1}, ["a", "b"])["a"] == 0


@pytest.mark.parametrize(("weights", "message"), [
    ("lama", r"domain weights: no mix 'lama'; there are uniform, llama, sheared_llama \(nearest: llama\)"),
    ("llama", "domain weights: no domain 'en_cc'; there are code, docs"),
    ({"cods": 1, "docs": 1}, "nearest: code"),
    ({"code": 1}, "lack docs"),
    ({"code": -1, "docs": 1}, "at least 0"),
    ({"code": float("nan"), "docs": 1}, "finite"),
    ({"code": 0, "docs": 0}, "all 0"),
])
def test_weights_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        domain_weights(weights, ["code", "docs"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"rule": "c"}, "allowed: 'a', 'b'"),
    ({"gamma": 1.0}, "gamma"),
    ({"losses": {"a": 1.0}}, "losses are missing or not finite for b"),
    ({"references": {"a": 1.0, "b": float("inf")}}, "references are missing or not finite for b"),
])
def test_update_refused(settings, message):
    even = {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match=message):
        update_weights(even, **{"losses": even, "references": even, **settings})


def test_update_survives_large_gaps():
    new = update_weights({"a": 0.5, "b": 0.5}, {"a": 900.0, "b": 0.0}, {"a": 0.0, "b": 0.0})
    assert new["a"] == pytest.approx(1 - 5e-5) and new["b"] == pytest.approx(5e-5)


def test_batches():
    loader = _loader()
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    for batch in batches:
        assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
            "input_ids": ((4, 16), torch.int64), "labels": ((4, 16), torch.int64), "domain": ((4,), torch.int64)}
        assert torch.equal(batch["input_ids"], batch["labels"])
    assert sum(loader.used.values()) == 10 * 4


def test_iterations_go_on():
    once = list(_loader(num_batches=20))
    loader = _loader()
    twice = [*loader, *loader]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_batch(world_size):
    alone = list(_loader(batch_size=8))
    ranks = [list(_loader(batch_size=8 // world_size, rank=r, world_size=world_size)) for r in range(world_size)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for key in whole:
            assert torch.equal(whole[key], torch.cat([p[key] for p in parts]))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 11), passes=st.integers(1, 4))
def test_every_token_is_seen_once_a_pass(lengths, size, passes):
    """Epochs share the blocks of the cyclic stream out without gap or overlap, and the loader gives each out once."""
    total = sum(lengths)
    ranges = [blocks_of_epoch(e, size, total) for e in range(passes * size)]
    assert [b for r in ranges for b in r] == list(range(passes * total))  # passes * size epochs are passes * total blocks
    ids = itertools.count()
    tokens = Tokens.from_documents([[next(ids) for _ in range(n)] for n in lengths])
    loader = MixtureLoader({"a": tokens}, block_size=size, batch_size=1, num_batches=total, seed=1)
    seen = Counter(i for batch in loader for i in batch["input_ids"].ravel().tolist())
    assert seen == dict.fromkeys(range(total), size)
    assert loader.used == {"a": total}  # blocks of `size` tokens: `size` passes


def test_order_changes_with_epoch_and_seed():
    domains = {"a": Tokens.from_documents([list(range(64))])}
    loader = MixtureLoader(domains, block_size=4, batch_size=16, num_batches=2, seed=0)
    first, second = (batch["input_ids"][:, 0].tolist() for batch in loader)
    other = next(iter(MixtureLoader(domains, block_size=4, batch_size=16, num_batches=2, seed=1)))["input_ids"][:, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(other) == list(range(0, 64, 4))
    assert len({tuple(first), tuple(second), tuple(other), tuple(sorted(first))}) == 4


def test_shares_follow_the_weights():
    loader = _loader({"red": 0.7, "green": 0.3, "blue": 0.0}, batch_size=8, num_batches=250)
    counts = torch.cat([batch["domain"] for batch in loader]).bincount(minlength=3) / 2000
    assert counts[0].item() == pytest.approx(0.7, abs=0.04) and counts[2] == 0  # four standard errors


def test_new_weights_take_effect_at_the_next_batch():
    loader = _loader({"red": 1, "green": 0, "blue": 0})
    steps = iter(loader)
    assert set(next(steps)["domain"].tolist()) == {0}
    loader.set_weights({"red": 0, "green": 0, "blue": 1})
    assert set(next(steps)["domain"].tolist()) == {2}


def test_masking_documents():
    domains = {"a": Tokens.from_documents([[1, 5, 6], [1, 7], [1, 8, 9, 4]])}
    loader = MixtureLoader(domains, block_size=9, batch_size=1, num_batches=1, seed=0, mask_documents=True)
    batch = next(iter(loader))
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7, 1, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 7, -100, 8, 9, 4]]


@pytest.mark.parametrize(("settings", "message"), [({"block_size": 0}, "block_size=0"), ({"rank": 1}, "rank=1"), ({"seed": -1}, "seed=-1")])
def test_loader_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _loader(**settings)


def test_empty_mixture_refused():
    with pytest.raises(ValueError, match="at least one domain"):
        MixtureLoader({}, block_size=1, batch_size=1, num_batches=1, seed=0)


def test_validation_batches():
    tokens = Tokens.from_documents([[1, *range(10, 30)]])  # 21 tokens
    batches = validation_batches(tokens, 4, 2, domain=3)
    assert [b["input_ids"].shape[0] for b in batches] == [2, 2, 1]
    assert np.array_equal(torch.cat([b["input_ids"] for b in batches]).ravel(), [1, *range(10, 29)])  # in order, no wrap-around
    assert {d for b in batches for d in b["domain"].tolist()} == {3}
    assert sum(b["input_ids"].numel() for b in validation_batches(tokens, 4, 2, max_tokens=11)) == 8
    assert sum(b["input_ids"].numel() for b in validation_batches(tokens, 4, 2, max_tokens=1)) == 4
    with pytest.raises(ValueError, match="block_size <= 21"):
        validation_batches(tokens, 22, 2)
