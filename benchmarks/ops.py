"""Time the routed experts against the dense feed-forward network and against transformers' own implementations.

    python -m benchmarks.ops [--quick] [--out FOLDER] [--rounds N] [--threads N] [--cpu-time]

Writes ops.md, ops.json and ops.png. Every variant first has to agree with the eager reference in float64. Then all
variants run once a round, in a shuffled order, in one process: the figures are medians over rounds with quartiles, and
ratios are medians of (variant / dense in the same round), since other load on the machine moves all of a round together.
`--cpu-time --threads 1` counts the process's own time instead, for a machine that is busy.

T tokens, D hidden size, F expert width, E experts, K experts a token, N neurons of the dense network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dyn.ops import experts as experts_module
from dyn.ops.experts import experts
from dyn.ops.route import route

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSE = "dense N"
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "autocast": 3e-2}  # of the norm, against float64


@dataclass(frozen=True)
class Case:
    """One shape; N = E * F unless given (the dense network that the experts were cut from)."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    modes: tuple[str, ...] = ("bf16", "fp32", "autocast")

    @property
    def N(self) -> int:
        return self.E * self.F


QUICK = [Case("SmolLM2-135M, 4 of 8", 1024, 576, 192, 8, 4), Case("small odd experts, 4 of 16", 512, 512, 86, 16, 4, ("bf16",))]
FULL = [
    Case("SmolLM2-135M, 4 of 8", 1024, 576, 192, 8, 4),
    Case("SmolLM2-135M, 4 of 8, T=2048", 2048, 576, 192, 8, 4),
    Case("SmolLM2-135M, 4 of 16", 2048, 576, 96, 16, 4),
    Case("small odd experts, 4 of 16", 2048, 512, 86, 16, 4, ("bf16", "fp32")),
    Case("large experts, 2 of 8", 2048, 1024, 1408, 8, 2, ("bf16", "fp32")),
]


class Layer:
    """The tensors of one case and mode, and its variants: names to functions of no argument that return y."""

    def __init__(self, case: Case, mode: str, device: str) -> None:
        self.case, self.mode, self.device = case, mode, device
        g = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32

        def leaf(*shape: int) -> Tensor:
            fan_in = shape[-1] if len(shape) > 2 else 1
            return (torch.randn(*shape, generator=g) / fan_in**0.5).to(device, dtype).requires_grad_()

        self.x = leaf(case.T, case.D)
        self.router = (torch.randn(case.E, case.D, generator=g) / case.D**0.5).to(device, dtype).requires_grad_()
        self.gate_up, self.down = leaf(case.E, 2 * case.F, case.D), leaf(case.E, case.D, case.F)
        self.dy = torch.randn(case.T, case.D, generator=g).to(device)
        self.leaves = (self.x, self.router, self.gate_up, self.down)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.mode == "autocast" else contextlib.nullcontext()

    def routed(self, run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """Gate, top-k and experts, as one layer of a model."""

        def forward() -> Tensor:
            idx, weight = route(F.linear(self.x, self.router), self.case.K)
            return run(self.x, self.gate_up, self.down, idx, weight)

        return forward

    def dense(self, width: int) -> Callable[[], Tensor]:
        """A dense network on the first `width` of the experts' neurons, with parameters of its own."""
        gate, up = (w.flatten(0, 1)[:width].detach().clone().requires_grad_() for w in self.gate_up.chunk(2, dim=1))
        down = self.down.detach().transpose(0, 1).flatten(1)[:, :width].clone().requires_grad_()
        return lambda: F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down)

    def transformers(self, implementation: str) -> Callable[..., Tensor]:
        c = self.case
        config = MixtralConfig(hidden_size=c.D, intermediate_size=c.F, num_local_experts=c.E, num_experts_per_tok=c.K)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = torch.nn.Parameter(self.gate_up), torch.nn.Parameter(self.down)

        def run(x: Tensor, gate_up: Tensor, down: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
            # Leaves of ours in place of its parameters, so that gradients arrive where they are compared.
            module.__dict__.update(gate_up_proj=gate_up, down_proj=down)
            return module(x, idx, weight)

        module._parameters.clear()
        return run

    def variants(self) -> dict[str, Callable[[], Tensor]]:
        out = {DENSE: self.dense(self.case.N), "dense K*F": self.dense(self.case.K * self.case.F)}
        for name in (n for n in experts_module._BACKENDS if n != "triton" or self.x.is_cuda):
            out[f"ours: {name}"] = self.routed(lambda *a, name=name: experts(*a, backend=name))
        out["ours: torch, recompute"] = self.routed(lambda *a: experts(*a, backend="torch", recompute=True))
        for name in ("eager", "grouped_mm"):
            out[f"transformers: {name}"] = self.routed(self.transformers(name))
        return out

    def results(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        with self.autocast():
            y = forward()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy.to(y.dtype))]


