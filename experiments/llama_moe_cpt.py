"""LLaMA-MoE: split a dense LLaMA into experts, add a gate, continue pre-training (EMNLP 2024; docs/llama_moe.md).

The defaults are the paper's recipe for LLaMA-MoE-3.5B (4 of 16): section numbers are those of the method's specification in docs/llama_moe.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from typing import Any, Literal

from dyn.data.sources import TextSource
from dyn.train.optim import OptimConfig
from dyn.train.settings import DistillConfig, TrainerConfig


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """What is trained. `from_dense` explains the fields that it shares."""

    source: str = "meta-llama/Llama-2-7b-hf"  # folder, hub id, or a packaged model's name
    kind: Literal["moe", "dense", "prune"] = "moe"  # controls on the same tokens: dense: without experts; prune: k/N of the neurons, the same for every token
    start: Literal["pretrained", "scratch"] = "pretrained"  # scratch: the same shape with random weights (Figure 7)
    train: Literal["all", "gates"] = "all"  # gates: they alone; experts and everything else stay as they were converted
    num_experts: int = 16
    num_experts_per_tok: int = 4
    construction: str = "random"  # section 1.2
    num_shared_experts: int | None = None
    moe_intermediate_size: int | None = None
    overlap: bool = False
    features: Literal["up", "gate"] = "up"  # rows that kmeans clusters (section 1.3)
    gate: str = "mlp"  # section 2.1: a name of dyn.nn.experts.GATES
    gate_noise: bool = True  # section 2.2
    capacity_factor: float | None = None  # of top-1 gates, in training (section 2.5)
    balance: Literal["importance_load", "switch", "bias", "none"] = "importance_load"
    balance_weight: float = 0.01
    z_loss_weight: float = 0.0
    score_scale: str | float | None = None  # None: n_over_k (section 2.3), or what a calibrated construction fits
    reinit: float = 0.0
    attention_dropout: float = 0.0
    repair_ridge: float | None = None  # of kind=prune: see `prune_dense`
    calibration_sequences: int = 64  # of block_size tokens, for constructions and scales that look at data

    def keep(self) -> Fraction:
        """What kind=prune keeps of the feed-forward."""
        return Fraction(self.num_experts_per_tok, self.num_experts)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how domains are mixed (sections 4.1-4.3)."""

    text: TextSource = field(default_factory=lambda: TextSource(path="cerebras/SlimPajama-627B", domain_field="meta.redpajama_set_name", streaming=True))
    bos: bool | str = True  # before every document: the tokenizer's BOS, none, or this token
    weights: str | dict[str, float] = "sheared_llama"  # uniform | llama | sheared_llama | a weight for each domain
    stand_for: dict[str, str] = field(default_factory=dict)  # domain here -> domain of the paper, so that its tables of weights apply to another corpus
    dynamic: Literal["none", "a", "b"] = "none"  # rule of section 4.3, after every validation, which then come every trainer.val_every / 2 steps
    anchored: bool = False  # dynamic weights start from the initial ones each time
    block_size: int = 4096
    batch_size: int = 8  # sequences a device and micro-batch
    mask_documents: bool = False
    validation_tokens: int = 262_144  # a domain; whole blocks
    filters: list[str] = field(default_factory=list)  # of training documents: advert, fluency (section 4.1)
    fluency_band: tuple[float, float] = (1.0, 1000.0)  # perplexities under the dense model that the fluency filter keeps
    cache: str | None = None  # of token shards, any fsspec address; None: the user's cache folder
    prepare_only: bool = False  # make the shards and end: on a machine without accelerators, before a long job


