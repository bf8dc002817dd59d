"""Time whole models: training steps, prefill and decoding of converted mixtures against the dense model that they came from.

    python -m benchmarks --parts steps [--quick]

Writes steps.md, steps.json and steps.png. Random weights in the shape of SmolLM2-135M (quick: 8 of its 30 layers and as much of its vocabulary, so
that head and layers keep their proportion), one model of each kind in one process, interleaved in a shuffled order; ratios are to the dense model in
the same round. The mixtures and the pruned control have the same active width, half of the dense one's. A training step is forward, loss, backward
and AdamW, on float32 weights under autocast to bfloat16; prefill and decoding run on bfloat16 weights, with a key-value cache and through the
model's forward, since `generate` adds work of its own to every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import cell, free, heading, interleave, peak_bytes, plot, save, saved_bytes, summarise, tabulate, timer
from dyn.models.llama_moe import from_dense
from dyn.models.llama_moe_prune import kept_neurons
from dyn.nn.surgery import count_parameters

REFERENCE = "dense"
METRICS = {"seconds_ratio": "time / dense model"}
MIXTURES = {"4 of 8 experts": (8, 4), "16 of 32 experts": (32, 16)}  # name: E, K
PRUNED = "pruned to half"
LOOPED = "eager"  # the mixtures' training without our op: a plain loop over experts, as transformers' own "eager" has it


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much of it is run."""

    name: str
    shape: dict[str, int]
    train: tuple[int, int]  # sequences, tokens of each
    batches: tuple[int, ...]
    prompt: int
    new_tokens: int


SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               max_position_embeddings=8192)
PART = SMOLLM2 | dict(num_hidden_layers=8, vocab_size=49152 * 8 // 30)
TINY = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def sizes(size: str, device: str) -> list[Size]:
    """What is run: "full" for the device (on a CPU with what "quick" has, so that they compare), "quick" or "tiny"."""
    if size == "tiny":
        return [Size("tiny", TINY, (1, 16), (1, 2), 8, 2)]
    if device == "cuda" and size == "full":
        return [Size("SmolLM2-135M", SMOLLM2, (8, 1024), (1, 8, 64), 512, 16)]
    quick = Size("SmolLM2-135M, 8 layers", PART, (2, 512), (1, 8, 64), 32, 4)
    return [quick] if size == "quick" else [quick, Size("SmolLM2-135M", SMOLLM2, (2, 512), (1, 8, 64), 128, 8)]


def build(shape: dict[str, int], device: str) -> dict[str, nn.Module]:
    """The dense model, the mixtures made from it, and a dense model as `prune_dense(keep=0.5)` returns it, all with random weights."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    nets = {REFERENCE: dense} | {name: from_dense(dense, num_experts=E, num_experts_per_tok=K, gate_noise=True) for name, (E, K) in MIXTURES.items()}
    narrow = shape | dict(intermediate_size=kept_neurons(0.5, shape["intermediate_size"]))
    nets[PRUNED] = LlamaForCausalLM(LlamaConfig(**narrow, tie_word_embeddings=True))
    return {name: net.to(device) for name, net in nets.items()}


def loss(net: nn.Module, ids: Tensor) -> Tensor:
    """Of a training step."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        return net(input_ids=ids, labels=ids, use_cache=False).loss


def training_step(net: nn.Module, ids: Tensor, experts: str | None = None) -> Callable[[], None]:
    """Forward, loss, backward, AdamW; with another implementation of the experts than ours if `experts` names it."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    net.train()

    def step() -> None:
        if hasattr(net.config, "num_experts"):
            net.set_experts_implementation(experts or "dyn")
        loss(net, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def prefill(net: nn.Module, ids: Tensor) -> DynamicCache:
    """The cache behind a prompt, with the logits of its last token."""
    return net(input_ids=ids, past_key_values=DynamicCache(config=net.config), use_cache=True, logits_to_keep=1).past_key_values


def decode(net: nn.Module, ids: Tensor, new_tokens: int) -> Callable[[], None]:
    """A function that goes on behind a prompt for some tokens, one at a time, and forgets them again."""
    cache = prefill(net, ids)

    @torch.no_grad()
    def run() -> None:
        for _ in range(new_tokens):
            net(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-new_tokens)

    return run


def table(name: str, about: str, calls: dict[str, Callable[[], object]], tokens: int, rounds: int, clock: Callable[[], float]) -> dict:
    """Seconds of every model's call, and tokens a second."""
    rows = summarise(interleave({model: {"seconds": timer(call, clock)} for model, call in calls.items()}, rounds), REFERENCE)
    for row in rows.values():
        row["tokens_per_second"] = tokens / row["seconds"]["median"]
    return {"name": name, "about": about, "reference": REFERENCE, "ours": list(MIXTURES), "rounds": rounds, "tokens": tokens, "rows": rows,
            "missing": {}}


def measure(what: Size, device: str, rounds: int, clock: Callable[[], float], models: dict, add: Callable[[dict], None]) -> None:
    """Sizes of the models into `models`, and tables one by one to `add`: training with all models in float32, then prefill and decoding in bfloat16."""
    nets = build(what.shape, device)
    g = torch.Generator().manual_seed(0)

    def tokens(sequences: int, length: int) -> Tensor:
        return torch.randint(3, what.shape["vocab_size"], (sequences, length), generator=g).to(device)

    ids = tokens(*what.train)
    print(f"training {what.name}", flush=True)
    steps = {name: training_step(net, ids) for name, net in nets.items()}
    title = f"{what.name}, {what.train[0]} x {what.train[1]} tokens"
    training = table(f"training, {title}", "forward, loss, backward and AdamW", steps, ids.numel(), rounds, clock)
    for name, net in nets.items():
        counts = count_parameters(net)
        models[f"{what.name}: {name}"] = model = {
            "parameters": counts["total"], "active_parameters": counts["active"],
            "parameter_bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
            "saved_bytes": saved_bytes(lambda net=net: loss(net, ids), net.parameters())}
        if device == "cuda":
            model["training_peak_bytes"] = peak_bytes(steps[name])
    add(training)
    for name, net in nets.items():
        if name in MIXTURES:
            net.set_experts_implementation("dyn")
    del steps
    nets = {name: net.to(torch.bfloat16).eval() for name, net in nets.items()}
    free()
    for batch in what.batches:
        prompt = tokens(batch, what.prompt)
        print(f"inference {what.name}, batch {batch}", flush=True)
        prefills = {name: lambda net=net, prompt=prompt: prefill(net, prompt) for name, net in nets.items()}
        decodes = {name: decode(net, prompt, what.new_tokens) for name, net in nets.items()}
        filled = table(f"prefill, {what.name}, batch {batch} x {what.prompt} tokens", "the prompt at once, logits of its last token",
                       prefills, prompt.numel(), rounds, clock)
        if device == "cuda":
            for name, call in prefills.items():
                filled["rows"][name]["peak_bytes"] = peak_bytes(call)
        add(filled)
        add(table(f"decode, {what.name}, batch {batch} after {what.prompt} tokens", "one token at a time, with a cache",
                  decodes, batch * what.new_tokens, rounds, clock))
        del decodes, prefills
        free()
    # A table of their own, the last: what loops allocate leaves a heap in pieces, in which every other training step takes longer too.
    nets = {name: net.float() for name, net in nets.items() if name == REFERENCE or name in MIXTURES}
    loops = {REFERENCE: training_step(nets[REFERENCE], ids)} | {f"{name}, a loop over them": training_step(nets[name], ids, LOOPED) for name in MIXTURES}
    add(table(f"training by a loop, {title}", "forward, loss, backward and AdamW", loops, ids.numel(), rounds, clock) | {"ours": []})


def run(env: dict, size: str, out: Path, rounds: int, clock: Callable[[], float]) -> dict:
    """All models of a size, saved table by table."""
    result: dict = {"what": "steps", "env": env, "size": size, "models": {}, "tables": []}

    def add(made: dict) -> None:
        result["tables"].append(made)
        save(result, markdown(result), out)

    for what in sizes(size, env["kind"]):
        measure(what, env["kind"], rounds, clock, result["models"], add)
    plot(result, METRICS, out)
    return result


def markdown(result: dict) -> str:
    """One table of sizes, then one a phase."""
    lines = heading(
        result, "Training, prefill and decoding",
        "Random weights. Medians with quartiles; ratios are to the dense model in the same round, below 1 is faster. Active: parameters that a token passes",
        "through, gates apart. Kept: for backward in the training step, beside parameters. Parameters are float32 in training.")
    lines += ["| model | parameters | active | parameters MB | kept MB | training peak MB |", "|---|---|---|---|---|---|"]
    for name, model in result["models"].items():
        lines.append(f"| {name} | {model['parameters']:,} | {model['active_parameters']:,} | {model['parameter_bytes'] / 1e6:.1f} | "
                     f"{model['saved_bytes'] / 1e6:.1f} | {cell(model.get('training_peak_bytes'), 1e-6, 1)} |")
    lines.append("")
    for each in result["tables"]:
        columns = {"ms": lambda r: cell(r["seconds"], 1e3, 1), "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
                   "/ dense": lambda r: cell(r["seconds_ratio"])}
        if any("peak_bytes" in row for row in each["rows"].values()):
            columns["peak MB"] = lambda r: cell(r["peak_bytes"], 1e-6, 1)
        lines += tabulate(each, "model", columns)
    return "\n".join(lines)
