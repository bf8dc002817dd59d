"""Differences of two rows under resampling of seeds and examples."""

import random
from pathlib import Path

import pytest
from sklearn.metrics import matthews_corrcoef
from torchmetrics.functional import pearson_corrcoef

from dyn import verdicts
from dyn.verdicts import Group, resampled


def group(row, answers):
    """Results of one row: seed -> predictions; the labels are zeros and ones in turn."""
    results = [{"status": "ok", "config": {"seed": seed}, "notes": {"answers": {"mrpc": {"metric": "accuracy", "predictions": p, "labels": labels(len(p))}}}}
               for seed, p in answers.items()]
    return Group(row=row, profile="small", results=[(Path("x"), result) for result in results])


def labels(count):
    return [i % 2 for i in range(count)]


def guess(count, right, seed):
    """Answers of which `right` of every ten are right."""
    draw = random.Random(seed)
    return [y if draw.random() < right / 10 else 1 - y for y in labels(count)]


def test_a_clear_difference_is_shown_and_a_small_one_is_not():
    good, bad = (group(name, {seed: guess(300, right, seed + right) for seed in range(3)}) for name, right in (("good", 9), ("bad", 6)))
    [found] = resampled(good, bad)
    assert found.verdict() == "higher" and str(found).endswith("over 3 seeds and 300 examples, both resampled")
    assert "smallest detectable difference" in str(found).split("measured")[0]
    assert resampled(bad, good)[0].verdict() == "lower"
    like = group("like", {seed: guess(300, 9, seed + 50) for seed in range(3)})
    assert resampled(good, like)[0].verdict() == "no difference shown"


def test_a_claim_is_decided_by_seeds_and_examples_and_not_without_a_control():
    """Seeds that agree with each other say nothing of the examples that all of them share."""
    alike = {seed: guess(40, 9, 7) for seed in range(3)}
    ours, theirs = group("ours", alike), group("theirs", {seed: [1 - p[0], *p[1:]] for seed, p in alike.items()})
    for each, accuracy in ((ours, 0.9), (theirs, 0.875)):
        for (_, result), more in zip(each.results, (0, 0.001, 0.002), strict=True):
            result.update(metrics={"accuracy": accuracy + more})
    notes = [result["notes"] for _, result in ours.results]
    for note in notes:
        note.update(claims=[{"text": "better", "metric": "accuracy", "against": "theirs", "wants": "higher"}], controls=["theirs"])
    assert verdicts.smallest_difference(ours.values("metrics", "accuracy"), theirs.values("metrics", "accuracy")) < 0.025
    [line] = verdicts.claims(ours, [ours, theirs])
    assert line.startswith("better: undecided (mrpc accuracy: smallest detectable difference")
    for note in notes:
        note["controls"] = ["theirs", "shuffled"]
    assert verdicts.claims(ours, [ours, theirs]) == ["better: no verdict, control missing: shuffled"]


def test_only_seeds_and_examples_that_both_have_count():
    a, b = group("a", {0: guess(20, 9, 1), 1: guess(20, 9, 2)}), group("b", {1: guess(20, 8, 3), 2: guess(20, 8, 4)})
    assert "over 1 seed and 20 examples" in str(resampled(a, b)[0])
    assert resampled(a, group("other examples", {0: guess(22, 9, 1)})) == []
    assert resampled(a, Group(row="none", profile="small", results=[])) == []


def test_a_task_of_too_many_examples_is_named_once():
    many = [group(name, {0: guess(20, 9, 1)}) for name in ("ours", "a", "b")]
    for each in many:
        each.results[0][1].update(metrics={"accuracy": 0.5}, what={"profile": "small"})
        each.results[0][1]["notes"].update(answers={"mnli": {"limit": 1000}}, controls=["a", "b"])
    lines = verdicts.compare(many[0], many)
    assert [line for line in lines if "resampled" in line] == ["ours, mnli: not resampled: answers are kept up to 1,000 examples"]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_libraries(seed):
    import torch

    draw = random.Random(seed)
    predictions, truth, weights = ([draw.randrange(2) for _ in range(40)] for _ in range(3))
    repeated = [[v for v, w in zip(values, weights, strict=True) for _ in range(w)] for values in (predictions, truth)]
    assert verdicts._SCORES["matthews"](predictions, truth, weights) == pytest.approx(matthews_corrcoef(repeated[1], repeated[0]))
    real = [draw.random() for _ in range(40)]
    theirs = pearson_corrcoef(torch.tensor(real), torch.tensor(truth).float()).item()
    assert verdicts._SCORES["pearson"](real, truth, [1] * 40) == pytest.approx(theirs, abs=1e-5)
    assert verdicts._SCORES["pearson"]([1] * 40, truth, [1] * 40) == 0
