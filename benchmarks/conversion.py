"""Time a conversion without training, by layer, at a large model's widths: calibrated, and its control without routing.

    python -m benchmarks.conversion [--layers 2] [--tokens 59904] [--hidden 4096 --width 11008 --heads 32] [--device cuda] [--out FOLDER]

Writes conversion.md and conversion.json. Random weights in bfloat16 and random text: time depends on values only where neurons are assigned to groups, which is
done on the host and has its own column. All layers cost alike, so LLaMA-2-7B, whose widths are the default, takes 32 times a layer's seconds, and what
loading and saving take. One run of each; peak memory is the device's, on a CPU the process's so far.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import begin, heading, save
from dyn.core import calibrate
from dyn.env import peak_memory
from dyn.models.llama_moe import from_dense, prune_dense

VOCABULARY = 1024
LAYERS = 32  # of LLaMA-2-7B


def build(hidden: int, width: int, heads: int, layers: int, device: str) -> nn.Module:
    """A decoder with random weights that keep the stream's size about the same."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=heads, initializer_range=hidden**-0.5)
    return LlamaForCausalLM(config).to(device, torch.bfloat16)


def measure(convert: Callable[[], object], layers: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds a layer, those of the assignment apart, and the most memory so far."""
    assigning = 0.0
    inner = calibrate.balanced

    def timed(*args: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal assigning
        start = time.perf_counter()
        result = inner(*args)
        assigning += time.perf_counter() - start
        return result

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    with mock.patch.object(calibrate, "balanced", timed):
        convert()
    seconds = clock() - start
    memory = peak_memory()
    return {"seconds_a_layer": seconds / layers, "assignment_seconds_a_layer": assigning / layers, "minutes_of_32_layers": LAYERS * seconds / layers / 60,
            "peak_bytes": memory.get("peak_device_memory_bytes", memory["peak_memory_bytes"])}


def markdown(result: dict[str, Any]) -> str:
    """One table."""
    lines = heading(result, "Conversion without training: time", result["about"])
    lines += ["| construction | seconds a layer | of which assignment, on the host | minutes for 32 layers | peak GB |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {row['seconds_a_layer']:.2f} | {row['assignment_seconds_a_layer']:.2f} | {row['minutes_of_32_layers']:.1f} | "
              f"{row['peak_bytes'] / 1e9:.1f} |" for name, row in result["rows"].items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__.splitlines()[0])
    for name, default in {"layers": 2, "tokens": 59_904, "length": 2048, "hidden": 4096, "width": 11_008, "heads": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock, env = begin(args.device)
    dense = build(args.hidden, args.width, args.heads, args.layers, args.device)
    batches = [ids[None] for ids in torch.randint(VOCABULARY, (args.tokens,)).split(args.length)]
    result: dict[str, Any] = {"what": "conversion", "env": env, "rows": {}}
    result["about"] = (f"{args.layers} layers of {args.hidden} x {args.width}, half of the neurons active (16 of 32), "
                       f"{args.tokens:,} calibration tokens of sequences of {args.length}.")
    for name, convert in {"calibrated": lambda: from_dense(dense, num_experts=32, num_experts_per_tok=16, construction="calibrated", batches=batches),
                          "prune": lambda: prune_dense(dense, 0.5, batches=batches)}.items():
        result["rows"][name] = measure(convert, args.layers, clock)
        save(result, markdown(result), args.out)
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
