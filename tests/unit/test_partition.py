"""Budgets are hit exactly, ties are broken by the seed, masks survive packing; rounds are monotone and end at the budget."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyn.core.partition import erdos_renyi_counts, keep_masks, kept_count, mask_hash, pack_bits, refuse_uninformative, unpack_bits
from dyn.core.rounds import kept_counts, partition_in_rounds


def scores(seed=0, shapes=((4, 5), (3, 3, 2), (7,)), ties=False):
    g = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randint(3, s, generator=g).float() if ties else torch.rand(s, generator=g) for i, s in enumerate(shapes)}


@pytest.mark.parametrize(("total", "keep", "rounding", "kept"), [
    (2_359_296, 0.6, "nearest", 1_415_578), (2_359_296, 0.8, "nearest", 1_887_437), (2_359_296, 0.4, "nearest", 943_718),
    (2_359_296, 0.2, "nearest", 471_859), (2_359_296, 0.1, "nearest", 235_930), (1_179_648, 0.6, "nearest", 707_789),
    (7_077_888, Fraction(1, 3), "nearest", 2_359_296), (7_077_888, 0.33, "nearest", 2_335_703),
    (10_007, 0.3, "up", 3_003), (23_445_504, 0.3, "up", 7_033_652), (10, 0.0, "up", 0), (10, 1.0, "nearest", 10), (10, 7, "nearest", 7)])
def test_counts_of_the_papers(total, keep, rounding, kept):
    assert kept_count(total, keep, rounding) == kept


@settings(max_examples=60, deadline=None)
@given(keep=st.floats(0, 1), seed=st.integers(0, 50), ties=st.booleans(), rounding=st.sampled_from(["nearest", "up"]),
       scope=st.sampled_from(["global", "local", "erdos_renyi"]), shuffle=st.sampled_from([None, "within_tensor"]))
def test_counts_are_exact_whatever_the_scores(keep, seed, ties, rounding, scope, shuffle):
    given_ = scores(seed, ties=ties)
    masks = keep_masks(given_, keep, scope, seed, rounding, shuffle)
    total = sum(s.numel() for s in given_.values())
    assert {n: m.shape for n, m in masks.items()} == {n: s.shape for n, s in given_.items()}
    if scope == "local":
        assert all(int(m.sum()) == kept_count(m.numel(), keep, rounding) for m in masks.values())
    else:
        assert int(sum(m.sum() for m in masks.values())) == kept_count(total, keep, rounding)
    if shuffle is None and scope == "global" and 0 < sum(int(m.sum()) for m in masks.values()) < total:
        kept = torch.cat([given_[n][m] for n, m in masks.items()])
        out = torch.cat([given_[n][~m] for n, m in masks.items()])
        assert kept.min() >= out.max()


def test_the_seed_decides_ties_only():
    tied = {"w": torch.zeros(1000)}
    one, two, again = (keep_masks(tied, 0.5, seed=s)["w"] for s in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert 150 < one[:500].sum() < 350, "the tie is drawn, not taken from the front"
    clear = scores()
    assert all(torch.equal(a, b) for a, b in zip(keep_masks(clear, 0.4, seed=0).values(), keep_masks(clear, 0.4, seed=9).values(), strict=True))


def test_shuffled_twin_has_the_layer_ratios():
    found, twin = (keep_masks(scores(shapes=((40, 50), (30, 20))), 0.3, shuffle=s) for s in (None, "within_tensor"))
    assert [int(m.sum()) for m in found.values()] == [int(m.sum()) for m in twin.values()]
    assert not any(torch.equal(found[n], twin[n]) for n in found)


def test_erdos_renyi_of_equal_shapes_is_uniform_and_of_lora_is_not():
    same = erdos_renyi_counts({i: torch.Size((64, 768)) for i in "abc"}, 0.6)
    assert max(same.values()) - min(same.values()) <= 1
    shapes = {f"qv{i}{m}": torch.Size((10, 768)) for i in range(2) for m in "ab"} | {f"ff{i}{n}": torch.Size((10, n)) for i in range(2) for n in (768, 3072)}
    counts = erdos_renyi_counts(shapes, 0.6)
    assert counts["qv0a"] / 7680 == pytest.approx(0.60332, abs=1e-4) and counts["ff03072"] / 30720 == pytest.approx(0.59751, abs=1e-4)
    small = erdos_renyi_counts({"small": torch.Size((2, 2)), "large": torch.Size((100, 100))}, 0.5)
    assert small == {"small": 4, "large": 4998}, "a tensor that would be more than full is full"


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_bits_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (-(-mask.numel() // 8),) and torch.equal(unpack_bits(bits, shape), mask)


def test_masks_have_a_name():
    masks = keep_masks(scores(), 0.5)
    assert mask_hash(masks) == mask_hash(dict(reversed(masks.items()))) != mask_hash(keep_masks(scores(1), 0.5))


@pytest.mark.parametrize(("schedule", "shares"), [("exponential", (0.669433, 0.448140, 0.3)), ("linear", (0.766667, 0.533333, 0.3))])
def test_schedule_of_padnet(schedule, shares):
    assert [c / 10**6 for c in kept_counts(10**6, 0.3, 3, schedule, "up")] == pytest.approx(shares, abs=1e-5)
    assert kept_counts(10_007, 0.3, 7, schedule, "up")[-1] == 3_003


@pytest.mark.parametrize("scope", ["global", "local", "erdos_renyi"])
def test_rounds_are_monotone_unless_asked(scope):
    seen, start = [], {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores(shapes=((40, 50), (30, 20))).items()}
    call = iter(range(99))
    kwargs = dict(keep=0.3, rounds=4, scope=scope, rounding="up", apply=seen.append)
    fresh = lambda masks: scores(next(call), shapes=((40, 50), (30, 20)))  # noqa: E731
    end = partition_in_rounds(fresh, start, **kwargs)
    assert all((new[n] <= old[n]).all() for old, new in zip(seen, seen[1:], strict=False) for n in new) and all(torch.equal(end[n], seen[-1][n]) for n in end)
    assert abs(int(sum(m.sum() for m in end.values())) - 780) <= (1 if scope == "local" else 0)
    seen.clear()
    partition_in_rounds(fresh, start, monotone=False, **kwargs)
    assert any((new[n] > old[n]).any() for old, new in zip(seen, seen[1:], strict=False) for n in new)


def test_a_count_that_cannot_be_shared_out_is_refused_before_anything_is_scored():
    with pytest.raises(ValueError, match="keep=50 is a count"):
        partition_in_rounds(lambda masks: pytest.fail("scored"), {"a": torch.ones(100, dtype=torch.bool)}, keep=50, rounds=3, scope="local")
    assert kept_counts(0, 0, 2) == [0, 0]


def test_scores_that_say_nothing_are_refused():
    ones = {"w": torch.ones(6, dtype=torch.bool)}
    with pytest.raises(ValueError, match="all snip scores are 0: they say nothing"):
        partition_in_rounds(lambda _: {"w": torch.zeros(6)}, ones, keep=0.5, informative="snip")
    with pytest.raises(ValueError, match="snip scores of w are not finite"):
        refuse_uninformative({"w": torch.tensor([1.0, torch.inf])}, "snip")
    assert partition_in_rounds(lambda _: {"w": torch.zeros(6)}, ones, keep=0.5)["w"].sum() == 3
    refuse_uninformative({"w": torch.tensor([1.0, 2.0, 2.0])}, "snip", {"w": torch.tensor([True, True, False])})


@pytest.mark.parametrize(("call", "words"), [
    (lambda: keep_masks({}, 0.5), "needs scores"),
    (lambda: keep_masks({"w": torch.tensor([torch.nan])}, 0.5), "scores of w hold NaN"),
    (lambda: keep_masks(scores(), 1.5), r"keep=1\.5 must be a share in \[0, 1\]"),
    (lambda: keep_masks(scores(), float("nan")), "must be a share"),
    (lambda: keep_masks(scores(), True), "must be a share"),
    (lambda: keep_masks(scores(), 99), r"keep=99 \(an int is a count\) must lie in 0\.\.45"),
    (lambda: keep_masks(scores(), 5, "local"), "cannot share out"),
    (lambda: keep_masks(scores(), 0.5, "layer"), "scope='layer' is unknown"),
    (lambda: keep_masks(scores(), 0.5, shuffle="all"), "shuffle='all' is unknown"),
    (lambda: kept_count(5, 0.5, "down"), "rounding='down' is unknown"),
    (lambda: kept_counts(5, 0.5, 0), "rounds=0"),
    (lambda: kept_counts(5, 0.5, 2, "cosine"), "schedule='cosine'"),
    (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), (3,)), r"has 1 bytes; got torch\.uint8 \[2\]"),
    (lambda: unpack_bits(torch.tensor([255], dtype=torch.uint8), (3,)), "damaged or of another shape"),
    (lambda: partition_in_rounds(lambda _: {"v": torch.rand(2)}, {"w": torch.ones(2).bool()}, keep=0.5), "other tensors"),
    (lambda: partition_in_rounds(lambda _: {"w": torch.rand(2)}, {"w": torch.zeros(2).bool()}, keep=0.5), "0 are left"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
