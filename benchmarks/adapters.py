"""Time what pruning does to adapters: a training step in every form against the dense adapter's, and a bottleneck alone.

    python -m benchmarks --parts adapters [--quick]

Writes adapters.md, adapters.json and adapters.png. An encoder in the shape of MiniLM (quick: 2 of its 6 layers) with random weights and Houlsby adapters on
every layer; one network of each form in one process, interleaved in a shuffled order, ratios to the dense adapter in the same round. A training step is
forward, loss, backward and AdamW; the host is frozen. A masked step is to cost 1.10 times the dense one at most; nobody is told that an unstructured mask is
faster. On a CPU fp32, on a GPU under autocast to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.measure import cell, heading, interleave, peak_bytes, plot, save, saved_bytes, summarise, tabulate, timer
from dyn.nn.adapter import adapter_parameters, attach, save_adapter
from dyn.nn.adapter_modules import Bottleneck
from dyn.nn.count import count_parameters
from dyn.nn.masking import large_sparse, prune

REFERENCE = "dense, r=64"
METRICS = {"step_ratio": "step / dense adapter", "seconds_ratio": "time / dense bottleneck"}
WIDE = large_sparse(64, 4)
FORMS: dict[str, tuple[int, dict]] = {  # name: r, arguments of prune
    REFERENCE: (64, {}), "masked, r=64, keep 0.6": (64, dict(keep=0.6)), "masked, r=64, keep 0.2": (64, dict(keep=0.2)),
    "flat, r=64, keep 0.2": (64, dict(keep=0.2, form="flat")), "2:4 mask, r=64": (64, dict(form="2:4")),
    "units, 13 of r=64": (64, dict(keep=0.2, form="unit", scope="local")), "dense, r=13": (13, {}),
    f"Large-Sparse, r={WIDE.r}, masked": (WIDE.r, dict(keep=WIDE.keep)), f"Large-Sparse, r={WIDE.r}, flat": (WIDE.r, dict(keep=WIDE.keep, form="flat")),
    f"dense, r={WIDE.r}": (WIDE.r, {}),
}
OURS = [name for name in FORMS if not name.startswith("dense")]


@dataclass(frozen=True)
class Size:
    """An encoder and its batch; the width and tokens of the bottleneck alone."""

    name: str
    layers: int
    hidden: int
    batch: tuple[int, int]
    block: tuple[int, int]


SIZES = {"tiny": Size("tiny", 1, 32, (2, 8), (32, 16)), "quick": Size("2 of MiniLM's 6 layers", 2, 384, (16, 64), (768, 1024)),
         "full": Size("MiniLM", 6, 384, (16, 128), (768, 4096))}


def cast(device: str) -> AbstractContextManager:
    """bf16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def encoder(size: Size, r: int, how: dict, device: str) -> nn.Module:
    """A frozen encoder with Houlsby adapters and a trained head, pruned by random scores where `how` says how."""
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.hidden // 32,
                                                   intermediate_size=4 * size.hidden, vocab_size=1000, num_labels=2))
    attach(net, "houlsby", r=r, seed=0)
    return (prune(net, None, None, "random", **how) if how else net).to(device).train()


def state_bytes(net: nn.Module) -> int:
    """What training the adapter keeps beside activations: parameters, gradients and two moments in float32, and masks."""
    path = tuple(key.rpartition(".")[0] for key in adapter_parameters(net))
    masks = sum(b.numel() * b.element_size() for key, b in net.named_buffers() if key.startswith(path))
    return masks + sum(16 * p.numel() for p in adapter_parameters(net).values())


def file_bytes(net: nn.Module, dtype: torch.dtype) -> int:
    """Of the adapter's file, without the head."""
    with TemporaryDirectory() as folder:
        return (save_adapter(net, Path(folder) / "adapter", dtype=dtype) / "adapter.safetensors").stat().st_size


