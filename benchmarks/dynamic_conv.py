"""Time dynamic, partially dynamic and compact networks against the static ones that they were made from, and each form of each layer.

    python -m benchmarks.dynamic_conv [--quick] [--tiny] [--only NAME] [--compile] [--layers] [--out FOLDER] [--rounds N] [--threads N] [--cpu-time]

Writes dynamic_conv.md and dynamic_conv.json. All variants of a network run once a round, in a shuffled order, in one process: figures are medians over rounds
with quartiles, ratios medians of (variant / static in the same round; variant / dynamic for inference). A training step is forward, loss, backward and SGD
with momentum. `--compile` times every network through `torch.compile` instead (on a GPU with CUDA graphs), in the forms that "auto" takes: the static one
gains as well, and a GPU no longer waits for kernels to be launched, of which attention branches have many. `--layers` times every distinct layer of the
network alone, forward and backward, in every form: what `dyn.ops.dynamic_conv.choose` is set by.
On a CPU fp32; on a GPU bf16 autocast, channels_last, 224x224, batch 64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyn.models.resnet
from benchmarks.measure import begin, spread, time_rounds
from dyn.nn.dynamic_conv import MixedConv2d
from dyn.nn.surgery import compact, count_parameters, make_partial
from dyn.ops.dynamic_conv import FORMS, choose, dynamic_conv2d

FAST = [form for form in FORMS if form != "loop"]
KEEP = 0.3


@dataclass(frozen=True)
class Case:
    """A network, and what it is fed."""

    name: str
    batch: int
    size: int
    classes: int = 1000
    train: bool = True  # time training steps too


TINY = [Case("resnet10", 2, 32, 10)]
QUICK = [Case("resnet18", 16, 64)]
CPU = [Case("resnet18", 16, 64), Case("resnet50", 8, 160), Case("resnet50", 16, 64), Case("mobilenetv2_100", 16, 64),
       Case("resnet50", 32, 224, train=False)]  # where unpacking a compact bank is a small part
CUDA = [Case("resnet18", 64, 224), Case("resnet50", 64, 224), Case("mobilenetv2_100", 64, 224)]


class Bench:
    """The networks of one case and their data."""

    def __init__(self, case: Case, device: str, width: float, clock: Callable[[], float], compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.clock, self.forms = case, device, clock, ("auto",) if compiled else ("auto", *FAST)
        options = {"num_classes": case.classes} | ({"channels": tuple(int(c * width) for c in (64, 128, 256, 512)), "stem_width": int(64 * width)}
                                                   if width != 1 else {})
        partial = timm.create_model(f"padnet_{case.name}", **options)
        self.nets = {"static": dyn.models.resnet.BACKBONES[case.name](**options), "dynamic": timm.create_model(f"dyconv_{case.name}", **options),
                     "partial": make_partial(partial, None, None, keep=KEEP, method="random")}
        self.nets |= {"compact": compact(partial), "compact, expanded": compact(partial, expand=True)}
        layout = torch.channels_last if device == "cuda" else torch.contiguous_format
        self.nets = {name: net.to(device).to(memory_format=layout) for name, net in self.nets.items()}
        mode = "reduce-overhead" if device == "cuda" else "default"
        self.calls = {name: torch.compile(net, mode=mode) for name, net in self.nets.items()} if compiled else self.nets
        self.images = torch.randn(case.batch, 3, case.size, case.size, device=device).to(memory_format=layout)
        self.labels = torch.randint(case.classes, (case.batch,), device=device)

    def cast(self) -> AbstractContextManager:
        """bf16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def training(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Variants of a training step."""
        optimizers = {name: torch.optim.SGD(self.nets[name].parameters(), 1e-3, momentum=0.9) for name in ("static", "dynamic", "partial")}

        def step(name: str, form: str) -> dict[str, float]:
            _in_form(self.nets[name].train(), form)
            start = self.clock()
            with self.cast():
                loss = F.cross_entropy(self.calls[name](self.images), self.labels)
            middle = self.clock()
            loss.backward()
            end = self.clock()
            optimizers[name].step()
            optimizers[name].zero_grad()
            return {"forward": middle - start, "backward": end - middle, "time": self.clock() - start}

        return {"static": lambda: step("static", "auto")} | {f"dynamic, {form}": lambda form=form: step("dynamic", form) for form in self.forms} | {
            "partial, auto": lambda: step("partial", "auto")}

    def inference(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Variants of a forward pass in evaluation."""
        def run(name: str) -> dict[str, float]:
            _in_form(self.nets[name].eval(), "auto")
            start = self.clock()
            with torch.no_grad(), self.cast():
                self.calls[name](self.images)
            return {"time": self.clock() - start}

        return {name: lambda name=name: run(name) for name in self.nets}

    def layers(self) -> dict[tuple, list]:
        """Distinct dynamic layers by what their time depends on: (C, O, kernel, stride, groups, map) -> [layer, input shape, how many]."""
        found: dict[tuple, list] = {}

        def visit(module: MixedConv2d, args: tuple[Tensor]) -> None:
            (x,) = args
            key = (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], module.groups, x.shape[-1])
            found.setdefault(key, [module, x.shape, 0])[2] += 1

        handles = [m.register_forward_pre_hook(visit) for m in self.nets["dynamic"].modules() if isinstance(m, MixedConv2d)]
        with torch.no_grad():
            self.nets["dynamic"].eval()(self.images)
        for handle in handles:
            handle.remove()
        return found


def _in_form(net: nn.Module, form: str) -> None:
    for m in net.modules():
        if isinstance(m, MixedConv2d):
            m.form = form


