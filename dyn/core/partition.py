"""A budget turns scores into a partition: which units are kept (trained, dynamic) and which are not. Counts are exact, ties are broken by a seed.

A set of scores or masks is a dict of tensors, one a parameter; N is the number of positions in all of them.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Keep = float | int | Fraction
Scope = Literal["global", "local", "erdos_renyi"]
Rounding = Literal["nearest", "up"]


def kept_count(total: int, keep: Keep, rounding: Rounding = "nearest") -> int:
    """How many of `total` positions a budget keeps.

    Args:
        total: n.
        keep: a share in [0, 1] (a float is read as its decimal, so that 0.3 is 3/10), or an int, which is a count.
        rounding: "nearest" keeps n - round((1 - keep) n) (SparseAdapter), "up" keeps n - floor((1 - keep) n) (PAD-Net section 4.3).

    Raises:
        ValueError: a share or a count out of range, an unknown rounding.
    """
    if rounding not in ("nearest", "up"):
        raise ValueError(f"rounding={rounding!r} is unknown; allowed: nearest, up")
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 0 <= keep <= total:
            raise ValueError(f"keep={keep} (an int is a count) must lie in 0..{total}")
        return keep
    number = isinstance(keep, numbers.Real) and not isinstance(keep, (bool, Fraction)) and math.isfinite(keep)
    share = keep if isinstance(keep, Fraction) else Fraction(str(keep)) if number else None
    if share is None or not 0 <= share <= 1:
        raise ValueError(f"keep={keep!r} must be a share in [0, 1] or an int count")
    left_out = (1 - share) * total
    return total - (round(left_out) if rounding == "nearest" else math.floor(left_out))


def keep_masks(scores: Mapping[str, Tensor], keep: Keep = 0.6, scope: Scope = "global", seed: int = 0, rounding: Rounding = "nearest",
               shuffle: Literal["within_tensor"] | None = None, among: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The best-scored positions under a budget: a bool tensor for each score, exactly as many True as the budget says.

    Args:
        scores: larger is kept; -inf is kept last. Any dtype and device; masks lie where their scores do.
        keep, rounding: as in `kept_count`.
        scope: global: one ranking over all tensors; local: the share in every tensor; erdos_renyi: in every tensor min(1, eps * sum(shape) / prod(shape)) of
            it, eps such that the total is the budget (Erdos-Renyi(-kernel) allocation of sparse training).
        seed: of the permutation that decides between equal scores, and of `shuffle`.
        shuffle: "within_tensor" permutes every mask inside its tensor afterwards: the control that tells a criterion from its layer ratios.
        among: masks of the positions that `shuffle` may take, with all that are kept; None: every one.

    Raises:
        ValueError: no scores, NaN among them, an unknown scope or shuffle, a budget out of range, a count as the budget of scope="local".
    """
    if not scores:
        raise ValueError("keep_masks needs scores of at least one tensor, got none")
    if broken := [name for name, s in scores.items() if s.isnan().any()]:
        raise ValueError(f"scores of {', '.join(broken)} hold NaN, which cannot be ranked")
    check_scope(scope, keep)
    if shuffle not in (None, "within_tensor"):
        raise ValueError(f"shuffle={shuffle!r} is unknown; allowed: None, within_tensor")
    generator = torch.Generator().manual_seed(seed)
    if scope == "global":
        flat_N = torch.cat([s.detach().flatten() for s in scores.values()])
        parts = _best(flat_N, kept_count(len(flat_N), keep, rounding), generator).split([s.numel() for s in scores.values()])
        masks = {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}
    else:
        if scope == "local":
            counts = {name: kept_count(s.numel(), keep, rounding) for name, s in scores.items()}
        else:
            counts = erdos_renyi_counts({name: s.shape for name, s in scores.items()}, keep, rounding)
        masks = {name: _best(s.detach().flatten(), counts[name], generator).view(s.shape) for name, s in scores.items()}
    if shuffle:
        masks = {name: _permuted(m, None if among is None else among[name], generator) for name, m in masks.items()}
    return masks


def check_scope(scope: str, keep: Keep) -> None:
    """ValueError for an unknown scope, and for a count as the budget of scope="local"."""
    if scope not in ("global", "local", "erdos_renyi"):
        raise ValueError(f"scope={scope!r} is unknown; allowed: global, local, erdos_renyi")
    if scope == "local" and isinstance(keep, int):
        raise ValueError(f"keep={keep} is a count, which scope='local' cannot share out; give a share")


def _permuted(mask: Tensor, among: Tensor | None, generator: torch.Generator) -> Tensor:
    places_M = (torch.ones_like(mask) if among is None else among).flatten().nonzero().squeeze(1)
    flat_N = mask.flatten()
    drawn_M = flat_N[places_M[torch.randperm(len(places_M), generator=generator, device="cpu").to(mask.device)]]
    return torch.zeros_like(flat_N).index_put_((places_M,), drawn_M).view(mask.shape)


