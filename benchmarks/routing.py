"""Time routing alone: the choice of experts from logits, and the order of rows by expert from the choice.

    python -m benchmarks --parts routing [--quick]

Writes routing.md, routing.json and routing.png. T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer import choose
from benchmarks.measure import OURS, attempt, cell, heading, interleave, plot, runnable, save, summarise, tabulate, timer
from benchmarks.peers import CHOOSERS, INDEXERS
from dyn.ops import route as route_module
from dyn.ops import rows as rows_module
from dyn.ops.route import route
from dyn.ops.triton_order import order_rows, read_order

REFERENCE = "torch"
SHAPES = {
    "tiny": [(40, 4, 2)],
    "quick": [(2048, 8, 4), (2048, 64, 8)],
    "full": [(1, 16, 4), (2048, 8, 4), (2048, 64, 8), (32768, 16, 4), (32768, 64, 8), (32768, 128, 8)],
}
METRICS = {"time_ratio": "time / torch"}


def choosing(logits: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """From logits to ids and weights, and the parts of the reference."""

    def torch_route() -> tuple[Tensor, Tensor]:
        weight, idx = logits.softmax(-1).topk(k, dim=-1)
        return idx, weight / weight.sum(-1, keepdim=True)

    ours = {f"{OURS}{name}": (lambda name=name: route(logits, k, backend=name)) for name in runnable(route_module._BACKENDS, logits.device.type)}
    return {"torch": torch_route, "torch: softmax": lambda: logits.softmax(-1), "torch: top-k": lambda: logits.topk(k, dim=-1), **ours}


def indexing(idx: Tensor, num_experts: int) -> dict[str, Callable[[], object]]:
    """From ids to the order of rows by expert and where each expert's rows end."""
    weights = torch.empty(num_experts, 16, 16, device=idx.device, dtype=torch.bfloat16)  # says where the ends have to be: on the device or on the host

    def torch_index() -> tuple[Tensor, Tensor]:
        flat = idx.flatten()
        return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts).cumsum(0)

    def ours() -> tuple[object, Tensor | None]:
        ends, slot = rows_module.arrange("benchmark", idx, len(weights), {"idx": idx}, 0)
        return rows_module.usable(ends, slot, weights), slot

    calls = {"torch": torch_index, "torch: sort": lambda: idx.flatten().sort(stable=True), f"{OURS}torch": ours}
    if "triton" in runnable(route_module._BACKENDS, idx.device.type):
        calls[f"{OURS}triton"] = lambda: order_rows(idx, num_experts, 64)
    return calls


def same_choice(have: object, want: tuple[Tensor, Tensor]) -> bool:
    """Do ids and weights agree, in any order of a token's experts?"""
    (idx, weight), (true_idx, true_weight) = have, want
    order, true_order = idx.long().argsort(-1), true_idx.argsort(-1)
    return bool(idx.long().gather(-1, order).equal(true_idx.gather(-1, true_order))
                and torch.allclose(weight.float().gather(-1, order), true_weight.gather(-1, true_order), atol=1e-2))


def same_order(have: Tensor | tuple, want: tuple[Tensor, Tensor], num_experts: int) -> bool:
    """Is what one of ours gives a stable sort by expert (padding, below 0, apart), and do the experts' rows end where they should?"""
    true_slot, true_ends = want
    if isinstance(have, Tensor):
        order = read_order(have, len(true_slot), num_experts)
        have = order.start_E[1:], order.slot_S
    ends, slot = torch.as_tensor(have[0], device=true_slot.device).long(), have[1].long()
    rows_before = F.pad((slot >= 0).cumsum(0), (1, 0))
    return slot[slot >= 0].equal(true_slot) and rows_before[ends].equal(true_ends)


def measure(T: int, E: int, K: int, device: str, rounds: int, clock: Callable[[], float]) -> list[dict]:
    """The two tables of one shape. SystemExit where a back end of ours chooses or orders otherwise than torch."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(T, E, device=device, generator=g)
    idx = choose(T, E, K, "uniform", device, g)
    makers = {"choose": (choosing(logits, K), CHOOSERS, "logits to ids and weights"),
              "index": (indexing(idx, E), INDEXERS, "ids to the order of rows and the experts' ends")}
    tables = []

    def same(what: str, have: object, want: tuple[Tensor, Tensor]) -> bool:
        return same_choice(have, want) if what == "choose" else same_order(have, want, E)

    for what, (calls, peers, about) in makers.items():
        missing, timers = {}, {}
        for name, adapt in peers.items():
            calls[name], why = attempt(name, lambda adapt=adapt: adapt(logits, idx))
            if why is None and device != "cuda":
                why = "needs CUDA"
            if why is not None:
                del calls[name]
                missing[name] = why
        for name, call in calls.items():
            run, why = attempt(name, lambda call=call: timer(call, clock), REFERENCE)
            if why is None and not name.startswith(REFERENCE) and (what == "choose" or name.startswith(OURS)):  # peers' orders have forms of their own
                right, why = attempt(name, lambda what=what, call=call, torch_call=calls[REFERENCE]: same(what, call(), torch_call()))
                if why is None and not right:
                    why = "wrong: other experts, weights or rows than torch"
            if why is None:
                timers[name] = {"time": run}
                continue
            missing[name] = why
            if name.startswith(OURS):
                raise SystemExit(f"routing T={T} E={E} K={K}: {name} {why}")
        rows = summarise(interleave(timers, rounds), REFERENCE)
        tables.append({"name": f"{what}, T={T} E={E} K={K}", "about": about, "reference": REFERENCE, "ours": [name for name in rows if name.startswith(OURS)],
                       "rounds": rounds, "rows": rows, "missing": missing})
    return tables


def run(env: dict, size: str, out: Path, rounds: int, clock: Callable[[], float]) -> dict:
    """All shapes of a size."""
    result: dict = {"what": "routing", "env": env, "size": size, "tables": []}
    for shape in SHAPES[size]:
        print("routing T={} E={} K={}".format(*shape), flush=True)
        result["tables"] += measure(*shape, env["kind"], rounds, clock)
        save(result, markdown(result), out)
    plot(result, METRICS, out)
    return result


def markdown(result: dict) -> str:
    """Two tables a shape."""
    lines = heading(
        result, "Routing alone",
        "Medians with quartiles. Ratios are to torch in the same round: softmax, top-k and renormalisation for the choice; a stable sort, counts and",
        "their sums for the order. What a peer prepares for its kernels beside the order counts as its time.")
    for table in result["tables"]:
        lines += tabulate(table, "variant", {"microseconds": lambda r: cell(r["time"], 1e6, 1), "/ torch": lambda r: cell(r["time_ratio"])})
    return "\n".join(lines)
