"""Results as rows, and what may be said of two of them: differences beside what the seeds could have shown, and nothing where a control is missing.

A result is what `dyn.report.read` gives. Only the standard library: dyn.report draws with this.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

ASIDE = {"timing_rounds", "diagnose", "diagnose_tokens", "export"}  # keys of a config that change no result
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, 1, 2, ... degrees of freedom; the last, too large, for more


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """Results that differ only in their seed, newest run of each; `values` of the good ones. Equal to itself alone."""

    row: str
    profile: str
    results: list[tuple[Path, dict[str, Any]]]

    @property
    def good(self) -> list[dict[str, Any]]:
        return [result for _, result in self.results if result["status"] == "ok"]

    def values(self, part: str, key: str) -> list[float]:
        """A scalar of every good result; part is "metrics" or "cost"."""
        found = (flatten(result[part]).get(key) for result in self.good)
        return [number for value in found if (number := number_of(value)) is not None]

    def by_seed(self, key: str) -> dict[Any, float]:
        """A metric of every good result that has a seed."""
        found = {r["config"]["seed"]: number_of(flatten(r["metrics"]).get(key)) for r in self.good if "seed" in r["config"]}
        return {seed: number for seed, number in found.items() if number is not None}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with "a/b" keys; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {} if isinstance(value, list) else {f"{prefix}{key}": value}
    return flat


def groups(results: Iterable[tuple[Path, dict[str, Any]]]) -> list[Group]:
    """One group a config without its seed and what changes no result, in the order in which their first runs started; of each config the newest good run."""
    latest: dict[str, tuple[Path, dict[str, Any]]] = {}
    ordered = sorted(results, key=lambda item: item[1]["started"])
    for path, result in sorted(ordered, key=lambda item: item[1]["status"] == "ok"):
        what, config = result["what"], {key: value for key, value in result["config"].items() if key not in ASIDE}
        latest[json.dumps([what["row"], what["profile"], config], sort_keys=True)] = (path, result)
    found: dict[str, Group] = {}
    for path, result in sorted(latest.values(), key=lambda item: (item[1]["started"], item[1]["config"].get("seed", 0))):
        what, config = result["what"], {key: value for key, value in result["config"].items() if key not in {"seed", *ASIDE}}
        key = json.dumps([what["row"], what["profile"], config], sort_keys=True)
        found.setdefault(key, Group(row=what["row"] or what["profile"], profile=what["profile"], results=[])).results.append((path, result))
    return list(found.values())


def compare(group: Group, rows: Sequence[Group]) -> list[str]:
    """Lines on the controls that a row names: which are missing, or else each difference beside the smallest that the seeds could have shown."""
    controls = {name: _control(name, group, rows) for name in union(result["notes"].get("controls", []) for result in group.good)}
    if missing := [name for name, control in controls.items() if control is None]:
        return [f"{group.row}: control missing: {'; '.join(missing)}"]
    lines = []
    for key in union(result["notes"].get("compare", main_keys(result)[:1]) for result in group.good):
        for name, control in controls.items():
            ours, theirs = _common(group, control, key)
            if not ours or not theirs:
                lines.append(f"{group.row} against {name}, {key}: not measured in {name if ours else group.row}")
                continue
            a, b, least = statistics.fmean(ours), statistics.fmean(theirs), smallest_difference(ours, theirs)
            text = f"{group.row} against {name}, {key}: {show(a)} against {show(b)}, difference {a - b:+.3g}"
            if not math.isfinite(a - b):
                lines.append(f"{text}; no verdict")
            elif least is None:
                lines.append(f"{text}; one seed: no spread known")
            else:
                verdict = ("lower" if a < b else "higher") if abs(a - b) > least else "no difference shown"
                lines.append(f"{text}; smallest that the seeds could have shown {least:.2g}: {verdict}{_paired(group.by_seed(key), control.by_seed(key))}")
    for name, control in controls.items():
        for found in resampled(group, control):
            lines.append(f"{group.row}, {found}" if isinstance(found, str) else f"{group.row} against {name}, {found}: {found.verdict()}")
    return union([lines])


@dataclass(kw_only=True, slots=True)
class Resampled:
    """A difference of two rows in the leading metric of a task, with seeds and examples resampled together."""

    task: str
    metric: str
    least: float  # the smallest detectable difference: 2.8 standard errors, which four of five repetitions would find
    gain: float
    low: float
    high: float
    seeds: int
    examples: int

    def verdict(self) -> str:
        """By the 95 % interval."""
        return "no difference shown" if self.low <= 0 <= self.high else "higher" if self.gain > 0 else "lower"

    def __str__(self) -> str:
        return (f"{self.task} {self.metric}: smallest detectable difference {self.least:.2g}; measured {self.gain:+.3g}, 95 % interval {self.low:+.3g} to "
                f"{self.high:+.3g} over {self.seeds} seed{'s' * (self.seeds > 1)} and {self.examples} examples, both resampled")


@functools.lru_cache(maxsize=1024)  # controls and claims ask for the same pairs
def resampled(group: Group, control: Group, rounds: int = 500) -> list[Resampled | str]:
    """Differences on the tasks of which both keep what was said to every example (notes: answers), since a validation set is a small sample itself. A line
    instead on tasks of which a result has but the limit above which it keeps none."""
    ours, theirs = ({r["config"].get("seed"): r["notes"].get("answers", {}) for r in g.good} for g in (group, control))
    seeds, differences = sorted(seed for seed in ours.keys() & theirs.keys()), []
    for task in union(answers for seed in seeds for answers in [ours[seed]]):
        pairs = [(ours[seed][task], theirs[seed][task]) for seed in seeds if task in ours[seed] and task in theirs[seed]]
        if limits := [said["limit"] for pair in pairs for said in pair if "limit" in said]:
            differences.append(f"{task}: not resampled: answers are kept up to {max(limits):,} examples")
            continue
        pairs = [pair for pair in pairs if pair[0]["labels"] == pairs[0][0]["labels"] == pair[1]["labels"] and pair[0]["metric"] in _SCORES]
        if not pairs:
            continue
        labels, score, draw = pairs[0][0]["labels"], _SCORES[pairs[0][0]["metric"]], random.Random(0)
        found = []
        for _ in range(rounds):
            examples, chosen = draw.choices(range(len(labels)), k=len(labels)), draw.choices(pairs, k=len(pairs))
            weights = [0] * len(labels)
            for place in examples:
                weights[place] += 1
            found.append(statistics.fmean(score(a["predictions"], labels, weights) - score(b["predictions"], labels, weights) for a, b in chosen))
        ones = [1] * len(labels)
        gain = statistics.fmean(score(a["predictions"], labels, ones) - score(b["predictions"], labels, ones) for a, b in pairs)
        low, high = (sorted(found)[int(share * (rounds - 1))] for share in (0.025, 0.975))
        differences.append(Resampled(task=task, metric=pairs[0][0]["metric"], least=2.8 * statistics.stdev(found), gain=gain, low=low, high=high,
                                     seeds=len(pairs), examples=len(labels)))
    return differences


def _accuracy(predictions: Sequence[float], labels: Sequence[float], weights: Sequence[int]) -> float:
    return sum(w for p, y, w in zip(predictions, labels, weights, strict=True) if p == y) / sum(weights)


def _pearson(predictions: Sequence[float], labels: Sequence[float], weights: Sequence[int]) -> float:
    """0 where either side is constant."""
    total = sum(weights)
    mean_p, mean_y = (sum(w * v for v, w in zip(values, weights, strict=True)) / total for values in (predictions, labels))
    var_p, var_y = (sum(w * (v - mean) ** 2 for v, w in zip(values, weights, strict=True)) for values, mean in ((predictions, mean_p), (labels, mean_y)))
    joint = sum(w * (p - mean_p) * (y - mean_y) for p, y, w in zip(predictions, labels, weights, strict=True))
    return joint / math.sqrt(var_p * var_y) if var_p * var_y > 0 else 0.0


def _mean(predictions: Sequence[float], _: Sequence[float], weights: Sequence[int]) -> float:
    """Of a score by example."""
    return sum(w * p for p, w in zip(predictions, weights, strict=True)) / sum(weights)


# Matthews' coefficient of two classes is Pearson's of zeros and ones
_SCORES = {"accuracy": _accuracy, "matthews": _pearson, "pearson": _pearson, "mean": _mean}


def claims(group: Group, rows: Sequence[Group]) -> list[str]:
    """Lines on what a paper claims of a row (its notes: text, metric, against which row, wants higher or lower), beside what was measured: won, lost or
    undecided, by seeds and examples where answers are kept, else by what the seeds could have shown; and whether the claim itself was in reach. No verdict
    where a control of the row is missing."""
    lines = []
    missing = [name for name in union(result["notes"].get("controls", []) for result in group.good) if _control(name, group, rows) is None]
    for text, key, against, wants in union(map(itemgetter("text", "metric", "against", "wants"), r["notes"].get("claims", [])) for r in group.good):
        control = _control(against, group, rows)
        ours, theirs = (group.values("metrics", key), []) if control is None else _common(group, control, key)
        if not ours or not theirs or missing:
            lines.append(f"{text}: no verdict, control missing: {'; '.join(union([missing, [against] if not theirs else []]) or [group.row])}")
            continue
        gain, least = statistics.fmean(ours) - statistics.fmean(theirs), smallest_difference(ours, theirs)
        measured = f"{key} of {group.row} {show(statistics.fmean(ours))}, of {against} {show(statistics.fmean(theirs))}, difference {gain:+.3g}"
        if found := [one for one in resampled(group, control) if isinstance(one, Resampled)]:
            shown, reach = {one.verdict() for one in found}, "; ".join(map(str, found))
            side = shown.pop() if len(shown) == 1 else "no difference shown"
        else:
            reach = "one seed" if least is None else f"the seeds could have shown {least:.2g}"
            side = "no difference shown" if least is None or not math.isfinite(gain) or abs(gain) <= least else "higher" if gain > 0 else "lower"
        verdict = "undecided" if side == "no difference shown" else "won" if side == wants else "lost"
        scale = "; the claim itself is not tested at this scale" if any(r["notes"].get("not_tested") for r in group.good) else ""
        lines.append(f"{text}: {verdict} ({reach}). Measured: {measured}{scale}")
    return lines


def _common(group: Group, control: Group, key: str) -> tuple[list[float], list[float]]:
    """A metric of both, of the seeds that both have if there are such: one that a side lacks is no difference between them."""
    seeds = group.by_seed(key), control.by_seed(key)
    common = sorted(seeds[0].keys() & seeds[1].keys())
    if not common:
        return group.values("metrics", key), control.values("metrics", key)
    return [seeds[0][seed] for seed in common], [seeds[1][seed] for seed in common]


def _control(name: str, group: Group, rows: Sequence[Group]) -> Group | None:
    """The row of that name to compare with: good, of the same profile, and alike in every config key of `notes["same"]` (another budget of tokens or
    another text is no control); of several the one whose config is nearest. None: there is none."""
    ours = group.good[0]["config"]
    same = union(result["notes"].get("same", []) for result in group.good)
    fits = [g for g in rows if g is not group and g.row == name and g.profile == group.profile and g.good]
    fits = [g for g in fits if all(_at(g.good[0]["config"], key) == _at(ours, key) for key in same)]
    flat = flatten(ours)
    return min(fits, key=lambda g: len(flat.items() ^ flatten(g.good[0]["config"]).items()), default=None)


def alike(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result and its controls must share, by key of the config."""
    return {key: _at(result["config"], key) for key in result["notes"].get("same", [])}


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def smallest_difference(a: Sequence[float], b: Sequence[float]) -> float | None:
    """1.96 sqrt(2) times the pooled standard error of two means (s sqrt(1/n + 1/m) where n differs); None where one has a single seed."""
    n, m = len(a), len(b)
    if min(n, m) < 2:
        return None
    pooled = ((n - 1) * statistics.variance(a) + (m - 1) * statistics.variance(b)) / (n + m - 2)
    return 1.96 * math.sqrt(pooled * (1 / n + 1 / m))