@dataclass(kw_only=True, slots=True)
class Config:
    """Section 4.4: 8 x 4 x 112 x 4096 = 14,680,064 tokens a step, 13,623 steps."""

    seed: int = 1227
    tokens: int = 200_000_000_000
    minutes: float | None = None  # for each training: fewer steps where these do not fit, decided once from a measured step
    dense_control: bool = False  # also train the dense model on the same tokens, in the same run
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of what stays float32: conversion and gates; see llama_moe_convert
    sample_tokens: int = 48
    prompts: list[str] = field(default_factory=lambda: ["The most important thing about", "def read_lines(path):\n"])
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)  # not in the paper: the dense model as a teacher
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(accumulate=4, devices=8, num_nodes=14, gradient_checkpointing=True))

    def tokens_per_step(self) -> int:
        """Over all devices and micro-batches."""
        return self.data.block_size * self.data.batch_size * self.trainer.accumulate * self.trainer.devices * self.trainer.num_nodes

    def steps(self) -> int:
        """Full optimiser steps in the token budget."""
        return self.tokens // self.tokens_per_step()

    def val_every(self) -> int:
        """Steps between validations. Dynamic weights change after each, and twice as often as static ones are validated (section 4.3: 170 and 340)."""
        return self.trainer.val_every if self.data.dynamic == "none" else -(-self.trainer.val_every // 2)

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        for name, least in {"data.block_size": 2, "data.batch_size": 1, "data.validation_tokens": 1, "sample_tokens": 0, "seed": 0, "model.balance_weight": 0,
                            "model.z_loss_weight": 0, "model.reinit": 0, "model.attention_dropout": 0}.items():
            if attrgetter(name)(self) < least:
                raise ValueError(f"{name}={attrgetter(name)(self)} must be at least {least}")
        if not self.model.attention_dropout < 1 or not self.model.reinit <= 1 or (self.model.reinit and self.model.construction != "copy"):
            raise ValueError(f"model.attention_dropout={self.model.attention_dropout} must lie in [0, 1); model.reinit={self.model.reinit} in [0, 1], and is 0 "
                             f"unless model.construction=copy, got {self.model.construction}")
        for name, owner, only in (("features", "construction", "kmeans"), ("repair_ridge", "kind", "prune")):
            if getattr(self.model, name) != getattr(ModelConfig(), name) and (got := getattr(self.model, owner)) != only:
                raise ValueError(f"model.{name}={getattr(self.model, name)} is for model.{owner}={only}, got {got}")
        if (self.minutes is not None and not self.minutes > 0) or not all(self.prompts):
            raise ValueError(f"minutes={self.minutes} must be above 0, or null for no limit; prompts={self.prompts} have a character at least")
        if self.steps() < 1:
            raise ValueError(f"tokens={self.tokens} is less than one step of {self.tokens_per_step()} tokens")
        if self.model.start == "scratch" and (self.model.score_scale == "measured" or self.model.reinit):
            raise ValueError("model.start=scratch has no dense network to measure or to copy: model.score_scale=measured and model.reinit do not fit it")
        for name, instead in {"max_steps": "tokens", "seed": "seed", "val_first": "nothing: it is always true"}.items():
            if getattr(self.trainer, name) != getattr(TrainerConfig(), name):
                raise ValueError(f"trainer.{name}={getattr(self.trainer, name)} would be ignored by this experiment; set {instead}")
        if self.minutes is not None and self.trainer.world_size > 1:
            raise ValueError(f"minutes={self.minutes} is for one device; give tokens for {self.trainer.world_size}")
        if self.distill.weight > 0 and self.data.dynamic != "none":
            raise ValueError(f"distill.weight={self.distill.weight} needs draws that are known in advance, data.dynamic={self.data.dynamic} changes them: "
                             "set data.dynamic=none or distill.weight=0")
        if self.model.start == "scratch" and self.model.kind == "prune":
            raise ValueError("model.kind=prune keeps neurons of a pre-trained network: model.start=scratch has none")
        if self.model.train == "gates" and (self.model.kind != "moe" or self.model.gate in ("uniform", "random")):
            what = f"gate={self.model.gate}" if self.model.kind == "moe" else f"kind={self.model.kind}"
            raise ValueError(f"model.train=gates has nothing to train: model.{what} has no gate with parameters; set model.train=all")
        if self.model.train == "gates" and self.optim.gate_lr == 0:
            raise ValueError("model.train=gates has nothing to train at optim.gate_lr=0; leave it null for optim.lr")
        if self.dense_control and self.model.kind == "dense":
            raise ValueError("dense_control=true beside model.kind=dense would train the same model twice")


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A sweep row: the paper's network with `changes`, whatever the profile has; `model__gate=...` means the key model.gate."""
    kept = ("kind", "start", "train", "num_experts", "num_experts_per_tok", "construction", "moe_intermediate_size", "overlap", "features", "gate",
            "gate_noise", "capacity_factor", "balance", "balance_weight", "z_loss_weight", "score_scale", "reinit")
    base = {f"model.{key}": getattr(ModelConfig(), key) for key in kept} | {"model.num_shared_experts": None, "dense_control": False}
    return {"row": name} | base | {key.replace("__", "."): value for key, value in changes.items()}


def half(name: str, experts: int = 8, k: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Half of the feed-forward active, from one start: plain training, and half of the loss from the dense parent. Set the budget by tokens=..."""
    changes = dict(model__num_experts=experts, model__num_experts_per_tok=k, model__gate="linear", model__gate_noise=False) | changes
    return [row(name + words, distill__weight=weight, **changes) for words, weight in (("", 0.0), (", distilled", 0.5))]


def controls(name: str, cfg: Config) -> list[str] | None:
    """Rows that a row of the sweep "after" is compared with: the same start without a teacher, the same size without routing by the same loss, and the dense
    model. None: it is the dense model, or no row of that sweep (others have rows of the same names)."""
    entry = next((entry for entry in SWEEPS["after"] if entry["row"] == name), None)
    if cfg.model.kind == "dense" or entry is None or any(attrgetter(key)(cfg) != value for key, value in entry.items() if key != "row"):
        return None
    plain, distilled, _ = name.partition(", distilled")
    return [*([plain] if distilled else []), *([f"prune{distilled}"] if plain != "prune" else []), "dense, same tokens"]


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "after": [*(made for m in ("random", "kmeans", "gradient") for made in half(m, model__construction=m)),
              *half("sharing_inter", 6, 2, model__construction="sharing_inter", model__num_shared_experts=2),
              *(made for m in ("cmoe", "expert_weaver", "calibrated") for made in half(m, 32, 16, model__construction=m)),
              *half("prune", model__kind="prune"), row("dense, same tokens", model__kind="dense", distill__weight=0.0)],
    "construction": [row("random"), *(row(m, model__construction=m) for m in ("kmeans", "coactivation", "gradient", "sharing_inner")),  # Figure 3
                     row("sharing_inter, 14 + 2", model__construction="sharing_inter", model__num_experts=14, model__num_shared_experts=2,
                         model__num_experts_per_tok=2),
                     row("copy, half re-drawn", model__construction="copy", model__num_experts=4, model__num_experts_per_tok=1, model__reinit=0.5,
                         model__score_scale=1.0), row("kmeans, gate rows", model__construction="kmeans", model__features="gate")],
    "sampling": [row("static Sheared-LLaMA", data__weights="sheared_llama", data__dynamic="none"),
                 row("static LLaMA", data__weights="llama"), row("static uniform", data__weights="uniform"),  # section 4.2
                 row("dynamic from LLaMA", data__weights="llama", data__dynamic="a"), row("dynamic from uniform", data__weights="uniform", data__dynamic="a"),
                 row("dynamic, rule B", data__weights="llama", data__dynamic="b"),
                 row("dynamic from LLaMA, anchored", data__weights="llama", data__dynamic="a", data__anchored=True)],
    "gate": [row("mlp, noisy"), row("mlp, no noise", model__gate_noise=False), row("linear, noisy", model__gate="linear"),  # section 2.1, 2.4
             row("linear, no noise", model__gate="linear", model__gate_noise=False), row("switch loss", model__balance="switch"),
             row("selection bias", model__balance="bias"), row("no balance loss", model__balance="none"), row("balance weight 0.1", model__balance_weight=0.1),
             row("z-loss", model__z_loss_weight=0.001), row("random gate", model__gate="random", model__gate_noise=False, model__balance="none"),
             *(row(f"switch, top-1{words}", model__gate="switch", model__balance="switch", model__num_experts_per_tok=1, model__capacity_factor=factor)
               for words, factor in (("", None), (", capacity 1.25", 1.25)))],
    "scale": [*(row(s, model__score_scale=s) for s in ("n_over_k", "n", "k", "sqrt_kn", "learnable", "measured")), row("1", model__score_scale=1.0)],
    "experts": [row("4 of 16"), row("2 of 16", model__num_experts_per_tok=2), row("2 of 8", model__num_experts=8, model__num_experts_per_tok=2)],  # section 3
    "controls": [row("4 of 16"), row("dense, same tokens", model__kind="dense"), row("4 of 16 from scratch", model__start="scratch")],  # Figure 7
}


def main(cfg: Config, run: Any) -> dict[str, float]:
    """Convert, train, evaluate, export; see `dyn.train.pretrain`."""
    from dyn.train.pretrain import pretrain

    metrics, named = pretrain(cfg, run), controls(run.row, cfg)
    run.notes |= {"controls": named} if named is not None else {}
    return metrics


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.train.plan import plan_pretraining

    return plan_pretraining(cfg)
