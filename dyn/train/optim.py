"""AdamW, its parameter groups, and the schedule of LLaMA-MoE (section 4.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The paper's recipe (section 4.4)."""

    lr: float = 2e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices
    warmup_steps: int = 100  # linear from 0
    floor: float = 0.1  # of the peak, below which the cosine is cut
    clip: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        for name, low, high in (("lr", 0, math.inf), ("eps", 0, math.inf), ("weight_decay", 0, math.inf), ("warmup_steps", 0, math.inf),
                                ("floor", 0, 1), ("clip", 0, math.inf)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"optim.{name}={value} must lie in [{low}, {high}]")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1)")


def param_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimiser: matrices (two or more dimensions: embeddings and stacked experts too) with decay, the rest (biases, norms, scales) without.

    Only parameters with requires_grad; tied ones once. What belongs to a module whose class name ends in "Norm" is never decayed, whatever its shape.
    """
    norms = {id(p) for m in module.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p.ndim >= 2 and id(p) not in norms for p in trained]
    groups = [{"params": [p for p, d in zip(trained, decayed, strict=True) if d is wanted], "weight_decay": weight_decay if wanted else 0.0}
              for wanted in (True, False)]
    return [group for group in groups if group["params"]]


def cosine_clipped(step: int, total: int, warmup: int, floor: float = 0.1) -> float:
    """Multiplier of the peak learning rate for optimiser step `step` (from 0): linear warm-up, then max(floor, (1 + cos(pi p)) / 2) with p from 0 to 1.

    An ordinary cosine to zero, clipped from below; not one that is rescaled to end at the floor.
    """
    if step < warmup:
        return step / warmup
    p = min(1.0, (step - warmup) / max(1, total - warmup))
    return max(floor, 0.5 * (1.0 + math.cos(math.pi * p)))


def make_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; fused where torch has such a kernel for them (floating point on CPU, CUDA, XPU, MPS).

    Raises:
        ValueError: nothing is left to train.
    """
    groups = param_groups(module, cfg.weight_decay)
    if not groups:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: everything is frozen")
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=fused or None)