def steps(size: Size, device: str, rounds: int, clock: Callable[[], float]) -> dict:
    """Training steps of the whole encoder."""
    nets = {name: encoder(size, r, how, device) for name, (r, how) in FORMS.items()}
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(3, 1000, size.batch, generator=g).to(device), torch.randint(2, size.batch[:1], generator=g).to(device)
    calls = {}
    for name, net in nets.items():
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def forward(net: nn.Module = net) -> Tensor:
            with cast(device):
                return net(input_ids=ids, labels=labels).loss

        def step(forward: Callable[[], Tensor] = forward, optimizer: torch.optim.Optimizer = optimizer) -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = {"forward": forward, "step": step}
    rows = summarise(interleave({name: {"step": timer(both["step"], clock)} for name, both in calls.items()}, rounds), REFERENCE)
    for name, net in nets.items():
        bottlenecks = [m for m in net.modules() if isinstance(m, Bottleneck)]
        head = sum(p.numel() for p in net.classifier.parameters())
        rows[name] |= {"trained": count_parameters(net)["trainable"] - head, "state_bytes": state_bytes(net),
                       "file_bytes": file_bytes(net, torch.float32), "file_bytes_bf16": file_bytes(net, torch.bfloat16),
                       "flops_per_token": sum(2 * m.down.in_features * m.down.out_features * 2 for m in bottlenecks),
                       "saved_bytes": saved_bytes(calls[name]["forward"], net.parameters())}
        if device == "cuda":
            rows[name]["peak_bytes"] = peak_bytes(calls[name]["step"])
    return {"name": f"training step, {size.name}, {size.batch[0]} x {size.batch[1]} tokens", "about": "forward, loss, backward, AdamW; adapters on all layers",
            "reference": REFERENCE, "ours": OURS, "rounds": rounds, "rows": rows, "missing": {}}


def blocks(size: Size, device: str, rounds: int, clock: Callable[[], float]) -> dict:
    """One bottleneck, forward and backward, in every form."""
    width, tokens = size.block
    timers = {}
    for name, (r, how) in FORMS.items():
        block = Bottleneck(width, r, device=device)
        block.draw("bert", torch.Generator().manual_seed(0))
        if how:
            prune(block, None, None, "random", **how)
        x = torch.randn(tokens, width, device=device, requires_grad=True)

        def both(block: nn.Module = block, x: Tensor = x) -> None:
            with cast(device):
                out = block(x)
            out.sum().backward()
            x.grad = None
            block.zero_grad()

        timers[name] = {"seconds": timer(both, clock)}
    return {"name": f"bottleneck, width {width}, {tokens} tokens", "about": "one block alone, forward and backward", "reference": REFERENCE, "ours": OURS,
            "rounds": rounds, "rows": summarise(interleave(timers, rounds), REFERENCE), "missing": {}}


def run(env: dict, size: str, out: Path, rounds: int, clock: Callable[[], float]) -> dict:
    """Both tables."""
    what, device = SIZES[size], env["kind"]
    result: dict = {"what": "adapters", "env": env, "size": size, "tables": []}
    for table in (blocks, steps):
        result["tables"].append(table(what, device, rounds, clock))
        save(result, markdown(result), out)
    plot(result, METRICS, out)
    return result


def markdown(result: dict) -> str:
    """A table each."""
    lines = heading(
        result, "Sparse adapters: time, memory and work",
        "Medians with quartiles; ratios are to the dense adapter in the same round. Trained: the adapter's weights and biases that are not pruned. State:",
        "its parameters, gradients, AdamW's moments and masks. File: of `save_adapter`, in float32 and in bfloat16.",
        "MFLOP: forward, a token, in its matrices, zeros included, since nothing skips them. Kept: for",
        "backward.")
    for table in result["tables"]:
        if "step" in next(iter(table["rows"].values())):
            columns = {"step ms": lambda r: cell(r["step"], 1e3, 1), "/ dense": lambda r: cell(r["step_ratio"]), "trained": lambda r: f"{r['trained']:,}",
                       "state MB": lambda r: f"{r['state_bytes'] / 1e6:.2f}",
                       "file MB": lambda r: f"{r['file_bytes'] / 1e6:.3f}", "in bf16": lambda r: f"{r['file_bytes_bf16'] / 1e6:.3f}",
                       "MFLOP": lambda r: f"{r['flops_per_token'] / 1e6:.3f}",
                       "kept MB": lambda r: f"{r['saved_bytes'] / 1e6:.1f}"}
            if result["env"]["kind"] == "cuda":
                columns["peak MB"] = lambda r: cell(r["peak_bytes"], 1e-6, 1)
        else:
            columns = {"ms": lambda r: cell(r["seconds"], 1e3), "/ dense": lambda r: cell(r["seconds_ratio"])}
        lines += tabulate(table, "adapter", columns)
    return "\n".join(lines)
