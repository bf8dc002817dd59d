"""Freeze modules by identity, and count what a network stores, activates and trains."""

from __future__ import annotations

from torch import nn

from dyn.nn.experts import Gate, MoeFeedForward


def freeze(model: nn.Module, *modules: nn.Module | type[nn.Module]) -> int:
    """Stop training `modules` of `model`, given as modules or classes; returns how many parameters that froze.

    By identity, never by name: matching "gate" by name would also freeze every expert's SwiGLU gate matrix.

    Raises:
        ValueError: a module that is not part of the model, or a class of which it has none.
    """
    chosen: list[nn.Module] = []
    for wanted in modules:
        found = [m for m in model.modules() if (isinstance(m, wanted) if isinstance(wanted, type) else m is wanted)]
        if not found:
            name = wanted.__name__ if isinstance(wanted, type) else type(wanted).__name__
            classes = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
            raise ValueError(f"freeze: {type(model).__name__} has no such {name}; its classes: {classes}")
        chosen += found
    parameters = {id(p): p for module in chosen for p in module.parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return sum(p.numel() for p in parameters.values())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters; tied weights count once.

    total: all. gate: of the gates (noise projections included). active: what one token passes through, gates apart, input embeddings included (the count that
    LLaMA-MoE publishes); it is total for a network without experts. trainable: those with requires_grad. stored: total, as no compact form is known here.
    """
    total = sum(p.numel() for p in model.parameters())
    gate = sum(p.numel() for m in model.modules() if isinstance(m, Gate) for p in m.parameters())
    idle = 0
    for block in model.modules():
        if isinstance(block, MoeFeedForward):
            of_experts = sum(p.numel() for p in block.experts.parameters())
            idle += of_experts - of_experts * block.gate.num_experts_per_tok // block.gate.num_experts
    return {"total": total, "active": total - gate - idle, "gate": gate, "stored": total,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def flops_per_token(model: nn.Module, context: int) -> int:
    """Floating-point operations of one token's forward pass in a decoder of transformers: 2 for each active weight that multiplies (gates too, the look-up
    of the input embeddings not), plus causal attention over on average `context` / 2 positions. Training costs three times as much."""
    counts, config = count_parameters(model), model.config
    lookup = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * context * config.num_hidden_layers * config.num_attention_heads * head
    return 2 * (counts["active"] + counts["gate"] - lookup) + attention