def _best(score_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """True at the `count` largest; those tied with the smallest that is kept are drawn."""
    if count == 0 or count == len(score_N):
        return torch.full_like(score_N, count > 0, dtype=torch.bool)
    place = len(score_N) - count  # on CUDA kthvalue is not deterministic, and refused where that is asked for
    threshold = score_N.sort().values[place] if score_N.is_cuda else score_N.kthvalue(place + 1).values
    kept_N = score_N > threshold
    tied_M = (score_N == threshold).nonzero().squeeze(1)
    drawn = torch.randperm(len(tied_M), generator=generator, device="cpu")[: count - int(kept_N.sum())]
    kept_N[tied_M[drawn.to(tied_M.device)]] = True
    return kept_N


def erdos_renyi_counts(shapes: Mapping[str, torch.Size], keep: Keep, rounding: Rounding = "nearest") -> dict[str, int]:
    """Kept positions of every tensor in the allocation of scope="erdos_renyi", summing to the budget exactly (largest remainders, first come)."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = kept_count(sum(sizes.values()), keep, rounding)
    full: set[str] = set()
    while True:  # tensors that would be more than full are fixed, and eps is solved again for the others
        weight = {name: sum(shape) for name, shape in shapes.items() if name not in full}
        left = budget - sum(sizes[name] for name in full)
        eps = Fraction(left, max(1, sum(weight.values())))
        over = {name for name, w in weight.items() if eps * w > sizes[name]}
        if not over:
            break
        full |= over
    exact = {name: Fraction(sizes[name]) if name in full else eps * weight[name] for name in shapes}
    counts = {name: math.floor(share) for name, share in exact.items()}
    for name in sorted(shapes, key=lambda n: counts[n] - exact[n])[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


def refuse_uninformative(scores: Mapping[str, Tensor], method: str, candidates: Mapping[str, Tensor] | None = None) -> None:
    """ValueError for scores of a data-driven method that cannot tell positions apart: not finite, or all equal (a zero-initialised up-projection, identical
    experts). `candidates` (masks) leaves out positions that are decided already."""
    values = [s[candidates[name]] if candidates else s.flatten() for name, s in scores.items()]
    values = [v for v in values if v.numel()]
    if broken := [name for name, s in scores.items() if not s.isfinite().all()]:
        raise ValueError(f"{method} scores of {', '.join(broken[:3])} are not finite: the loss or its gradient overflowed")
    low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
    if low == high and sum(v.numel() for v in values) > 1:
        raise ValueError(f"all {method} scores are {low + 0.0:g}: they say nothing about which positions to keep. A zero-initialised matrix or identical "
                         "experts have no first-order effect; break the symmetry first, or take another method (random, magnitude)")


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as uint8 [ceil(N / 8)], little-endian within a byte, padded with zeros."""
    flat_N = mask.flatten().to(torch.uint8)
    bits_B8 = torch.nn.functional.pad(flat_N, (0, -len(flat_N) % 8)).view(-1, 8)
    return (bits_B8 << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size | tuple[int, ...], check: bool = True) -> Tensor:
    """The bool mask of `shape` that `pack_bits` packed. ValueError for bits of another length, or (with `check`, which reads the bits) set beyond the end."""
    total = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-total // 8),):
        raise ValueError(f"a mask of shape {list(shape)} has {-(-total // 8)} bytes; got {bits.dtype} {list(bits.shape)}")
    if _is_plain(bits):
        flat = _BYTES.index_select(0, bits.int()).view(torch.bool)  # much faster than shifts
    else:
        flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten().bool()
    if check and flat[total:].any():
        raise ValueError(f"bits beyond the {total} of shape {list(shape)} are set: the mask is damaged or of another shape")
    return flat[:total].view(shape)


def positions(mask: Tensor, count: int) -> Tensor:
    """Flat positions [count] where a mask is True, ascending. Their number is given: to find it would be to wait for the device."""
    if _is_plain(mask):
        return torch.from_numpy(mask.numpy().ravel().nonzero()[0])  # much faster than torch's
    return torch.nonzero_static(mask.flatten(), size=count).squeeze(1)


def _is_plain(t: Tensor) -> bool:
    """Does the tensor lie in memory that can be read at once, outside of any graph that is being made?"""
    return (type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and torch._C._functorch.peek_interpreter_stack() is None)


# The eight bools of every byte, as one number each.
_BYTES = (torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().view(torch.int64).flatten()


def mask_hash(masks: Mapping[str, Tensor]) -> str:
    """Names a set of masks by names, shapes and bits: equal on every process that holds the same."""
    hasher = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        hasher.update(f"{name} {tuple(mask.shape)}\n".encode() + pack_bits(mask).cpu().numpy().tobytes())
    return hasher.hexdigest()[:16]
