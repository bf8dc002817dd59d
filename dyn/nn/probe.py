"""Hooks that gather activations and gradients over batches. T tokens, N neurons (a feed-forward's intermediate width)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyn.core.saliency import taylor


def is_bare(layer: nn.Module) -> bool:
    """Whether a linear layer or a convolution stands alone: weight and bias are parameters of its own (under a weight norm or a pruning they are made for each
    pass), no module lies in it, and no hook waits at it."""
    return (layer._parameters.get("weight") is not None and getattr(layer, "bias", None) is layer._parameters.get("bias")
            and not (layer._modules or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks))


@contextmanager
def watch(modules: Sequence[nn.Module], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, call `visit(i, input)` whenever modules[i] gets its first positional input (shape as the module gets it)."""
    handles = [module.register_forward_pre_hook(lambda _, args, i=i: visit(i, args[0])) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def for_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no gradient of any parameter; modes and flags come back afterwards, also after an error."""
    training = [m for m in model.modules() if m.training]  # no others: whoever takes the model apart meanwhile wants the parts freed
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def taylor_scores(model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Tensor], loss_fn: Callable[[nn.Module, Tensor], Tensor],
                  embeddings: nn.Module, *, kernel: str = "l1", use_value: bool = True) -> Tensor:
    """Importance of every input unit of `modules`: sum over batches and tokens of kernel(h * dL/dh), divided by the number of batches' targets.

    LLaMA-MoE section 1.5 ("sample" accumulation). `loss_fn(model, batch)` returns the summed loss of a batch [B, L]; each sequence has L - 1 targets. Gradients
    start at the output of `embeddings`; no parameter gets one. Nothing of a batch is kept but sums. Returns [len(modules), N] in float32 on the CPU.
    """
    scores: list[Tensor | float] = [0.0] * len(modules)

    def visit(i: int, h: Tensor) -> None:
        value, width = h.detach(), h.shape[-1]  # a hook that knew h itself would keep its batch's graph for ever: the collector does not see that cycle

        def collect(grad: Tensor) -> None:
            scores[i] = scores[i] + taylor(value.reshape(-1, width).float(), grad.reshape(-1, width).float(), kernel=kernel, use_value=use_value)
        h.register_hook(collect)

    start = embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_(True))
    targets = 0
    try:
        with for_statistics(model), watch(modules, visit), torch.enable_grad():
            for batch in batches:
                loss_fn(model, batch).backward()
                targets += batch.shape[0] * (batch.shape[1] - 1)
    finally:
        start.remove()
    if absent := [str(i) for i, s in enumerate(scores) if not isinstance(s, Tensor)]:
        raise ValueError(f"the loss of loss_fn does not depend on modules {', '.join(absent)} of those that are to be scored")
    return torch.stack([s.cpu() for s in scores]) / targets
