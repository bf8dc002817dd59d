"""What the experiments on partially dynamic networks share: settings of mode partition and what rows are called by them, networks by method, what they store,
compact forms beside the trained network, and which networks are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dyn.core.partition import kept_count
from dyn.core.saliency import Loss
from dyn.nn.bank import Banked
from dyn.nn.surgery import compact, count_parameters, make_partial
from dyn.train.speed import on_device

TOLERANCE = 0.01  # between the logits of a network and of its compact form, of the largest; TF32 rounds to 0.001
Batch = Mapping[str, Tensor]


@dataclass(kw_only=True, slots=True)
class PartitionConfig:
    """Mode partition (section 4), the half of a ModelConfig that networks of every kind have. `make_partial` explains the fields that it shares.

    A ModelConfig adds `what()`, the network in words, and `fully_dynamic()`, the usual network of that kind and the one of about the same storage.
    """

    method: str = "pad"  # or static, or a fully dynamic kind; the other fields are of pad
    keep: float = 0.3  # the share that stays dynamic
    criterion: Literal["snip", "removal", "random", "magnitude", "grasp", "synflow"] = "snip"
    rounds: int = 3  # the paper's number was not recovered
    schedule: Literal["exponential", "linear"] = "exponential"
    scope: Literal["global", "local", "erdos_renyi"] = "global"
    monotone: bool = True
    scales: Literal["both", "s", "d", "none", "prune"] = "both"  # section 3.3; prune: nothing in place of what is not dynamic
    static: Literal["mean", "fresh"] = "fresh"  # what a position that turns static becomes; the official code draws it
    shuffle: bool = False  # each mask inside its layer: the control that tells the criterion from its layer ratios
    batches: int = 10  # that the criterion looks at, the same in every round

    def check_partition(self, **least: float) -> None:
        """ValueError for a partition that cannot be; `least`: the smallest values of more fields."""
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} must lie in [0, 1]: 0 is the static network, 1 the dynamic one")
        for name, value in (least | {"rounds": 1, "batches": 1}).items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")

    def words(self, *own: str) -> list[str]:
        """How the partition differs from the usual one; `own` words of the network stand before schedule, scope and static."""
        usual, rounds = type(self)(), "one shot" if self.rounds == 1 else f"{self.rounds} rounds"
        criterion = f"{self.criterion}, {rounds}" if self.criterion in ("snip", "removal") else self.criterion  # the others rank alike in every round
        found = [criterion] if (self.criterion, self.rounds) != (usual.criterion, usual.rounds) else []
        found += ["shuffled"] if self.shuffle else []
        found += {"both": [], "prune": ["pruned"], "none": ["no scales"]}.get(self.scales, [f"scale {self.scales} only"])
        return [*found, *own, *(f"{name} {getattr(self, name)}" for name in ("schedule", "scope", "static") if getattr(self, name) != getattr(usual, name))]

    def controls(self) -> list[str]:
        """Rows that a row of this network is compared with: fully dynamic, and at about the same storage; a mask with itself shuffled."""
        if self.method != "pad":
            return [] if self.method == "static" else ["static"]
        if self.shuffle:
            return [dataclasses.replace(self, shuffle=False).what()]
        usual = type(self)()
        found = self.fully_dynamic() + ([dataclasses.replace(self, scales="none")] if self.scales == "prune" else [])
        own = (self.criterion, self.rounds) != (usual.criterion, usual.rounds) and self.criterion != "random"
        found += [dataclasses.replace(self, shuffle=True)] if own else []
        return list(dict.fromkeys(["static", *(model.what() for model in found)]))


def by_method(model: Any, beside: Iterable[str]) -> dict[str, Any]:
    """The networks of a run, those `beside` first: `model` with each method."""
    return {method: dataclasses.replace(model, method=method) for method in [*beside, model.method]}


def partition(net: nn.Module, batches: Sequence[Any], loss_fn: Loss, model: PartitionConfig, *, temperature: float | None, seed: int) -> nn.Module:
    """`make_partial` as `model` says, in place; returns the network. temperature: of its attention while scoring; None: it has none."""
    return make_partial(net, batches, loss_fn, keep=model.keep, rounds=model.rounds, schedule=model.schedule, method=model.criterion, scope=model.scope,
                        monotone=model.monotone, scales=model.scales, static=model.static, temperature=temperature, seed=seed,
                        shuffle="within_tensor" if model.shuffle else None)


def partition_at_random(net: nn.Module, model: PartitionConfig) -> nn.Module:
    """The network with a random mask of the right size where it has modes: what it costs does not depend on which positions are dynamic."""
    return make_partial(net, None, None, keep=model.keep, method="random", scales=model.scales, static=model.static) if model.method == "pad" else net


def planned_parameters(net: nn.Module, model: PartitionConfig, sets: int) -> tuple[dict[str, int], int, int]:
    """What `net`, all of whose banks are dynamic and have `sets` parameter sets, is once it is partitioned as `model` says: (its parameters, as a plan shows
    them; positions of its banks; how many of them are static)."""
    counts = count_parameters(net)
    positions = sum(m.weight[0].numel() for m in net.modules() if isinstance(m, Banked))
    static = positions - kept_count(positions, model.keep, "up") if model.method == "pad" else 0
    if static and model.scales != "prune":
        counts["total"] += positions  # while it trains, a partially dynamic layer holds all sets whole, and a whole static one
    counts["stored"] -= static * (sets - (model.scales != "prune"))
    shown = {"total": "total", "activated (without gates)": "active", "stored (compact)": "stored", "gates": "gate"}
    return {name: counts[key] for name, key in shown.items()}, positions, static


def overall(method: str, model: Any) -> float:
    """Share of dynamic positions of a network by this method, beside `model`."""
    return {"static": 0.0, "pad": model.keep}.get(method, 1.0)


def first_batches(part: Any, count: int, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The first `count` examples of a data set, `size` at a time."""
    for places in np.split(np.arange(count), range(size, count, size)):
        yield on_device(part.batch(places, None), device)


