"""Optimisers, their parameter groups, schedules: the one recipe of LLaMA-MoE (section 4.4), and those of classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dyn.models.hosts import find_host
from dyn.nn.experts import Gate
from dyn.nn.masked import flat_matrices

# What a setting may be at most; the least is 0, and null is let through.
HIGHEST = {"lr": math.inf, "gate_lr": math.inf, "head_lr": math.inf, "eps": math.inf, "momentum": 1, "weight_decay": math.inf, "warmup_steps": math.inf,
           "warmup_share": 0.99, "floor": 1, "gamma": 1, "clip": math.inf}


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The paper's recipe (section 4.4)."""

    lr: float = 2e-4  # peak
    gate_lr: float | None = None  # of gates, peak; 0: they stay; None: lr, and a hundredth of it where `dyn.train.pretrain` trains fitted gates
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices
    warmup_steps: int = 100  # linear from 0
    floor: float = 0.1  # of the peak, below which the cosine is cut
    clip: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        _check(self)


@dataclass(kw_only=True, slots=True)
class RecipeConfig:
    """Optimiser and schedule of a classification; the defaults fine-tune an encoder (SparseAdapter, section 4.4)."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4  # peak
    head_lr: float | None = None  # of the last layer; None: lr
    betas: tuple[float, float] = (0.9, 0.98)  # adamw
    eps: float = 1e-6  # adamw
    momentum: float = 0.9  # sgd
    nesterov: bool = False  # sgd
    weight_decay: float = 0.1
    decay_all: bool = False  # biases, norms and scales too
    schedule: Literal["linear", "cosine", "step", "constant"] = "linear"  # after the warm-up; linear and cosine fall to `floor`
    warmup_steps: int = 0  # linear from 0
    warmup_share: float = 0.0  # the same as a share of all steps; the longer of both counts
    floor: float = 0.0  # of the peak
    milestones: tuple[float, ...] = (1 / 3, 2 / 3, 0.9)  # step: shares of all steps at which the rate is multiplied by `gamma`
    gamma: float = 0.1
    clip: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        _check(self)
        if not all(0 < share < 1 for share in self.milestones) or sorted(self.milestones) != list(self.milestones):
            raise ValueError(f"optim.milestones={self.milestones} must be shares of the steps, between 0 and 1, in ascending order")
        if self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov=true needs optim.momentum above 0")


def _check(cfg: OptimConfig | RecipeConfig) -> None:
    """ValueError for a setting out of its range."""
    for name, high in HIGHEST.items():
        if (value := getattr(cfg, name, None)) is not None and not 0 <= value <= high:
            raise ValueError(f"optim.{name}={value} must lie in [0, {high}]")
    if len(cfg.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.betas):
        raise ValueError(f"optim.betas={cfg.betas} must be two numbers in [0, 1)")


def schedule(cfg: RecipeConfig, total: int) -> Callable[[int], float]:
    """Multiplier of the peak learning rate by optimiser step (from 0)."""

    warmup = max(cfg.warmup_steps, round(cfg.warmup_share * total))

    def multiplier(step: int) -> float:
        if step < warmup:
            return step / warmup
        p = min(1.0, (step - warmup) / max(1, total - warmup))
        if cfg.schedule == "step":
            return cfg.gamma ** sum(step >= share * total for share in cfg.milestones)
        shape = {"linear": 1 - p, "cosine": 0.5 * (1 + math.cos(math.pi * p)), "constant": 1.0}[cfg.schedule]
        return cfg.floor + (1 - cfg.floor) * shape

    return multiplier


def recipe_optimizer(module: nn.Module, cfg: RecipeConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser over the trained parameters of `module`, those of its head at the head's rate where one is set.

    Raises:
        ValueError: nothing is left to train, or a head's rate without a head.
    """
    groups = param_groups(module, cfg.weight_decay, cfg.decay_all)
    if cfg.head_lr is not None:
        groups = _with_rate(groups, _head(module), cfg.head_lr)
    fused = _fusable(groups) or None
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=fused)


def _head(net: nn.Module) -> list[nn.Parameter]:
    """What turns features into a task's output: the classifier of a network as timm makes them, the head of one of transformers."""
    heads = [net.get_classifier()] if hasattr(net, "get_classifier") else find_host(net).heads
    if not (found := [p for head in heads for p in head.parameters() if p.requires_grad]):
        raise ValueError(f"optim.head_lr is set, and {type(net).__name__} has no head of its own that is trained")
    return found


def param_groups(module: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Two groups for an optimiser: matrices (two or more dimensions: embeddings and stacked experts too) with decay, the rest (biases, norms, scales) without.

    Only parameters with requires_grad; tied ones once. The surviving values of a pruned matrix in flat form decay as the matrix does. What belongs to a
    module whose class name ends in "Norm" is never decayed, whatever its shape. `decay_all` puts everything under decay.

    Raises:
        ValueError: nothing is left to train.
    """
    norms = {id(p) for m in module.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    if not (trained := [p for p in module.parameters() if p.requires_grad]):
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: everything is frozen")
    flat = {id(p) for p in flat_matrices(module)}
    decayed = [decay_all or ((p.ndim >= 2 or id(p) in flat) and id(p) not in norms) for p in trained]
    groups = [{"params": [p for p, d in zip(trained, decayed, strict=True) if d is wanted], "weight_decay": weight_decay if wanted else 0.0}
              for wanted in (True, False)]
    return [group for group in groups if group["params"]]


def _with_rate(groups: list[dict], parameters: Iterable[nn.Parameter], lr: float) -> list[dict]:
    """Groups split so that `parameters` have their own learning rate."""
    own = {id(p) for p in parameters}
    split = [({**g, "params": [p for p in g["params"] if (id(p) in own) is here]}, here) for g in groups for here in (False, True)]
    return [{**g, "lr": lr} if here else g for g, here in split if g["params"]]


def cosine_clipped(step: int, total: int, warmup: int, floor: float = 0.1) -> float:
    """Multiplier of the peak learning rate for optimiser step `step` (from 0): linear warm-up, then max(floor, (1 + cos(pi p)) / 2) with p from 0 to 1.

    An ordinary cosine to zero, clipped from below; not one that is rescaled to end at the floor.
    """
    if step < warmup:
        return step / warmup
    p = min(1.0, (step - warmup) / max(1, total - warmup))
    return max(floor, 0.5 * (1.0 + math.cos(math.pi * p)))


def make_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, gates at `gate_lr`; fused where torch has such a kernel for them (floating point on CPU, CUDA, XPU, MPS).

    Raises:
        ValueError: nothing is left to train.
    """
    groups = param_groups(module, cfg.weight_decay)
    if cfg.gate_lr is not None:
        groups = _with_rate(groups, (p for m in module.modules() if isinstance(m, Gate) for p in m.parameters()), cfg.gate_lr)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=_fusable(groups) or None)


def _fusable(groups: list[dict]) -> bool:
    return all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for group in groups for p in group["params"])
