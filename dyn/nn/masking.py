"""Pruning at initialisation (SparseAdapter section 2): score, keep the best, hold the mask fixed while the survivors train.

Scores, budgets and rounds are those of `dyn.core`, which mode partition of PAD-Net uses too; what a mask does to a parameter is in `dyn.nn.masked`, whole units
and 2:4 masks in `dyn.nn.structured`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dyn.core.partition import Scope, keep_masks, kept_count, mask_hash, refuse_uninformative
from dyn.core.rounds import Masks, Schedule, partition_in_rounds
from dyn.core.saliency import APART, DATA_DRIVEN, METHODS, Loss, score, select, together
from dyn.nn.adapter_attach import refuse_merged
from dyn.nn.adapter_modules import STD, AdapterModule
from dyn.nn.adapter_sites import adapter_modules
from dyn.nn.masked import apply_masks, dense_weight, dense_weights, drop_masks, masks, set_masks
from dyn.nn.structured import Units, narrow, two_of_four

__all__ = ["LargeSparse", "apply_masks", "dense_weight", "dense_weights", "drop_masks", "large_sparse", "mask_hash", "masks", "prune", "set_masks"]
_log = logging.getLogger(__name__)

Method = Literal["random", "magnitude", "erdos_renyi", "snip", "grasp", "synflow"]
PRUNING = (*METHODS, "erdos_renyi")
FORMS = ("mask", "flat", "unit", "2:4")


class LargeSparse(NamedTuple):
    """A wider adapter that trains as many weights: `attach(model, "houlsby", r=preset.r)`, then `prune(..., keep=preset.keep)`."""

    r: int
    keep: Fraction


def large_sparse(r: int = 64, factor: int | Fraction = 4) -> LargeSparse:
    """The Large-Sparse preset: `factor` times the bottleneck, of which 1 / `factor` is kept (section 3.2).

    The weights that train are exactly as many as those of the dense adapter with bottleneck `r`, since keep is a fraction (a literal 0.33 for a third loses
    1 %); biases are a little more. What is computed grows by the factor: this is no way to be faster.

    Raises:
        ValueError: a factor below 1, or one with which the bottleneck is no whole number.
    """
    wide = Fraction(r) * Fraction(factor)
    if r < 1 or factor < 1 or wide.denominator != 1:
        raise ValueError(f"large_sparse(r={r}, factor={factor}): r must be 1 or more, factor 1 or more, and their product whole")
    return LargeSparse(int(wide), 1 / Fraction(factor))


def prune(model: nn.Module, batches: Iterable[Any] | None = None, loss_fn: Loss | None = None, method: Method = "snip",
          keep: float | Fraction | None = None, scope: Scope = "global", form: Literal["mask", "flat", "unit", "2:4"] = "mask", *,
          name: str | None = None, params: str | Sequence[str] | None = None, biases: bool = False, prefix: bool = False, fusion: bool = False,
          rounds: int = 1, schedule: Schedule = "exponential", monotone: bool = True, samples: int | None = None,
          shuffle: Literal["within_tensor"] | None = None, rescale: bool = False, seed: int = 0,
          flow: Callable[[nn.Module], Tensor] | None = None) -> nn.Module:
    """Keep the best-scored share of a model's adapter weights, or of any of its weights, in place; returns the model (section 2).

    Exactly N - round((1 - keep) N) of N positions are kept, ties drawn by the seed. Scores are taken in float32, in evaluation mode; weights that stay,
    buffers, modes and the random state are as before. Every process finds the same masks. Make the optimiser afterwards.

    Where all of a matrix is zero (the up-projection of many initialisations) no score can tell its entries apart, nor, by gradients, those of the matrix before
    it: it is scored as if drawn from N(0, 0.02^2), and is zero again afterwards (section 2.3).

    Args:
        batches, loss_fn: as in `dyn.core.saliency.score`; snip and grasp need them.
        method: random | magnitude | erdos_renyi (random, with that allocation) | snip | grasp | synflow (each adapter block alone, layer norm left out; with
            `params` the network on ones in the shape of the first batch).
        keep: a share in (0, 1], read as a fraction: 0.6 is 3/5. None: 0.6, under "2:4" the half that this form always keeps.
        scope: global: one ranking over all tensors; local: the share in every tensor; erdos_renyi.
        form: mask and flat: see `dyn.nn.masked`. unit: whole units of the bottleneck by the sum of their scores, which makes it smaller and faster for real.
            2:4: of any 4 neighbours along the input axis 2, a layout for which GPUs have kernels; here it is computed as "mask" is.
        name: the adapter; None: those that train, or all where none does.
        params: other weights than adapters': a regular expression that finds names, or names.
        biases, prefix, fusion: prune these of the adapters too (the official code never does).
        rounds, schedule: score and prune in so many rounds, keep^(t/n) or linearly after round t.
        monotone: what is out stays out; False ranks all positions in every round.
        samples: read batches until they have so many examples (by the length of their first tensor); None: all.
        shuffle: "within_tensor" permutes every mask inside its tensor, among positions that were left: the control that tells a criterion from its layer
            ratios.
        rescale: divide what survives in each tensor by the square root of its share of what there was, so that pruning does not shrink what the adapter adds
            at the start (section 7.12).
        seed: of random scores, ties, stand-ins and the shuffle.
        flow: of synflow, as in `dyn.core.saliency.score`.

    Raises:
        ValueError: nothing to prune, an unknown word, a budget out of range, a form that the weights do not fit, scores that say nothing; the model is then as
            before.
    """
    for word, value, allowed in (("method", method, PRUNING), ("form", form, FORMS), ("shuffle", shuffle, (None, "within_tensor"))):
        if value not in allowed:
            raise ValueError(f"{word}={value!r} is unknown; allowed: {', '.join(map(str, allowed))}")
    if method == "erdos_renyi":
        if scope == "local":
            raise ValueError("method='erdos_renyi' is an allocation of its own; scope='local' contradicts it")
        scope = "erdos_renyi"
    refuse_merged(model)
    share, draws = _share(keep, form), seed + APART
    chosen = _adapter_weights(model, name, biases, prefix, fusion) if params is None else select(model, params)
    there = {key: mask for key, mask in masks(model).items() if key in chosen}
    _check_form(form, chosen, there, scope, rounds, params)
    if there and not monotone:
        raise ValueError(f"monotone=False ranks positions that are pruned already, whose weights are gone: {next(iter(there))}; start from unpruned weights")
    if method in ("snip", "grasp") and loss_fn is None and share < 1:
        raise ValueError(f"method={method!r} looks at a loss; give loss_fn(model, batch) -> scalar")
    units = Units(model, chosen) if form == "unit" else None
    collapse, expand = (units.collapse, units.expand) if units else (dict, dict)
    batches = _read(batches, samples) if method in DATA_DRIVEN else []
    start = {key: there.get(key, torch.ones_like(p, dtype=torch.bool)) for key, p in chosen.items()}
    if units:
        start = {key: torch.ones(r, dtype=torch.bool, device=device) for key, r, device in units.sizes()}
    total = sum(m.numel() for m in start.values())
    if not kept_count(total, share):
        raise ValueError(f"keep={keep} of {total} positions keeps none of them")
    if share == 1 and not all(m.all() for m in start.values()):
        raise ValueError(f"keep={keep}: {sum(int(m.sum()) for m in start.values())} of {total} positions are left, and pruned ones do not come back")
    found = start
    if share < 1:
        gone = {key for key, mask in there.items() if not mask.any()}
        with _stand_ins(chosen, None if method in ("random", "erdos_renyi") else draws, gone) as values:
            take = _scorer(model, chosen, batches, loss_fn, method, seed, values if not monotone else None,
                           flow or (_blocks_alone(model, chosen) if params is None and method == "synflow" else None))

            def rank(found: Masks) -> Masks:
                scores = collapse(take())
                if scope == "local" and method in DATA_DRIVEN:
                    _warn_of_ties(scores, found, method)
                return scores

            def apply(found: Masks) -> None:
                for key, mask in expand(found).items():
                    chosen[key].data = torch.where(mask, values[key], 0)

            if form == "2:4":
                scores = take()
                if method in DATA_DRIVEN:
                    refuse_uninformative(scores, method)
                found = two_of_four(scores, draws, shuffle is not None)
            else:
                found = partition_in_rounds(rank, start, keep=share, rounds=rounds, schedule=schedule, scope=scope, seed=draws,
                                            monotone=monotone, informative=method if method in DATA_DRIVEN else None, apply=apply)
    if shuffle and form != "2:4":
        found = keep_masks({key: m.float() for key, m in found.items()}, sum(int(m.sum()) for m in found.values()), seed=draws, shuffle=shuffle,
                           among=None if units else start)
    _agree(found)
    if units:
        narrow(units, found)
    else:
        set_masks(model, found, "flat" if form == "flat" else "mask")
    if rescale:
        _rescale(model, expand(found), expand(start))
    _log.info("prune: %d of %d %s kept in %d tensors (%s, %s)", sum(int(m.sum()) for m in found.values()), total, "units" if units else "weights",
              len(chosen), method, form)
    return model


def _share(keep: Any, form: str) -> Fraction:
    if keep is None:
        return Fraction(1, 2) if form == "2:4" else Fraction(3, 5)
    exact = isinstance(keep, (float, int, Fraction)) and not isinstance(keep, bool) and math.isfinite(keep)
    share = Fraction(str(keep)) if exact else None
    if share is None or not 0 < share <= 1:
        raise ValueError(f"keep={keep!r} must be a share in (0, 1]")
    if form == "2:4" and share != Fraction(1, 2):
        raise ValueError(f"keep={keep!r}: form='2:4' keeps exactly half; give keep=0.5 or none")
    return share


def _adapter_weights(model: nn.Module, name: str | None, biases: bool, prefix: bool, fusion: bool) -> dict[str, nn.Parameter]:
    """What pruning takes of a model's adapters, by key."""
    blocks = adapter_modules(model)
    names = sorted({m.adapter_name for m in blocks.values()})
    if not blocks:
        raise ValueError(f"prune: {type(model).__name__} has no adapter; attach one first, or say with params=... which weights to prune")
    if name is not None and name not in names:
        raise ValueError(f"prune: there is no adapter {name!r}; attached: {', '.join(names)}")
    left_out = [kind for kind, wanted in (("prefix", prefix), ("fusion", fusion)) if not wanted]
    training = any(p.requires_grad for m in blocks.values() for p in m.parameters())
    blocks = {path: m for path, m in blocks.items()
              if (any(p.requires_grad for p in m.parameters()) or not training if name is None else m.adapter_name == name)}
    keys = [f"{path}.{weight}".lstrip(".") for path, m in blocks.items() if m.kind not in left_out
            for weight in (*m.prunable, *(m.prunable_biases if biases else ()))]
    if not keys:
        kinds = sorted({m.kind for m in blocks.values()})
        raise ValueError(f"prune: adapters of kind {', '.join(kinds)} have no weight that is pruned by default; say prefix=True or fusion=True (a "
                         "re-parametrised prefix has none at all)")
    return select(model, keys)


