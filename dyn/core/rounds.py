"""Score, partition, apply, n times on a schedule: PAD-Net's Iterative Mode Partition (section 4) and iterative pruning at initialisation are this loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from dyn.core.partition import Keep, Rounding, Scope, check_scope, keep_masks, kept_count, refuse_uninformative

Schedule = Literal["exponential", "linear"]
Masks = dict[str, Tensor]


def kept_counts(total: int, keep: Keep, rounds: int, schedule: Schedule = "exponential", rounding: Rounding = "nearest") -> list[int]:
    """Positions kept after each of `rounds` rounds, of `total`; the last is the budget exactly.

    exponential: keep^(t/T); linear: 1 - (1 - keep) t / T (PAD-Net section 4.3).

    Raises:
        ValueError: no round, an unknown schedule, a budget out of range.
    """
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds={rounds} must be an integer, at least 1")
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"schedule={schedule!r} is unknown; allowed: exponential, linear")
    last = kept_count(total, keep, rounding)
    share = last / max(total, 1) if isinstance(keep, int) else float(keep)
    between = (share ** (t / rounds) if schedule == "exponential" else 1 - (1 - share) * t / rounds for t in range(1, rounds))
    return [max(last, kept_count(total, min(1.0, s), rounding)) for s in between] + [last]


def partition_in_rounds(
    score: Callable[[Masks], Mapping[str, Tensor]], masks: Mapping[str, Tensor], *, keep: Keep, rounds: int = 1, schedule: Schedule = "exponential",
    scope: Scope = "global", seed: int = 0, rounding: Rounding = "nearest", monotone: bool = True, informative: str | None = None,
    apply: Callable[[Masks], object] = lambda masks: None,
) -> Masks:
    """Masks after the last round.

    Args:
        score: current masks -> scores of the same names and shapes; called once a round, after `apply`.
        masks: where to start, usually all True; False positions never come back if `monotone`.
        keep, rounding, scope, seed: as in `dyn.core.partition.keep_masks`; keep is of all positions.
        rounds, schedule: as in `kept_counts`.
        monotone: a position that is out stays out; False ranks all positions anew each round (the official PAD-Net code).
        informative: name of a data-driven method whose scores are refused when they cannot tell positions apart.
        apply: takes the new masks into the network before the next round.

    Raises:
        ValueError: a budget out of range, scores of other shapes or that say nothing, fewer positions left than the budget keeps.
    """
    masks = {name: m.clone() for name, m in masks.items()}
    check_scope(scope, keep)
    total = sum(m.numel() for m in masks.values())
    counts = kept_counts(total, keep, rounds, schedule, rounding)
    if monotone and (there := int(sum(m.sum() for m in masks.values()))) < counts[-1]:
        raise ValueError(f"keep={keep} needs {counts[-1]} of {total} positions, {there} are left")
    for number, count in enumerate(counts):
        found = {name: s.detach() for name, s in score(masks).items()}
        if {n: s.shape for n, s in found.items()} != {n: m.shape for n, m in masks.items()}:
            raise ValueError(f"scores have the names and shapes of other tensors: {', '.join(found)} for {', '.join(masks)}")
        if informative and 0 < count < total:
            refuse_uninformative(found, informative, masks if monotone else None)
        if monotone:
            found = {name: s.to(torch.promote_types(s.dtype, torch.float32)).masked_fill(~masks[name], -torch.inf) for name, s in found.items()}
        # A count is exact; local budgets are shares, the last one as it was given.
        budget = count if scope != "local" else keep if number + 1 == len(counts) else count / total
        new = keep_masks(found, budget, scope, seed + number, rounding)
        if monotone and scope != "global" and (short := [name for name, m in new.items() if (m & ~masks[name]).any()]):
            raise ValueError(f"keep={keep} with scope={scope}: {short[0]} has {int(masks[short[0]].sum())} positions left and should keep "
                             f"{int(new[short[0]].sum())}")
        masks = {name: m & masks[name] for name, m in new.items()} if monotone else new
        apply(masks)
    return masks
