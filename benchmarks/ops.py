"""Time the routed experts against dense networks of the same operations and against other people's experts.

    python -m benchmarks --parts ops [--quick] [--only TEXT]

Writes ops.md, ops.json and ops.png, table by table. Every variant of a table first has to agree with float64; one of ours that does not, or fails, ends the
run, a peer's stands in the table with its error. Then all variants of a table run once a round, in a shuffled order, in one process,
on the same tensors and the same routing. Ratios are to "dense K*F", the network without routing that does as many operations.

T tokens, D hidden size, F expert width, E experts, K experts a token, N = E*F neurons of the dense network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.layer import TOLERANCE, Case, Layer, Reference, Variant
from benchmarks.measure import OURS, attempt, cell, free, heading, interleave, peak_bytes, plot, runnable, save, saved_bytes, summarise, tabulate, timer
from benchmarks.peers import PEERS, dense
from dyn.ops import experts as experts_module
from dyn.ops.experts import experts

REFERENCE = "dense K*F"
TITLE = "Routed experts: time and memory"
METRICS = {"both_ratio": "time forward+backward / dense K*F", "forward_ratio": "time forward / dense K*F"}

SMOLLM2 = Case("SmolLM2-135M 4 of 8", 1024, 576, 192, 8, 4)
SMOLLM2_SMALL = Case("SmolLM2-135M 16 of 32", 1024, 576, 48, 32, 16)
ODD = Case("small odd experts 4 of 16", 2048, 512, 86, 16, 4, ("bf16", "fp32"))
LARGE = [
    Case("LLaMA-MoE-3.5B 4 of 16", 32768, 4096, 688, 16, 4),
    Case("LLaMA-MoE-3.5B 2 of 8", 32768, 4096, 1376, 8, 2),
    Case("LLaMA-MoE-3.0B 2 of 16", 32768, 4096, 688, 16, 2),
    Case("Mixtral-8x7B 2 of 8", 16384, 4096, 14336, 8, 2),
    Case("OLMoE 8 of 64", 32768, 2048, 1024, 64, 8),
    Case("Qwen3-30B-A3B 8 of 128", 32768, 2048, 768, 128, 8),
]


def few(case: Case, *tokens: int) -> list[Case]:
    """The case as in decoding: few tokens, forward only."""
    return [replace(case, T=T, modes=case.modes[:1], routings=("uniform",), train=False) for T in tokens]


def cases(size: str, device: str) -> list[Case]:
    """The shapes of a run: "full" for the device, "quick" (a part of the full ones, so that they compare), or "tiny" (the whole path in seconds)."""
    if size == "tiny":  # float32 without CUDA, since Triton's interpreter computes bfloat16 wrongly
        tiny = Case("tiny 2 of 4", 24, 32, 24, 4, 2, ("bf16",) if device == "cuda" else ("fp32",))
        return [tiny, *few(replace(tiny, name="tiny odd 2 of 4", D=24, F=10), 3)]
    if size == "quick":
        return [replace(SMOLLM2, modes=("bf16", "fp32")), replace(ODD, T=512, modes=("bf16",)), *few(SMOLLM2, 1, 64)]
    if device == "cuda":
        smollm2 = [replace(c, T=32768) for c in (SMOLLM2, SMOLLM2_SMALL)]
        return LARGE + smollm2 + [ODD] + [f for c in (LARGE[0], LARGE[-1], SMOLLM2) for f in few(c, 1, 8, 64, 512)]
    return [
        replace(SMOLLM2, modes=("bf16", "fp32", "autocast")), SMOLLM2_SMALL, ODD, replace(ODD, T=512, modes=("bf16",)),
        Case("large experts 2 of 8", 4096, 1024, 1408, 8, 2, ("bf16", "fp32")), *few(SMOLLM2, 1, 8, 64, 512),
    ]


def variants(layer: Layer) -> dict[str, Callable[[], Variant]]:
    """Makers of everything that is compared; they raise where a variant cannot be. Back ends of ours come from the op's own list."""

    def ours(backend: str, recompute: bool = False) -> Callable[[], Variant]:
        return lambda: layer.variant(lambda: experts(layer.x, layer.gate_up, layer.down, layer.idx, layer.weight, backend=backend, recompute=recompute))

    backends = runnable(experts_module._BACKENDS, layer.device)
    out = {REFERENCE: lambda: dense(layer, layer.case.K * layer.case.F), "dense N": lambda: dense(layer, layer.case.N)}
    out |= {f"{OURS}{name}": ours(name) for name in backends}
    if layer.case.train:
        out |= {f"{OURS}{name}, recompute": ours(name, recompute=True) for name in backends if name != "eager"}
    return out | {name: lambda adapt=adapt: adapt(layer) for name, adapt in PEERS.items()}


def title(case: Case, mode: str, routing: str) -> str:
    """The name of a table."""
    return f"{case.name}, T={case.T}, {mode}, {routing}"


