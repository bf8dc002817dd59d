"""Batches: orders, augmentation, grouping, shares of processes, state."""

import random
from itertools import chain

import numpy as np
import pytest
import torch

from dyn.data.loader import Draw, EvaluationLoader, ResumableLoader, batches_per_epoch, blank, carve, counts, seeded, uniform

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores here


class Numbers:
    """Example i is i, with noise that says how it was drawn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, index, draw):
        noise = np.zeros((len(index), 2)) if draw is None else uniform(draw, index, 2)
        return {"x": torch.from_numpy(noise), "labels": torch.from_numpy(index % 3)}


def seen(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(lists) -> list[int]:
    return list(chain.from_iterable(lists))


def test_epochs_are_permutations_and_one_iteration_may_hold_several():
    loader = ResumableLoader(Numbers(20), batch_size=4, num_batches=10, seed=1)
    batches = seen(loader)
    first, second = flat(batches[:5]), flat(batches[5:])
    assert sorted(first) == sorted(second) == list(range(20)) and first != second and len(loader) == 10 == loader.step == 2 * loader.per_epoch
    assert seen(loader) != batches  # the next ten go on
    assert seen(ResumableLoader(Numbers(20), batch_size=4, num_batches=10, seed=1)) == batches
    assert seen(ResumableLoader(Numbers(20), batch_size=4, seed=2)) != batches[:5]


def test_incomplete_batches():
    assert [len(b) for b in seen(ResumableLoader(Numbers(10), batch_size=4, seed=0))] == [4, 4]
    batches = seen(ResumableLoader(Numbers(10), batch_size=4, seed=0, drop_last=False))
    assert [len(b) for b in batches] == [4, 4, 2] and sorted(flat(batches)) == list(range(10))
    assert batches_per_epoch(10, 4) == 2 and batches_per_epoch(10, 4, drop_last=False) == 3 and batches_per_epoch(10, 2, 2, drop_last=False) == 3


@pytest.mark.parametrize("lengths", [None, np.arange(40) % 7])
def test_processes_share_the_global_batches(lengths):
    alone = seen(ResumableLoader(Numbers(40), batch_size=8, seed=3, lengths=lengths))
    both = [seen(ResumableLoader(Numbers(40), batch_size=4, seed=3, rank=rank, world_size=2, lengths=lengths)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*both, strict=True)] == [sorted(batch) for batch in alone]
    uneven = [seen(ResumableLoader(Numbers(7), batch_size=2, seed=3, rank=rank, world_size=2, drop_last=False)) for rank in (0, 1)]
    assert [len(b) for b in uneven[0]] == [len(b) for b in uneven[1]] == [2, 2] and set(flat(uneven[0] + uneven[1])) == set(range(7))


def test_grouping_pads_little_and_stays_random():
    lengths = np.random.default_rng(0).integers(5, 120, 2000)

    def share_of_padding(batches):
        return 1 - sum(lengths[b].sum() for b in batches) / sum(lengths[b].max() * len(b) for b in batches)

    grouped = ResumableLoader(Numbers(2000), batch_size=16, num_batches=250, seed=0, lengths=lengths)
    batches = [np.array(b) for b in seen(grouped)]
    plain = [np.array(b) for b in seen(ResumableLoader(Numbers(2000), batch_size=16, seed=0))]
    assert share_of_padding(batches) < 0.03 < 0.3 < share_of_padding(plain)
    means = np.array([lengths[b].mean() for b in batches[:125]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # long and short ones come mixed
    assert sorted(np.concatenate(batches[:125])) == list(range(2000))
    assert {tuple(sorted(b)) for b in batches[:125]}.isdisjoint({tuple(sorted(b)) for b in batches[125:]})  # other batches in the next epoch


def test_augmentation_follows_from_seed_epoch_and_index_alone():
    ways = [dict(batch_size=4), dict(batch_size=5), dict(batch_size=4, workers=2), dict(batch_size=4, lengths=np.arange(20) % 3)]
    drawn = []
    for way in ways:
        loader = ResumableLoader(Numbers(20), seed=9, num_batches=2 * 20 // way["batch_size"], **way)
        noise = [(i, x.tolist()) for batch in loader for i, x in zip(batch["index"].tolist(), batch["x"], strict=True)]
        drawn.append([dict(noise[:20]), dict(noise[20:])])
    assert all(d == drawn[0] for d in drawn)
    assert drawn[0][0] != drawn[0][1]


def test_workers_give_the_same_batches_and_leave_the_random_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = [list(ResumableLoader(Numbers(20), batch_size=4, seed=1, workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*batches, strict=True) for key in a)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 9, 10])
def test_state(stop, workers):
    def loader():
        return ResumableLoader(Numbers(20), batch_size=4, num_batches=10, seed=1, lengths=np.arange(20), workers=workers)

    whole = loader()
    batches = seen(whole) + seen(whole)
    begun, resumed = loader(), loader()
    iterator = iter(begun)
    for _ in range(stop):
        next(iterator)
    resumed.load_state_dict(begun.state_dict())
    assert seen(resumed) == (batches[stop:10] if stop < 10 else batches[10:])
    assert seen(resumed) == (batches[10:] if stop < 10 else seen(whole))


def test_another_row_of_batches_is_refused():
    state = ResumableLoader(Numbers(20), batch_size=4, seed=1).state_dict()
    with pytest.raises(ValueError, match="another row of batches: seed=1, here 2"):
        ResumableLoader(Numbers(20), batch_size=4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="examples=20, here 21"):
        ResumableLoader(Numbers(21), batch_size=4, seed=1).load_state_dict(state)
    ResumableLoader(Numbers(20), batch_size=2, seed=1, rank=1, world_size=2).load_state_dict(state)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(batch_size=0), "batch_size=0 must be at least 1"), (dict(batch_size=21), "20 training examples do not fill one batch of batch_size=21"),
    (dict(batch_size=2, seed=-1), "seed=-1"), (dict(batch_size=2, rank=2, world_size=2), "rank=2 must lie in 0"),
    (dict(batch_size=2, lengths=[1]), "1 lengths for 20 examples"), (dict(batch_size=2, workers=-1), "workers=-1"),
    (dict(batch_size=2, num_batches=0), "num_batches=0"),
])
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(Numbers(20), **{"seed": 0} | settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_order_and_unaugmented(workers):
    batches = list(EvaluationLoader(Numbers(10), 4, workers))
    assert [b["index"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and not any(b["x"].any() for b in batches)
    with pytest.raises(ValueError, match="must be examples"):
        EvaluationLoader(Numbers(0), 4)


def test_evaluation_is_shared_out_evenly():
    parts = [list(EvaluationLoader(Numbers(10), 4).shard(rank, 2)) for rank in (0, 1)]
    assert [len(p) for p in parts] == [2, 2] == [len(EvaluationLoader(Numbers(10), 4).shard(rank, 2)) for rank in (0, 1)]
    valid = sorted(i for part in parts for b in part for i in b["index"][counts(b["labels"])].tolist())
    assert valid == list(range(10)) and not counts(parts[1][1]["labels"]).any()
    assert not counts(blank({"labels": torch.tensor([1.5, -100.0])})["labels"]).any() and counts(torch.tensor([1.5, -100.0])).all()


def test_uniform_is_uniform():
    draws = uniform(Draw(1, 0), np.arange(20_000), 3)
    assert draws.min() >= 0 and draws.max() < 1 and draws.shape == (20_000, 3)
    counted = np.histogram(draws[:, 1], 20, (0, 1))[0]
    assert ((counted - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom: 50 is beyond 0.0002
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03 and abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    assert not np.array_equal(draws, uniform(Draw(1, 1), np.arange(20_000), 3)) and not np.array_equal(draws, uniform(Draw(2, 0), np.arange(20_000), 3))


def test_seeded_puts_the_generators_back():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with seeded(Draw(1, 2), 3):
        first = draw()
    with seeded(Draw(1, 2), 4):
        assert draw() != first
    with seeded(Draw(1, 2), 3):
        assert draw() == first
    assert torch.equal(kept[0], torch.get_rng_state()) and kept[2] == random.getstate() and np.array_equal(kept[1][1], np.random.get_state()[1])


def test_carve():
    kept, taken = carve(100, 0.1, seed=4)
    assert len(taken) == 10 and sorted([*kept, *taken]) == list(range(100)) and list(taken) == sorted(taken)
    assert np.array_equal(taken, carve(100, 0.1, seed=4)[1]) and not np.array_equal(taken, carve(100, 0.1, seed=5)[1])
    assert len(carve(5, 0.0, 0)[1]) == 0
    for share in (-0.1, 1.0, 0.01, 0.95):
        with pytest.raises(ValueError, match="cannot be held out"):
            carve(5, share, 0)