def paired_interval(a: Mapping[Any, float], b: Mapping[Any, float]) -> tuple[int, float, float] | None:
    """Differences a - b of the seeds that both have: their number, their mean, and half the width of its 95 % t-interval; None for fewer than two."""
    n = len(differences := [a[seed] - b[seed] for seed in a if seed in b])
    return None if n < 2 else (n, statistics.fmean(differences), _T[min(n - 1, len(_T)) - 1] * statistics.stdev(differences) / math.sqrt(n))


def _paired(a: Mapping[Any, float], b: Mapping[Any, float]) -> str:
    if (found := paired_interval(a, b)) is None:
        return ""
    n, mean, half = found
    verdict = ("lower" if mean < 0 else "higher") if abs(mean) > half else "no difference shown"
    return f"; paired over {n} seeds {mean:+.3g}, 95 % interval {mean - half:+.3g} to {mean + half:+.3g}: {verdict}"


def show(value: Any) -> str:
    """A value as text: thousands separators, four significant digits."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return ", ".join(show(inner) for inner in value) if isinstance(value, (list, tuple)) else str(value)


def number_of(value: Any) -> float | None:
    """A scalar of a result; nan and infinities are strings there, since JSON has none."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def scalars(tree: Mapping[str, Any]) -> list[str]:
    """Names of the numbers in nested metrics or costs."""
    return [key for key, value in flatten(tree).items() if number_of(value) is not None]


def main_keys(result: Mapping[str, Any]) -> list[str]:
    """The metrics that a result wants shown first."""
    return result["notes"].get("main") or scalars(result["metrics"])[:6]


def union(lists: Iterable[Iterable[str]]) -> list[str]:
    """Every item once, in order of appearance."""
    return list(dict.fromkeys(item for items in lists for item in items))
