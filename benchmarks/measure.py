"""What the benchmarks share: rounds in one process, medians with quartiles, memory, the environment, and one form of result.

A result is `{"what", "env", "tables": [...]}`, a table `{"name", "about", "reference", "ours", "rounds", "rows", "missing"}`. A row maps metrics
to a number or to a spread (median, low and high quartile); the metric `x_ratio` is x over the reference row's x in the same round, since other
load on the machine moves all of a round together. `missing` maps rows that could not run to the reason, `ours` names the rows of this project.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dyn.env import commit, keep_freed_memory

OURS = "dyn "  # what the names of this project's rows begin with
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "moe-ops", "scattermoe", "sonic-moe")
SHORT = 2e-3  # seconds: calls below this are timed several at once, so that the clock and waiting for the device do not count
Spread = dict[str, float]


class Refused(Exception):
    """A variant that cannot run here or on this shape, with the reason."""


def attempt(name: str, make: Callable[[], object], reference: str = "") -> tuple[object, str | None]:
    """What `make` returns and no reason, or nothing and the reason for which the row `name` cannot run.

    An error of a peer's is a reason, never a crash, unless it leaves the CUDA device in error: RuntimeError then, with the peer's name, since whoever runs
    next would be blamed. Errors of our own rows and of the reference are raised as they are.
    """
    if name == reference or name.startswith(OURS):
        return make(), None
    try:
        made = make()
        settle()
        return made, None
    except Refused as why:
        return None, str(why)
    except ImportError as error:
        return None, f"not installed ({error})"
    except Exception as error:
        traceback.print_exc(limit=-3)
        why = " ".join(str(error).split()) or "no message"
    # Outside of `except`: the traceback, and with it the memory of a call that ran out of it, is gone.
    try:
        settle()
        free()
    except Exception as error:
        raise RuntimeError(f"{name} left the device in error, and nothing after it can run: {why}") from error
    return None, f"raises: {why[:110]}"


def settle() -> None:
    """Wait for the device, so that an error of what it was given is raised here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Return device memory that nobody holds any more, before the next allocations."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def runnable(backends: Iterable[str], device: str) -> list[str]:
    """The back ends of an op that can run here: "triton" needs a CUDA device or Triton's interpreter."""
    return [name for name in backends if name != "triton" or device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"]


def make_clock(device: str, cpu_time: bool = False) -> Callable[[], float]:
    """Seconds: of this process with `cpu_time`, else on the wall, after the device has finished what it was given."""
    if cpu_time:
        return time.process_time
    return time.perf_counter if device == "cpu" else lambda: (torch.cuda.synchronize(), time.perf_counter())[1]


def timer(call: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    """A function that returns the seconds of one call, as the mean of several where a call is short. Calls twice now: the first warms up."""
    call()
    start = clock()
    call()
    repeats = max(1, min(50, int(SHORT / max(clock() - start, 1e-9))))

    def run() -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return run


def time_rounds(rows: dict[str, Callable[[], dict[str, float]]], rounds: int) -> list[dict[str, dict[str, float]]]:
    """Every row (a function that gives its metrics in seconds) once a round, in a shuffled order; the first round warms up and is dropped."""
    out, order = [], random.Random(0)
    for _ in range(rounds + 1):
        names = list(rows)
        order.shuffle(names)
        seconds = {}
        for name in names:
            try:
                seconds[name] = rows[name]()
            except Exception as error:
                error.add_note(f"while {name} was timed")
                raise
        out.append({name: seconds[name] for name in rows})
    return out[1:]


def interleave(timers: dict[str, dict[str, Callable[[], float]]], rounds: int) -> list[dict[str, dict[str, float]]]:
    """`time_rounds` of rows with a timer for each metric."""
    return time_rounds({name: lambda metrics=metrics: {metric: run() for metric, run in metrics.items()} for name, metrics in timers.items()}, rounds)


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def summarise(rounds: list[dict[str, dict[str, float]]], reference: str) -> dict[str, dict[str, Spread]]:
    """Rows of a table: spreads of every metric, and of its ratio to the reference in the same round."""
    rows: dict[str, dict[str, Spread]] = {}
    for name, metrics in rounds[0].items():
        rows[name] = {}
        for metric in metrics:
            rows[name][metric] = spread([r[name][metric] for r in rounds])
            if metric in rounds[0][reference]:
                rows[name][f"{metric}_ratio"] = spread([r[name][metric] / r[reference][metric] for r in rounds])
    return rows


def saved_bytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward beside the tensors `given` (inputs and parameters), each storage once."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()  # held until the count is taken, so that no address is used twice
    size = sum(kept.values())
    del y
    return size


def peak_bytes(call: Callable[[], object]) -> int:
    """The most CUDA memory in use during the call, above what was in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def begin(device: str, cpu_time: bool = False, keep: bool = True) -> tuple[Callable[[], float], dict]:
    """For a command: with `keep`, let the process keep freed memory, all rows alike; its clock and its environment."""
    kept = keep and keep_freed_memory()
    return make_clock(device, cpu_time), environment(device, cpu_time) | {"freed memory": "kept" if kept else "returned"}


def environment(device: str, cpu_time: bool = False) -> dict:
    """Device, versions, commit and load, as they stand beside every table."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    name, changed = commit()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu, "kind": device,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "clock": "process" if cpu_time else "wall",
        "python": platform.python_version(), "cuda": torch.version.cuda if device == "cuda" else None,
        **{name: _version(name) for name in PACKAGES},
        "commit": (name or "unknown") + (" with changes" if changed else ""), "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# reports --------------------------------------------------------------------------------------------------------------


def cell(value: Spread | float | None, unit: float = 1.0, digits: int = 2) -> str:
    """A spread as median (low-high), a number, or nothing."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value * unit:.{digits}f}"
    return f"{value['median'] * unit:.{digits}f} ({value['low'] * unit:.{digits}f}-{value['high'] * unit:.{digits}f})"


def heading(result: dict, title: str, *notes: str) -> list[str]:
    """The first lines of a report."""
    return [f"# {title}", "", ", ".join(f"{k} {v}" for k, v in result["env"].items() if v is not None), "", *notes, ""]


def tabulate(table: dict, first: str, columns: dict[str, Callable[[dict], str]]) -> list[str]:
    """One table in Markdown: a row for each variant, then those that could not run with the reason."""
    lines = [f"## {table['name']}", "", f"{table['about']}; {table['rounds']} rounds", ""]
    lines += [f"| {' | '.join([first, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column(row) for column in columns.values())} |" for name, row in table["rows"].items()]
    lines += [f"| {name} | {why.replace('|', '/')}{' |' * len(columns)}" for name, why in table["missing"].items()]
    return [*lines, ""]


def save(result: dict, markdown: str, folder: Path) -> None:
    """Write WHAT.json and WHAT.md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / result["what"]
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown)


def plot(result: dict, metrics: dict[str, str], folder: Path) -> None:
    """Draw WHAT.png: a panel for each table, with bars of the first of `metrics` (metric: its label) that the table has."""
    heights = [0.9 + 0.22 * len(table["rows"]) for table in result["tables"]]
    fig, axes = plt.subplots(len(heights), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained")
    for axis, table in zip(axes[:, 0], result["tables"], strict=True):
        metric = next(m for m in metrics if any(m in row for row in table["rows"].values()))
        bars = {name: row[metric] for name, row in table["rows"].items() if metric in row}
        middle = [s["median"] for s in bars.values()]
        axis.barh(list(bars), middle, color=["C1" if name in table["ours"] else "C0" for name in bars], height=0.7,
                  xerr=[[s["median"] - s["low"] for s in bars.values()], [s["high"] - s["median"] for s in bars.values()]])
        if metric.endswith("_ratio"):
            axis.axvline(1, color="black", linewidth=0.8)
        if max(middle) > 20 * min(middle):
            axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(table["name"], fontsize=8)
        axis.set_xlabel(metrics[metric], fontsize=7)
        axis.tick_params(labelsize=7)
    fig.savefig(folder / f"{result['what']}.png", dpi=110)
    plt.close(fig)
