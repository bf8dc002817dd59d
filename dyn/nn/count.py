"""What a network stores, activates, trains and multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dyn.nn.bank import Banked, CompactBank, PartialBank
from dyn.nn.dynamic_conv import MixedConv2d, ODConv2d
from dyn.nn.experts import Gate, MoeFeedForward
from dyn.nn.linear_experts import LinearExperts
from dyn.nn.masked import count_pruned
from dyn.nn.probe import for_statistics


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters; tied weights count once.

    total: all that the modules hold. gate: of what chooses or weighs parameter sets (gates with their noise projections, attention branches). active: what one
    input is computed with, gates apart, input embeddings included (the count that LLaMA-MoE publishes): of K mixed kernels one, of E experts the chosen.
    trainable: those with requires_grad, pruned positions apart. stored: what the compact forms keep (PAD-Net section 3.6, SparseAdapter section 7.3), i.e.
    total without dead entries of partial layers, without scale factors, which fold away, and without pruned positions. dynamic: of the stored,
    parameter sets that are mixed or chosen for each input (with biases of their own). static: the rest of the stored, gates apart; so stored = static +
    dynamic + gate.
    """
    total = sum(p.numel() for p in model.parameters())
    pruned = count_pruned(model)
    gate = dynamic = idle = 0
    dead = sum(pruned.values())
    for module in model.modules():
        if isinstance(module, Gate):
            gate += sum(p.numel() for p in module.parameters())
        elif isinstance(module, MoeFeedForward):
            of_experts = sum(p.numel() for p in module.experts.parameters())
            dynamic += of_experts
            idle += of_experts - of_experts * module.gate.num_experts_per_tok // module.gate.num_experts
        elif isinstance(module, Banked):
            sets, in_sets, not_stored = _of_bank(module)
            bias = getattr(module, "bias", None)
            in_sets += 0 if bias is None else bias.numel() // sets
            dead += not_stored
            dynamic += sets * in_sets
            idle += (sets - module.sets_per_input) * in_sets
            if isinstance(attention := getattr(module, "attention", None), nn.Module):
                gate += sum(p.numel() for p in attention.parameters())
    stored = total - dead
    return {"total": total, "active": stored - gate - idle, "gate": gate, "dynamic": dynamic, "static": stored - gate - dynamic, "stored": stored,
            "trainable": sum(p.numel() - pruned.get(p, 0) for p in model.parameters() if p.requires_grad)}


def _of_bank(layer: Banked) -> tuple[int, int, int]:
    """(K, dynamic positions, parameters that the compact form does not keep)."""
    partial = layer.partial
    if isinstance(partial, CompactBank):
        return partial.num_sets, partial.num_dynamic, sum(p.numel() for p in partial.parameters()) - partial.num_stored
    sets, positions = len(layer.weight), layer.weight[0].numel()
    if not isinstance(partial, PartialBank):
        return sets, positions, 0
    scale = 0 if partial.phi is None else 1
    if partial.mask is None:
        return sets, positions, scale
    dynamic = int(partial.mask.sum())
    return sets, dynamic, scale + sets * (positions - dynamic) + (0 if partial.static is None else dynamic)


def flops_per_token(model: nn.Module, context: int) -> int:
    """Floating-point operations of one token's forward pass in a decoder of transformers: 2 for each active weight that multiplies (gates too, the look-up
    of the input embeddings not), plus causal attention over on average `context` / 2 positions. Training costs three times as much."""
    counts, config = count_parameters(model), model.config
    lookup = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * context * config.num_hidden_layers * config.num_attention_heads * head
    return 2 * (counts["active"] + counts["gate"] - lookup) + attention


def macs_per_image(model: nn.Module, shape: Sequence[int] = (3, 224, 224)) -> int:
    """Multiply-adds of one image's forward pass in convolutions and linear layers, in evaluation (PAD-Net section 3.6).

    A dynamic layer adds its attention, and K for every dynamic position (mixing; mode and scale factors fold away). Nothing is computed: tensors have shapes
    only. `shape` is [C, H, W].
    """
    mixing = {m: math.prod(_of_bank(m)[:2]) for m in model.modules() if isinstance(m, MixedConv2d)}

    def count(module: nn.Module, out: Tensor) -> int:
        if isinstance(module, nn.Linear):
            return out.numel() * module.in_features
        kernel = module.in_channels // module.groups * math.prod(module.kernel_size)
        static = isinstance(module, ODConv2d) and module.partial is not None and module.partial.has_static and mixing[module]
        return out.numel() * kernel * (2 if static else 1) + mixing.get(module, 0)  # ODConv's static positions have a convolution of their own

    return summed(model, lambda m: isinstance(m, (nn.Conv2d, nn.Linear, MixedConv2d)), count, torch.empty(1, *shape, device="meta"))


def macs_per_sentence(model: nn.Module, length: int) -> int:
    """Multiply-adds of one sentence's forward pass in an encoder of transformers: linear layers, gates, the chosen experts, attention over `length` tokens.

    What experts have in common is not computed apart (`dyn.ops.linear`, "merged"), so modes change nothing here. Nothing is computed, as in `macs_per_image`.
    """

    def count(module: nn.Module, out: Tensor) -> int:
        if isinstance(module, nn.Linear):
            return out.numel() * module.in_features
        gate = sum(p.numel() for name, p in module.gate.named_parameters() if not name.startswith("noise"))  # of training alone
        return out.numel() * module.sets_per_input * module.in_features + out.shape[:-1].numel() * gate

    ids = torch.ones(1, length, dtype=torch.int64, device="meta")
    attention = 2 * model.config.num_hidden_layers * length * length * model.config.hidden_size
    return attention + summed(model, lambda m: isinstance(m, (nn.Linear, LinearExperts)), count, ids)


def dynamic_shares(model: nn.Module) -> dict[str, float]:
    """Share of positions that is dynamic, of every layer with a bank of parameter sets."""
    return {name: _of_bank(m)[1] / math.prod(m.partial.shape if isinstance(m.partial, CompactBank) else m.weight.shape[1:])
            for name, m in model.named_modules() if isinstance(m, Banked)}


def summed(model: nn.Module, counts: Callable[[nn.Module], bool], count: Callable[[nn.Module, Tensor], int], example: Tensor) -> int:
    """The sum of `count(module, its output)` over every call of a module that `counts`, in an evaluation of `model` on shapes alone."""
    total = [0]

    def add(module: nn.Module, args: tuple, out: Tensor) -> None:
        total[0] += count(module, out)

    with ExitStack() as stack:
        stack.enter_context(for_statistics(model))
        for module in model.modules():
            if counts(module):
                stack.callback(module.register_forward_hook(add).remove)
        tensors = {name: t.detach().to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
        torch.func.functional_call(model, tensors, (example,))
    return total[0]