@torch.no_grad()
def compare_forms(net: nn.Module, made: nn.Module, logits: Callable[[nn.Module, Batch], Tensor], batches: Iterator[Batch]) -> dict[str, float]:
    """A trained network and its compact form in float32: the share of equal answers, each one's accuracy, the largest difference of logits.

    Raises:
        RuntimeError: logits that differ by more than rounding.
    """
    count, same, ours, theirs, largest, difference = 0, 0, 0, 0, 0.0, 0.0
    for batch in batches:
        a, b = logits(net, batch), logits(made, batch)
        count, same = count + len(a), same + int((a.argmax(-1) == b.argmax(-1)).sum())
        ours, theirs = (right + int((form.argmax(-1) == batch["labels"]).sum()) for right, form in ((ours, a), (theirs, b)))
        largest, difference = max(largest, a.abs().max().item()), max(difference, (a - b).abs().max().item())
    if not difference <= TOLERANCE * largest:
        raise RuntimeError(f"the compact form's logits differ by {difference:.3g} from the trained network's, whose largest is {largest:.3g}")
    return {"accuracy": theirs / count, "trained accuracy": ours / count, "same answers": same / count, "difference": difference}


def forms_to_time(cfg: Any, models: Mapping[str, Any], make: Callable[[Any], nn.Module]) -> dict[str, nn.Module]:
    """Every network of the run, the static one, and compact forms, by what the report calls them."""
    nets: dict[str, nn.Module] = {}
    for name, model in ({"static": dataclasses.replace(cfg.model, method="static")} | dict(models)).items():
        net = nets[name] = make(model)
        if model.method == "pad":
            nets |= {f"{name}, compact": compact(net), f"{name}, compact, expanded": compact(net, expand=True)}
    return nets
