"""Time whole training and inference steps: the converted mixture against the dense model that it came from.

    python -m benchmarks.steps [--quick] [--out FOLDER] [--rounds N] [--precision bf16|fp32]

Writes steps.md, steps.json and steps.png. Random weights in the shape of SmolLM2-135M (quick: 8 of its 30 layers and as much of its
vocabulary, so that head and layers keep their proportion), one model of each kind in one process, interleaved in a shuffled order; ratios are
medians over rounds of (variant / dense in the same round). A training step is forward, loss, backward and AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ops import environment, spread, time_rounds
from dyn.models.llama_moe import from_dense
from dyn.nn.surgery import count_parameters

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               max_position_embeddings=8192, tie_word_embeddings=True)
VARIANTS = {"4 of 8": (8, 4), "8 of 16": (16, 8), "4 of 16": (16, 4)}  # name: E, K
DENSE = "dense"


def build(quick: bool) -> dict[str, torch.nn.Module]:
    """The dense model and the mixtures made from it."""
    torch.manual_seed(0)
    shape = SMOLLM2 | (dict(num_hidden_layers=8, vocab_size=49152 * 8 // 30) if quick else {})
    dense = LlamaForCausalLM(LlamaConfig(**shape))
    names = list(VARIANTS)[:1] if quick else list(VARIANTS)
    return {DENSE: dense} | {name: from_dense(dense, num_experts=VARIANTS[name][0], num_experts_per_tok=VARIANTS[name][1], gate_noise=True) for name in names}


def step(net: torch.nn.Module, ids: torch.Tensor, precision: str) -> Callable[[], dict[str, float]]:
    """One measured round of a model: seconds of an inference pass and of a training step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    cast = torch.autocast(ids.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None

    def run() -> dict[str, float]:
        wait()
        began = time.perf_counter()
        with torch.no_grad(), cast:
            net.eval()(input_ids=ids, use_cache=False)
        wait()
        middle = time.perf_counter()
        with cast:
            loss = net.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return {"inference": middle - began, "training": time.perf_counter() - middle}

    return run


def main(argv: list[str] | None = None) -> dict:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of the layers and vocabulary, fewer rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--rounds", type=int, help="default 11, quick 7")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nets = {name: net.to(device) for name, net in build(args.quick).items()}
    ids = torch.randint(3, nets[DENSE].config.vocab_size, (2, 512), device=device)
    rounds = time_rounds({name: step(net, ids, args.precision) for name, net in nets.items()}, args.rounds or (7 if args.quick else 11))
    rows = {name: {"active_parameters": count_parameters(net)["active"]} | {
        phase: {"seconds": spread([r[name][phase] for r in rounds]), "ratio": spread([r[name][phase] / r[DENSE][phase] for r in rounds])}
        for phase in ("inference", "training")} for name, net in nets.items()}
    env = environment(device)
    result = {"env": env, "quick": args.quick, "precision": args.precision, "tokens": ids.numel(), "rounds": len(rounds), "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "steps.json").write_text(json.dumps(result, indent=1))
    (args.out / "steps.md").write_text(markdown(result))
    plot(result, args.out / "steps.png")
    print(markdown(result))
    return result


def markdown(result: dict) -> str:
    """One row a model."""
    shape = "8 of 30 layers and as much of the vocabulary" if result["quick"] else "all layers"
    lines = ["# Training and inference steps", "", ", ".join(f"{k} {v}" for k, v in result["env"].items()), "",
             f"SmolLM2-135M's shape ({shape}), random weights, {result['precision']}, {result['tokens']} tokens a step, {result['rounds']} rounds.",
             "Medians with quartiles; ratios are to the dense model in the same round, below 1 is faster.", "",
             "| model | activated parameters | training tokens/s | time / dense | inference tokens/s | time / dense |", "|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        cells = [f"{row['active_parameters']:,}"]
        for phase in ("training", "inference"):
            ratio = row[phase]["ratio"]
            cells += [f"{result['tokens'] / row[phase]['seconds']['median']:.0f}", f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Ratios to the dense model; bars are medians, lines quartiles."""
    names = [n for n in result["rows"] if n != DENSE]
    fig, ax = plt.subplots(figsize=(6, 1.2 + 0.6 * len(names)), layout="constrained")
    for shift, phase in ((-0.2, "training"), (0.2, "inference")):
        ratios = [result["rows"][n][phase]["ratio"] for n in names]
        ax.barh([i + shift for i in range(len(names))], [r["median"] for r in ratios], 0.38, label=phase,
                xerr=[[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]])
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("time / dense model")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main()