def _check_form(form: str, chosen: Mapping[str, Tensor], there: Masks, scope: str, rounds: int, params: Any) -> None:
    """What a form needs of weights and settings."""
    if sharded := [key for key, p in chosen.items() if hasattr(p, "full_tensor")]:
        raise ValueError(f"prune: {sharded[0]} is sharded over processes; prune first, then shard")
    if there and (flat := [key for key in there if chosen[key].shape != there[key].shape or form == "unit"]):
        how = "masked" if form == "unit" else "in flat form"
        raise ValueError(f"prune: {flat[0]} is {how} already; first set_masks(model, masks(model)) for form 'mask', or drop_masks(model)")
    if form == "unit" and params is not None:
        raise ValueError("form='unit' takes units out of adapters' bottlenecks; params=... names other weights")
    if form == "2:4":
        if scope == "erdos_renyi" or rounds != 1 or there:
            raise ValueError("form='2:4' keeps two of every four at once: without an allocation, without rounds, of weights without masks")
        for key, p in chosen.items():
            width = math.prod(p.shape[1:])
            if p.ndim < 2 or width % 4:
                near = " or ".join(str(r) for r in (width // 4 * 4, width // 4 * 4 + 4) if r)
                raise ValueError(f"{key} {list(p.shape)}: form='2:4' needs groups of four along the input axis, and 4 does not divide {width}; "
                                 f"take a bottleneck r of {near}")


def _read(batches: Iterable[Any] | None, samples: int | None) -> list[Any]:
    """Batches until there are `samples` examples."""
    if isinstance(batches, (Mapping, Tensor, str)) or not (batches is None or isinstance(batches, Iterable)):
        raise ValueError(f"prune: batches must be an iterable of batches, got {type(batches).__name__}; put a single batch in a list")
    if samples is None or batches is None:
        return list(batches or [])
    if samples < 1:
        raise ValueError(f"samples={samples} must be 1 or more")
    taken, seen = [], 0
    for batch in batches:
        taken.append(batch)
        seen += _length(batch)
        if seen >= samples:
            return taken
    _log.warning("prune: samples=%d are asked for, the data have %d: all of them are used", samples, seen)
    return taken


def _length(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, Sequence) and not isinstance(batch, str) else ()
    found = next((part for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if found is None:
        raise ValueError(f"samples=... counts examples by the first tensor of a batch; {type(batch).__name__} has none")
    return len(found)


@contextmanager
def _stand_ins(chosen: Mapping[str, nn.Parameter], seed: int | None, gone: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Values to score by key: the weights, and where all of a tensor is zero random ones (seed None, or pruned whole: zero). The parameters hold them
    meanwhile, and their own memory afterwards."""
    own = {key: p.data for key, p in chosen.items()}
    generator = torch.Generator().manual_seed(seed or 0)
    values, drawn = {}, []
    for key, data in own.items():
        values[key] = data
        if seed is not None and key not in gone and not data.any():
            values[key] = (torch.randn(data.shape, generator=generator, device="cpu") * STD).to(data)
            drawn.append(key)
    if drawn:
        _log.warning("prune: %d of %d tensors (%s, ...) are zero: scored as if drawn from N(0, %g^2); they stay zero", len(drawn), len(own), drawn[0], STD)
    try:
        for key, p in chosen.items():
            p.data = values[key].clone()
        yield values
    finally:
        for key, p in chosen.items():
            p.data = own[key]
            p.grad = None


def _scorer(model: nn.Module, chosen: Mapping[str, Tensor], batches: list[Any], loss_fn: Loss | None, method: str, seed: int,
            weights: Mapping[str, Tensor] | None, flow: Callable[[nn.Module], Tensor] | None) -> Callable[[], dict[str, Tensor]]:
    """A function that scores the network as it is now."""
    if method in ("random", "erdos_renyi"):
        drawn = score(model, [], None, "random", list(chosen), seed=seed)
        return lambda: drawn  # one draw for all rounds: a new one each would make more rounds no different from one
    return lambda: score(model, batches, loss_fn, method, list(chosen), seed=seed, flow=flow, weights=weights)


def _warn_of_ties(scores: Masks, found: Masks, method: str) -> None:
    """Where every tensor is ranked by itself, one that a gradient does not reach is drawn."""
    silent = [key for key, s in scores.items() if (left := s[found[key]]).numel() > 1 and left.min() == left.max()]
    if silent:
        _log.warning("prune: in %d of %d tensors (%s, ...) all %s scores are equal; what they keep is drawn", len(silent), len(scores), silent[0], method)


def _blocks_alone(model: nn.Module, chosen: Mapping[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """R of SynFlow for adapters: the sum over blocks, each by itself (section 2.2)."""
    ids = {id(p) for p in chosen.values()}
    blocks = [m for m in model.modules() if isinstance(m, AdapterModule) and any(id(p) in ids for p in m.parameters())]
    return lambda _: torch.stack([block.flow() for block in blocks]).sum()


def _agree(found: Masks) -> None:
    """ValueError where processes found different masks."""
    if together():
        hashes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, mask_hash(found))
        if len(set(hashes)) > 1:
            raise ValueError(f"prune: processes found different masks ({', '.join(hashes)}); all must start from the same weights and seed")


@torch.no_grad()
def _rescale(model: nn.Module, found: Masks, start: Masks) -> None:
    for key, mask in found.items():
        if mask.any():
            model.get_parameter(key).mul_((mask.sum() / start[key].sum()) ** -0.5)