def check(layer: Layer) -> tuple[dict[str, float], dict[str, str]]:
    """Relative errors of the variants against float64, and reasons of those that cannot run or are wrong. SystemExit for a wrong one of ours."""
    reference = Reference(layer)
    errors, missing = {}, {}
    for name, make in variants(layer).items():
        variant, why = attempt(name, make, REFERENCE)
        if variant is not None and variant.gradients is not None:
            errors[name], why = attempt(name, lambda v=variant: reference.error(layer, v), REFERENCE)
            if why is None and not errors[name] <= TOLERANCE[layer.mode]:  # not <=: NaN is wrong
                why = f"wrong: differs from float64 by {errors[name]:.2g}"
        if why is not None:
            errors.pop(name, None)
            missing[name] = why
            if name.startswith(OURS):
                raise SystemExit(f"{layer.case.name} {layer.mode}: {name} {why}")
    return errors, missing


def measure(layer: Layer, routing: str, rounds: int, clock: Callable[[], float], errors: dict[str, float], missing: dict[str, str]) -> dict:
    """One table: seconds, operations a second, bytes kept for backward and at the peak, and ratios to the reference in the same round."""
    case, made, missing = layer.case, {}, dict(missing)
    for name, make in variants(layer).items():
        if name not in missing:
            made[name] = make()

    def timers(variant: Variant) -> dict[str, Callable[[], float]]:
        out = {"forward": timer(lambda: layer.forward(variant), clock)}
        return out | ({"both": timer(lambda: layer.backward(variant), clock)} if case.train else {})

    timed = {}
    for name, variant in made.items():
        timed[name], why = attempt(name, lambda v=variant: timers(v), REFERENCE)
        if why is not None:
            del timed[name]
            missing[name] = why
    rows = summarise(interleave(timed, rounds), REFERENCE)
    for name, row in rows.items():
        variant = made[name]
        row["error"] = errors.get(name)
        row["teraflops"] = {metric: case.flops(variant.width, metric == "both") / row[metric]["median"] / 1e12 for metric in timed[name]}
        if case.train:
            with layer.autocast():
                row["saved_bytes"] = saved_bytes(variant.run, (*variant.leaves, layer.idx, layer.idx32))
        if layer.device == "cuda":
            row["peak_bytes"] = peak_bytes(lambda v=variant: layer.backward(v) if case.train else layer.forward(v))
    about = f"D={case.D} F={case.F} E={case.E} K={case.K} N={case.N}, hottest expert {layer.hottest():.1f} times the mean load"
    return {"name": title(case, layer.mode, routing), "about": about, "case": asdict(case), "reference": REFERENCE,
            "ours": [name for name in rows if name.startswith(OURS)], "rounds": rounds, "rows": rows, "missing": missing}


def run(env: dict, size: str, out: Path, rounds: int, clock: Callable[[], float], only: str = "") -> dict:
    """Check, time and save table by table, so that a run that is cut off leaves what it has."""
    device = env["kind"]
    todo = [(case, mode, routing) for case in cases(size, device) for mode in case.modes for routing in case.routings if only in title(case, mode, routing)]
    result: dict = {"what": "ops", "env": env, "size": size, "tables": []}
    for case, mode, routing in todo:
        print(f"checking and timing {title(case, mode, routing)}", flush=True)
        layer = Layer(case, mode, routing, device)
        errors, missing = check(layer)
        free()
        result["tables"].append(measure(layer, routing, rounds, clock, errors, missing))
        del layer
        free()
        save(result, markdown(result), out)
    plot(result, METRICS, out)
    return result


def markdown(result: dict) -> str:
    """One table a case, precision and routing."""
    lines = heading(
        result, TITLE,
        "Medians with quartiles over rounds in which every variant runs once, on the same tensors and the same routing. The experts alone: routing has",
        "tables of its own. Forward keeps nothing for backward. dense K*F: a network without routing of the width that a token uses; dense N: of all",
        "neurons. Ratios are to dense K*F in the same round, below 1 is faster. TFLOP/s count 6 T K D F forward and 18 T K D F forward and backward",
        "(dense N: its own width). Kept: for backward, beside inputs and weights. Error: the largest relative one of output and gradients, to float64.")
    for table in result["tables"]:
        columns = {"forward ms": lambda r: cell(r["forward"], 1e3), "/ dense K*F": lambda r: cell(r["forward_ratio"]),
                   "TFLOP/s": lambda r: f"{r['teraflops']['forward']:.3g}"}
        if table["case"]["train"]:
            columns |= {"forward+backward ms": lambda r: cell(r["both"], 1e3), "/ dense K*F, f+b": lambda r: cell(r["both_ratio"]),
                        "TFLOP/s, f+b": lambda r: f"{r['teraflops']['both']:.3g}", "kept MB": lambda r: cell(r["saved_bytes"], 1e-6, 1)}
        if result["env"]["kind"] == "cuda":
            columns["peak MB"] = lambda r: cell(r["peak_bytes"], 1e-6, 1)
        columns["error"] = lambda r: "" if r["error"] is None else f"{r['error']:.1e}"
        lines += tabulate(table, "variant", columns)
    return "\n".join(lines)