def summarise(variants: dict[str, Callable[[], dict[str, float]]], rounds: int, against: str, compiled: bool) -> dict[str, dict]:
    """Seconds of every part, and the ratio of the whole."""
    for run in 2 * list(variants.values()) if compiled else []:
        run()  # compiles, then records a CUDA graph: the first round of those that are timed replays
    timed = time_rounds(variants, rounds)
    return {name: {part: spread([r[name][part] for r in timed]) for part in timed[0][name]}
            | {"ratio": spread([r[name]["time"] / r[against]["time"] for r in timed])} for name in variants}


def measure_layers(bench: Bench, rounds: int) -> list[dict]:
    """Forward and backward of every distinct layer in every form, and of the plain convolution."""
    rows = []
    for key, (layer, shape, times) in bench.layers().items():
        x, weight = torch.randn(shape, device=bench.device, requires_grad=True), layer.weight
        alpha = torch.softmax(torch.randn(shape[0], len(weight), device=bench.device), -1).requires_grad_()
        window = layer.stride, layer.padding, layer.dilation

        def once(form: str, layer=layer, x=x, weight=weight, alpha=alpha, window=window) -> dict[str, float]:
            start = bench.clock()
            with bench.cast():
                plain = form == "plain"
                y = F.conv2d(x, weight[0], None, *window, layer.groups) if plain else dynamic_conv2d(x, weight, alpha, None, *window, layer.groups, form)
            y.square().sum().backward()
            seconds = bench.clock() - start
            x.grad = weight.grad = alpha.grad = None
            return {"time": seconds}

        timed = time_rounds({form: lambda form=form, once=once: once(form) for form in ("plain", *FAST)}, rounds)
        medians = {form: spread([r[form]["time"] for r in timed])["median"] for form in ("plain", *FAST)}
        rows.append({"layer": key, "count": times, "auto": choose(x, weight, window), "fastest": min(FAST, key=medians.get), "seconds": medians})
    return rows


def markdown(result: dict) -> str:
    """Tables of networks, and of layers where they were timed."""
    def cell(s: dict[str, float], unit: float = 1.0, digits: int = 2) -> str:
        return f"{s['median'] * unit:.{digits}f} ({s['low'] * unit:.{digits}f}-{s['high'] * unit:.{digits}f})"

    lines = ["# Dynamic convolutions: time", "", ", ".join(f"{k} {v}" for k, v in result["env"].items()), "",
             f"Medians with quartiles; K = 4, partial networks at keep = {KEEP}. Ratios: to the static network in training, to the dynamic one in inference."]
    for table in result["networks"]:
        case = table["case"]
        how = f"{table['rounds']} rounds" + (", compiled" if table["compiled"] else "")
        lines += ["", f"## {case['name']}, batch {case['batch']}, {case['size']}x{case['size']}, {how}"]
        lines += ["", "| training step | ms | forward ms | backward ms | time / static |", "|---|---|---|---|---|"] if table["training"] else []
        lines += [f"| {name} | {cell(row['time'], 1e3, 1)} | {cell(row['forward'], 1e3, 1)} | {cell(row['backward'], 1e3, 1)} | {cell(row['ratio'])} |"
                  for name, row in table["training"].items()]
        lines += ["", "| inference | parameters stored | ms | time / dynamic |", "|---|---|---|---|"]
        lines += [f"| {name} | {table['stored'][name]:,} | {cell(row['time'], 1e3, 1)} | {cell(row['ratio'])} |" for name, row in table["inference"].items()]
        if table["layers"]:
            lines += ["", "| layer (C, O, k, stride, groups, map) | how many | plain ms | " + " | ".join(f"{form} ms" for form in FAST) + " | auto | fastest |",
                      "|---|---|---|" + "---|" * (len(FAST) + 2)]
            lines += [f"| {', '.join(map(str, row['layer']))} | {row['count']} | " + " | ".join(f"{s * 1e3:.2f}" for s in row["seconds"].values())
                      + f" | {row['auto']} | {row['fastest']} |" for row in table["layers"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic_conv", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone, fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="a narrow ResNet-10 on 32x32, for tests")
    parser.add_argument("--only", help="cases of this network alone (resnet50), or of this and this size (resnet50-224)")
    parser.add_argument("--compile", action="store_true", help="networks through torch.compile, on a GPU with CUDA graphs")
    parser.add_argument("--layers", action="store_true", help="time every distinct layer too")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--rounds", type=int, help="default 11, quick 5, tiny 2")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, not the wall's (CPU only)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    rounds = args.rounds or (2 if args.tiny else 5 if args.quick else 11)
    if rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles need them")
    if args.cpu_time and device == "cuda":
        parser.error("--cpu-time would leave out the device's time")
    if args.threads:
        torch.set_num_threads(args.threads)
    known = TINY if args.tiny else QUICK if args.quick else CUDA if device == "cuda" else CPU
    cases = [c for c in known if args.only in (None, c.name, f"{c.name}-{c.size}")]
    if not cases:
        parser.error(f"--only {args.only} is none of the networks")
    clock, env = begin(device, args.cpu_time)
    result: dict = {"env": env, "networks": []}
    for case in cases:
        bench = Bench(case, device, 0.125 if args.tiny else 1, clock, args.compile)
        print(f"{case.name}, batch {case.batch}, {case.size} ...", flush=True)
        result["networks"].append({
            "case": asdict(case), "rounds": rounds, "compiled": args.compile,
            "stored": {name: count_parameters(net)["stored"] for name, net in bench.nets.items()},
            "training": summarise(bench.training(), rounds, "static", args.compile) if case.train else {},
            "inference": summarise(bench.inference(), rounds, "dynamic", args.compile),
            "layers": measure_layers(bench, rounds) if args.layers else []})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "dynamic_conv.json").write_text(json.dumps(result, indent=1))
    (args.out / "dynamic_conv.md").write_text(markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
