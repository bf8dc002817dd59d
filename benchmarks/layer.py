"""One layer of routed experts to measure: its shape, tensors and routing, and the check of a variant against float64.

T tokens, D hidden size, F expert width, E experts, K experts a token, N neurons of the dense network that the experts make up together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyn.ops.experts import experts

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "autocast": 3e-2}  # of the norm
SAMPLED_TOKENS, SAMPLED_NEURONS = 256, 8
HOTTEST = 4  # times the mean load, as far as a token can choose an expert only once


@dataclass(frozen=True)
class Case:
    """One shape. Without `train` (few tokens, as in decoding) only the forward pass is timed."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    modes: tuple[str, ...] = ("bf16",)
    routings: tuple[str, ...] = ("uniform", "skewed")
    train: bool = True

    @property
    def N(self) -> int:
        return self.E * self.F

    def flops(self, width: int, backward: bool) -> int:
        """Of three matrix products of `width` neurons a token, and of their gradients."""
        return (18 if backward else 6) * self.T * self.D * width


@dataclass
class Variant:
    """A way to compute the layer, or a control that computes something else of the same size.

    run: no argument, returns y [T, D]. leaves: what it is differentiated by. gradients: from the gradients of the leaves to those of x, gate_up, down
    and weight; None for a control. width: neurons that a token passes through.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    width: int
    gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = tuple


def choose(T: int, E: int, K: int, routing: str, device: str, generator: torch.Generator) -> Tensor:
    """Expert ids [T, K]: K different ones at random, or skewed, with one expert chosen by HOTTEST times as many tokens as on average (all, at most)."""
    score = torch.rand(T, E, device=device, generator=generator)
    if routing == "skewed":
        hot = torch.zeros(T, dtype=torch.bool, device=device)
        hot[torch.randperm(T, device=device, generator=generator)[: min(T, HOTTEST * T * K // E)]] = True
        score[:, E // 2] = torch.where(hot, 2.0, -1.0)
    return score.topk(K, dim=-1).indices


class Layer:
    """The tensors of one case, precision and routing; every variant gets the same ones."""

    def __init__(self, case: Case, mode: str, routing: str, device: str) -> None:
        self.case, self.mode, self.device = case, mode, device
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(scale).requires_grad_()

        self.x = leaf(case.T, case.D)
        self.gate_up = leaf(case.E, 2 * case.F, case.D, scale=case.D**-0.5)
        self.down = leaf(case.E, case.D, case.F, scale=case.F**-0.5)
        self.idx = choose(case.T, case.E, case.K, routing, device, g)
        self.idx32 = self.idx.int()
        self.weight = torch.randn(case.T, case.K, generator=g, device=device).softmax(-1).requires_grad_()
        self.dy = torch.randn(case.T, case.D, generator=g, device=device, dtype=torch.bfloat16 if mode == "autocast" else dtype)
        self.leaves = (self.x, self.gate_up, self.down, self.weight)

    def hottest(self) -> float:
        """Load of the most chosen expert over the mean load."""
        return torch.bincount(self.idx.flatten(), minlength=self.case.E).max().item() / (self.case.T * self.case.K / self.case.E)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the layer runs in."""
        return torch.autocast(self.device, torch.bfloat16) if self.mode == "autocast" else contextlib.nullcontext()

    def variant(self, run: Callable[[], Tensor]) -> Variant:
        """A variant on the layer's own tensors."""
        return Variant(run, self.leaves, self.case.K * self.case.F)

    def forward(self, variant: Variant) -> Tensor:
        """y, without anything kept for backward."""
        with torch.no_grad(), self.autocast():
            return variant.run()

    def backward(self, variant: Variant) -> tuple[Tensor, ...]:
        """y and the gradients of the leaves. They come as new tensors: adding to .grad would be paid by some and not by others."""
        with self.autocast():
            y = variant.run()
        return y.detach(), *torch.autograd.grad(y, variant.leaves, self.dy.to(y.dtype))


class Reference:
    """Output and gradients in float64 at a sample of tokens and neurons, exact whatever the sizes of the others are.

    A token's output and gradients depend on that token alone, and a neuron's gradients on that neuron's weights alone, so that the layer is computed
    twice: for some tokens with all neurons, and for all tokens with some neurons. First and last ones are always among them.
    """

    def __init__(self, layer: Layer) -> None:
        case = layer.case
        self.tokens, self.neurons = (torch.linspace(0, n - 1, min(n, most), device=layer.device).long()
                                     for n, most in ((case.T, SAMPLED_TOKENS), (case.F, SAMPLED_NEURONS)))
        x, gate_up, down, weight = (t.detach() for t in layer.leaves)
        x_some, weight_some = (t[self.tokens].double().requires_grad_() for t in (x, weight))
        y = experts(x_some, gate_up.double(), down.double(), layer.idx[self.tokens], weight_some, backend="eager")
        dx, dweight = torch.autograd.grad(y, (x_some, weight_some), layer.dy[self.tokens].double())
        gate_up_some, down_some = (t.double().requires_grad_() for t in self._neurons(gate_up, down))
        y_all = experts(x.double(), gate_up_some, down_some, layer.idx, weight.double(), backend="eager")
        self.want = (y.detach(), dx, *torch.autograd.grad(y_all, (gate_up_some, down_some), layer.dy.double()), dweight)

    def _neurons(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=1)
        return torch.cat([gate[:, self.neurons], up[:, self.neurons]], dim=1), down[:, :, self.neurons]

    def error(self, layer: Layer, variant: Variant) -> float:
        """The largest of five relative errors: output and gradients of x, gate_up, down and weight (the output alone where nothing is trained)."""
        if not layer.case.train:
            have = (layer.forward(variant)[self.tokens],)
        else:
            y, *gradients = layer.backward(variant)
            dx, dgate_up, ddown, dweight = variant.gradients(gradients)
            have = (y[self.tokens], dx[self.tokens], *self._neurons(dgate_up, ddown), dweight[self.tokens])
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(have, self.want, strict=False))
