"""What the experiments on partially dynamic networks share: how dynamic a method is, compact forms beside the trained network, and which networks are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyn.nn.surgery import compact

TOLERANCE = 0.01  # between the logits of a network and of its compact form, of the largest; TF32 rounds to 0.001
Batch = Mapping[str, Tensor]


def overall(method: str, model: Any) -> float:
    """Share of dynamic positions of a network by this method, beside `model`."""
    return {"static": 0.0, "pad": model.keep}.get(method, 1.0)


def first_batches(part: Any, count: int, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The first `count` examples of a data set, `size` at a time."""
    for places in np.split(np.arange(count), range(size, count, size)):
        yield {key: value.to(device) for key, value in part.batch(places, None).items()}


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
