"""Masks with a structure: whole units of a bottleneck, which then shrinks (SparseAdapter section 7.7), and two of every four neighbours (section 7.9).

R units of a bottleneck: unit j is row j of the first matrix (with its bias) and column j of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dyn.core.rounds import Masks
from dyn.nn.adapter_modules import AdapterModule
from dyn.nn.masked import masks


class Units:
    """The bottlenecks of a model's chosen adapters, and how masks of their units relate to masks of their weights.

    Raises:
        ValueError: an adapter without a bottleneck, or chosen weights that are not the matrices of one.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
        self.pairs: dict[str, tuple[AdapterModule, str, str]] = {}  # block path: module, keys of its two matrices
        left = set(chosen)
        for path, m in model.named_modules():
            if not isinstance(m, AdapterModule) or not any(f"{path}.{weight}".lstrip(".") in chosen for weight in m.prunable):
                continue
            if m.kind not in ("bottleneck", "lora"):
                raise ValueError(f"form='unit' takes units out of a bottleneck, which adapters of kind {m.kind!r} ({path}) do not have")
            first, second = (f"{path}.{weight}".lstrip(".") for weight in m.prunable)
            self.pairs[path] = m, first, second
            left -= {first, second}
        if left:
            raise ValueError(f"form='unit' prunes whole units, their biases with them; {min(left)} cannot be chosen by itself")
        self.weights = {key: chosen[key] for _, *keys in self.pairs.values() for key in keys}

    def sizes(self) -> Iterator[tuple[str, int, torch.device]]:
        """(path, R, device) of every block."""
        for path, (_, first, _) in self.pairs.items():
            yield path, len(self.weights[first]), self.weights[first].device

    def collapse(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of units [R]: the sums of their weights' scores."""
        return {path: scores[first].sum(1) + scores[second].sum(0) for path, (_, first, second) in self.pairs.items()}

    def expand(self, masks: Masks) -> Masks:
        """Masks of the matrices from those of units."""
        out: Masks = {}
        for path, (_, first, second) in self.pairs.items():
            out[first] = masks[path][:, None].expand_as(self.weights[first])
            out[second] = masks[path].expand_as(self.weights[second])
        return out


@torch.no_grad()
def narrow(units: Units, masks: Masks) -> None:
    """Leave the kept units alone in every bottleneck, whose matrices become smaller; what it computes is what it computed with the others at zero."""
    for path, (block, first, second) in units.pairs.items():
        inner, outer = (block.get_submodule(key.rpartition(".")[0].removeprefix(f"{path}.")) for key in (first, second))
        kept_R = masks[path].nonzero().squeeze(1)
        for module, name, axis in ((inner, "weight", 0), (inner, "bias", 0), (outer, "weight", 1)):
            if (p := getattr(module, name)) is not None:
                setattr(module, name, nn.Parameter(p.index_select(axis, kept_R), requires_grad=p.requires_grad))
        inner.out_features = outer.in_features = len(kept_R)


@torch.no_grad()
def dead_units(model: nn.Module) -> dict[str, int]:
    """How many units of every bottleneck a mask took a whole row or a whole column from, so that they do nothing (section 7.7), by the block's path."""
    dead, held = {}, masks(model)
    for path, m in model.named_modules():
        if isinstance(m, AdapterModule) and m.kind in ("bottleneck", "lora"):
            inner, outer = (held.get(f"{path}.{weight}".lstrip("."), torch.ones_like(m.get_parameter(weight), dtype=torch.bool)) for weight in m.prunable)
            dead[path] = int((~inner.any(1) | ~outer.any(0)).sum())
    return dead


def two_of_four(scores: Mapping[str, Tensor], seed: int = 0, shuffle: bool = False) -> Masks:
    """Of every 4 neighbours along the input axes (all but the first, as one) the 2 with the largest scores, ties drawn by the seed.

    `shuffle` permutes the groups of a tensor and the positions inside each: a control that has the form too.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for key, s in scores.items():
        groups_G4 = s.reshape(-1, 4)
        order_G4 = torch.rand(groups_G4.shape, generator=generator, device="cpu").to(s.device).argsort(1)
        best_G4 = order_G4.gather(1, groups_G4.gather(1, order_G4).argsort(dim=1, descending=True, stable=True))
        mask_G4 = torch.zeros_like(groups_G4, dtype=torch.bool).scatter_(1, best_G4[:, :2], True)
        if shuffle:
            mask_G4 = mask_G4[torch.randperm(len(mask_G4), generator=generator, device="cpu").to(s.device)].gather(1, order_G4)
        masks[key] = mask_G4.view(s.shape)
    return masks
