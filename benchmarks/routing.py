"""Time routing alone: the choice of experts from logits, and the order of rows by expert from the choice.

    python -m benchmarks --parts routing [--quick]

Writes routing.md, routing.json and routing.png. T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.layer import choose
from benchmarks.measure import attempt, cell, heading, interleave, plot, runnable, save, summarise, tabulate, timer
from benchmarks.peers import CHOOSERS, INDEXERS
from dyn.ops import route as route_module
from dyn.ops import rows as rows_module
from dyn.ops.route import route

OURS = "dyn "
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
        ends, slot = rows_module.arrange("benchmark", idx, weights)
        return rows_module.usable(ends, slot, weights), slot

    calls = {"torch": torch_index, "torch: sort": lambda: idx.flatten().sort(stable=True), f"{OURS}torch": ours}
    if "triton" in runnable(route_module._BACKENDS, idx.device.type):
        from dyn.ops.triton_order import order_rows

        calls[f"{OURS}triton"] = lambda: order_rows(idx, num_experts, 64)
    return calls


def same_choice(have: object, want: tuple[Tensor, Tensor]) -> bool:
    """Do ids and weights agree, in any order of a token's experts?"""
    (idx, weight), (true_idx, true_weight) = have, want
    order, true_order = idx.long().argsort(-1), true_idx.argsort(-1)
    return bool(idx.long().gather(-1, order).equal(true_idx.gather(-1, true_order))
                and torch.allclose(weight.float().gather(-1, order), true_weight.gather(-1, true_order), atol=1e-2))


def measure(T: int, E: int, K: int, device: str, rounds: int, clock: Callable[[], float]) -> list[dict]:
    """The two tables of one shape. SystemExit where a back end of ours chooses otherwise than torch."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(T, E, device=device, generator=g)
    idx = choose(T, E, K, "uniform", device, g)
    makers = {"choose": (choosing(logits, K), CHOOSERS, "logits to ids and weights"),
              "index": (indexing(idx, E), INDEXERS, "ids to the order of rows and the experts' ends")}
    tables = []
    for what, (calls, peers, about) in makers.items():
        missing, timers = {}, {}
        for name, adapt in peers.items():
            calls[name], why = attempt(lambda adapt=adapt: adapt(logits, idx))
            if why is None and device != "cuda":
                why = "needs CUDA"
            if why is not None:
                del calls[name]
                missing[name] = why
        for name, call in calls.items():
            run, why = attempt(lambda call=call: timer(call, clock))
            if why is None and what == "choose" and not name.startswith("torch") and not same_choice(call(), calls["torch"]()):
                why = "wrong: other experts or weights than torch"
            if why is None:
                timers[name] = {"time": run}
                continue
            missing[name] = why
            if name.startswith(OURS):
                raise SystemExit(f"routing T={T} E={E} K={K}: {name} {why}")
        rows = summarise(interleave(timers, rounds), "torch")
        tables.append({"name": f"{what}, T={T} E={E} K={K}", "about": about, "reference": "torch", "ours": [name for name in rows if name.startswith(OURS)],
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