def check(layer: Layer, variants: dict[str, Callable[[], Tensor]]) -> dict[str, float | str]:
    """Largest relative error of output and gradients against the float64 reference on the same routing; a text if it fails."""
    with layer.autocast(), torch.no_grad():
        idx, weight = route(F.linear(layer.x, layer.router), layer.case.K)
    x, gate_up, down = (t.detach().double().requires_grad_() for t in (layer.x, layer.gate_up, layer.down))
    y = experts(x, gate_up, down, idx, weight.double(), backend="eager")
    # The gradient of x through the gate is left out on both sides by comparing the experts' own gradients.
    want = [y, *torch.autograd.grad(y, (gate_up, down), layer.dy.double())]
    out: dict[str, float | str] = {}
    for name, forward in variants.items():
        if name.startswith("dense"):
            continue
        try:
            y, _, _, dgate_up, ddown = layer.results(forward)
        except RuntimeError as error:
            out[name] = f"raises: {str(error).splitlines()[0][:110]}"
            continue
        error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip((y, dgate_up, ddown), want, strict=True))
        if error > TOLERANCE[layer.mode]:
            raise SystemExit(f"{layer.case.name} {layer.mode}: {name} differs from the reference by {error:.2g}")
        out[name] = error
    return out


def saved_bytes(layer: Layer, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, beside the inputs and parameters, each storage once."""
    given = {t.untyped_storage().data_ptr() for t in layer.leaves}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if not (t.is_leaf and t.requires_grad) and storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), layer.autocast():
        y = forward()  # held until the count is taken, so that no address is used twice
    size = sum(kept.values())
    del y
    return size


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def make_clock(device: str, cpu_time: bool) -> Callable[[], float]:
    """Seconds: of this process with `cpu_time`, else on the wall, after the device has finished what it was given."""
    if cpu_time:
        return time.process_time
    return time.perf_counter if device == "cpu" else lambda: (torch.cuda.synchronize(), time.perf_counter())[1]


def time_rounds(run: dict[str, Callable[[], dict[str, float]]], rounds: int) -> list[dict[str, dict[str, float]]]:
    """Run every variant once a round in a shuffled order; the first round warms up and is dropped."""
    out, order = [], random.Random(0)
    for _ in range(rounds + 1):
        names = list(run)
        order.shuffle(names)
        out.append({name: run[name]() for name in names})
    return out[1:]


def measure(layer: Layer, rounds: int, clock: Callable[[], float]) -> dict:
    """One row a variant: errors, bytes kept, seconds forward and forward+backward, ratios to the dense network."""
    variants = layer.variants()
    errors = check(layer, variants)
    variants = {name: f for name, f in variants.items() if not isinstance(errors.get(name), str)}

    def once(forward: Callable[[], Tensor]) -> dict[str, float]:
        start = clock()
        with layer.autocast():
            y = forward()
        middle = clock()
        y.backward(layer.dy.to(y.dtype))
        end = clock()
        for leaf in layer.leaves:
            leaf.grad = None
        return {"forward": middle - start, "both": end - start}

    timed = time_rounds({name: lambda f=f: once(f) for name, f in variants.items()}, rounds)
    rows = {}
    for name, forward in variants.items():
        rows[name] = {"error": errors.get(name), "saved_bytes": saved_bytes(layer, forward)}
        for part in ("forward", "both"):
            rows[name][part] = spread([r[name][part] for r in timed])
            rows[name][f"{part}_ratio"] = spread([r[name][part] / r[DENSE][part] for r in timed])
    failed = {name: why for name, why in errors.items() if isinstance(why, str)}
    return {"case": asdict(layer.case) | {"N": layer.case.N}, "mode": layer.mode, "rounds": rounds, "rows": rows, "failed": failed}


def measure_route(device: str, rounds: int, quick: bool, clock: Callable[[], float]) -> list[dict]:
    """`route` and its parts, and the sort that orders the rows by expert."""
    out = []
    for T, E, K in [(2048, 8, 4), (2048, 64, 8)] + ([] if quick else [(32768, 16, 4), (32768, 128, 8)]):
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(device)
        idx = route(logits, K)[0]
        parts = {
            "route": lambda a=logits, k=K: route(a, k),
            "top-k": lambda a=logits, k=K: a.topk(k),
            "softmax": lambda a=logits: a.softmax(-1),
            "sort index": lambda a=idx: a.flatten().sort(stable=True),
        }

        def once(f: Callable[[], object]) -> dict[str, float]:
            start = clock()
            f()
            return {"time": clock() - start}

        timed = time_rounds({name: lambda f=f: once(f) for name, f in parts.items()}, 2 * rounds)
        out.append({"T": T, "E": E, "K": K, "rows": {name: spread([r[name]["time"] for r in timed]) for name in parts}})
    return out


def environment(device: str) -> dict:
    """Device, versions, commit and load, as they stand beside every table."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown", "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def markdown(result: dict) -> str:
    """The report: one table a case and mode, one for routing."""
    def cell(s: dict[str, float], unit: float = 1.0, digits: int = 2) -> str:
        return f"{s['median'] * unit:.{digits}f} ({s['low'] * unit:.{digits}f}-{s['high'] * unit:.{digits}f})"

    env = result["env"]
    lines = ["# Routed experts: time and memory", "", ", ".join(f"{k} {v}" for k, v in env.items()), ""]
    lines += ["Medians with quartiles. A layer is gate, top-k and experts; dense N is the network that the experts were cut from, dense K*F",
              "one of the width that a token uses. Ratios are to dense N in the same round: below 1 is faster.", ""]
    for table in result["layers"]:
        c = table["case"]
        lines += [f"## {c['name']}, {table['mode']}", "", f"T={c['T']} D={c['D']} F={c['F']} E={c['E']} K={c['K']} N={c['N']}, {table['rounds']} rounds", "",
                  "| variant | forward ms | ratio | forward+backward ms | ratio | kept for backward MB | error |", "|---|---|---|---|---|---|---|"]
        for name, row in table["rows"].items():
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {name} | {cell(row['forward'], 1e3, 1)} | {cell(row['forward_ratio'])} | {cell(row['both'], 1e3, 1)} | "
                         f"{cell(row['both_ratio'])} | {row['saved_bytes'] / 1e6:.1f} | {error} |")
        lines += [f"| {name} | {why} | | | | | |" for name, why in table["failed"].items()] + [""]
    lines += ["## Routing alone, microseconds", "", "| T | E | K | route | top-k | softmax | sort index |", "|---|---|---|---|---|---|---|"]
    for row in result["route"]:
        lines.append(f"| {row['T']} | {row['E']} | {row['K']} | " + " | ".join(cell(s, 1e6, 0) for s in row["rows"].values()) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Forward+backward against the dense network, a panel for each case and mode; bars are medians, lines quartiles."""
    tables = result["layers"]
    fig, axes = plt.subplots(len(tables), 1, figsize=(8, 2.2 * len(tables)), squeeze=False, layout="constrained")
    for axis, table in zip(axes[:, 0], tables, strict=True):
        names = [name for name in table["rows"] if name != DENSE]
        ratios = [table["rows"][name]["both_ratio"] for name in names]
        middle = [r["median"] for r in ratios]
        axis.barh(names, middle, color=["C1" if n.startswith("ours") else "C0" for n in names],
                  xerr=[[m - r["low"] for m, r in zip(middle, ratios, strict=True)], [r["high"] - m for m, r in zip(middle, ratios, strict=True)]])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(f"{table['case']['name']}, {table['mode']}", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("time forward+backward / dense network of full width")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> dict:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer rounds: under two minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for ops.md, ops.json, ops.png")
    parser.add_argument("--rounds", type=int, help="rounds of each table (default 21, quick 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, not the wall's (CPU only)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = args.rounds or (5 if args.quick else 21)
    if rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles need them")
    if args.cpu_time and device == "cuda":
        parser.error("--cpu-time would leave out the device's time")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = make_clock(device, args.cpu_time)
    result: dict = {"env": environment(device) | {"clock": "process" if args.cpu_time else "wall"}, "layers": []}
    for case in QUICK if args.quick else FULL:
        for mode in case.modes:
            print(f"{case.name}, {mode} ...", flush=True)
            result["layers"].append(measure(Layer(case, mode, device), rounds, clock))
    result["route"] = measure_route(device, rounds, args.quick, clock)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ops.json").write_text(json.dumps(result, indent=1))
    (args.out / "ops.md").write_text(markdown(result))
    plot(result, args.out / "ops.png")
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
