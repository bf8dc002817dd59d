"""PAD-Net on sentences: static, MoE and partially dynamic MoE encoders on GLUE (ACL 2023; docs/padnet.md).

The defaults are the recipe of the official code for BERT-base, 8 experts in both feed-forward linears, 50 % dynamic: section numbers are those of the
specification in docs/padnet.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dyn.data.glue import TASKS, SentenceSource
from dyn.train.optim import RecipeConfig
from dyn.train.padnet import PartitionConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig, check_beside, check_tasks, check_trainings, seeded_rows

Method = Literal["static", "moe", "pad"]


@dataclass(kw_only=True, slots=True)
class ModelConfig(PartitionConfig):
    """What is trained. `make_moe` explains the fields that they share, `PartitionConfig` and `make_partial` those of mode partition (section 4)."""

    source: str = "google-bert/bert-base-uncased"  # folder, hub id, or a packaged model's name
    method: Method = "pad"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    where: Literal["both", "out", "int"] = "both"  # the first code had `out` (section 2.3)
    noise: float = 0.0  # on the copies, relative to the weights' deviation; 0: the start computes what the pre-trained encoder does
    gate: str = "linear"  # of dyn.nn.experts.GATES, with scores that sum to one; random: experts by chance, a control
    gate_noise: bool = True
    gate_std: float = 0.0  # section 2.2: gates start at zero, and only noise tells tokens apart
    balance_weight: float = 0.01
    keep: float = 0.5
    criterion: Literal["snip", "removal", "random", "magnitude", "grasp"] = "snip"  # of copies snip ranks by removal (section 4.2)
    static: Literal["mean", "fresh"] = "mean"  # of copies the mean is the pre-trained weight

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        self.check_partition(num_experts=1, num_experts_per_tok=1, noise=0, gate_std=0, balance_weight=0)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must be at most num_experts={self.num_experts}")

    def what(self) -> str:
        """The network in words, as rows are called: a row and its controls are found by these."""
        if self.method == "static":
            return "static"
        usual, shape = ModelConfig(), f"{self.num_experts_per_tok} of {self.num_experts}"
        more = [f"{name} {getattr(self, name)}" for name in ("where", "noise", "gate") if getattr(self, name) != getattr(usual, name)]
        return ", ".join([f"MoE, {shape}", *more] if self.method == "moe" else [f"PAD {self.keep:.4g}, {shape}", *more, *self.words()])

    def fully_dynamic(self) -> list[ModelConfig]:
        """What a partially dynamic network is compared with: the usual one, and that of about its storage."""
        sizes = (8, round(1 + (self.num_experts - 1) * self.keep))
        return [dataclasses.replace(self, method="moe", num_experts=e) for e in sizes if e >= self.num_experts_per_tok]


@dataclass(kw_only=True, slots=True)
class Config:
    """Section 5.2: AdamW at 2e-5 without weight decay, linear decay, 32 sentences of at most 128 tokens a step, 3 epochs."""

    seed: int = 0
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # of GLUE, or docstrings; the score is their mean, WNLI left out
    epochs: float = 3.0
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 32  # sentences a device and micro-batch
    eval_batch_size: int = 64
    workers: int = 0
    beside: list[Method] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    timing_batch: int = 32
    timing_rounds: int = 7
    compact_examples: int | None = None  # validation examples on which the compact form is compared with the trained one; None: all
    export: bool = True  # keep the trained network as a folder for transformers (partially dynamic ones in compact form)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: SentenceSource = field(default_factory=SentenceSource)
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(val_first=False, val_every=1000, checkpoint_every=1000, keep_checkpoints=1,
                                                                         log_every=50))

    def sentences_per_step(self) -> int:
        """Over all devices and micro-batches."""
        return self.batch_size * self.trainer.accumulate * self.trainer.world_size

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        check_trainings(self, timing_batch=1, timing_rounds=1, compact_examples=1)
        check_tasks(self, TASKS)
        check_beside(self)


def rows(*changes: dict[str, Any], suffix: str = "", **more: Any) -> list[dict[str, Any]]:
    """Sweep rows for three seeds, a network for each of `changes` to the paper's; `more` as in `seeded_rows`."""
    return seeded_rows("model", (ModelConfig(**change) for change in changes), range(3), suffix, leave_out=("source", "gate_std", "batches"),
                       **more)


STATIC, MOE, MOE4 = dict(method="static"), dict(method="moe"), dict(method="moe", num_experts=4)
CONTROLS = (STATIC, MOE, MOE4)  # 4 experts store about what 8 half dynamic ones do: 1 + 7 / 2 times the static weights
CRITERIA = [dict(criterion=c, rounds=r, shuffle=s) for c, r in (("random", 3), ("magnitude", 3), ("snip", 1), ("snip", 3), ("snip", 10)) for s in (False, True)]
SAME_STORAGE = [dict(num_experts=e, keep=keep) for e, keep in ((5, 0.875), (8, 0.5), (16, 7 / 30), (32, 3.5 / 31))]
CPU = dict(  # what one CPU core does in less than 6 minutes a row
    model__source="all-MiniLM-L6-v2", model__batches=5, eval_batch_size=102, trainer__precision="bf16-mixed", trainer__accelerator="cpu", optim__lr=1e-4,
    optim__warmup_share=0.06, trainer__val_every=1000, trainer__checkpoint_every=0, timing_rounds=5,
    compact_examples=100)

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "methods": rows(*CONTROLS, {}, dict(where="out"), dict(method="moe", where="out"), dict(method="moe", where="out", num_experts=4), dict(gate="random"),
                    dict(method="moe", gate="random"), dict(method="moe", gate="random", num_experts=4)),
    "keep": rows(*CONTROLS, *(dict(keep=share / 10) for share in range(1, 11)), *(dict(method="moe", num_experts=e) for e in (2, 3, 5, 6, 7))),
    "partition": rows(*CRITERIA, dict(noise=0.01), dict(static="fresh"), *CONTROLS, *(dict(method="moe", noise=0.01, num_experts=e) for e in (4, 8))),
    "scales": rows({}, dict(scales="s"), dict(scales="d"), dict(scales="none"), *CONTROLS),
    "pruning": rows(dict(scales="none"), dict(scales="prune"), {}, *CONTROLS),
    "experts": rows(*SAME_STORAGE, *CONTROLS),
    "cpu": [*rows(STATIC, MOE, {}, MOE4, suffix=", MRPC", tasks=["mrpc"], epochs=1.5, **CPU),
            *rows(STATIC, MOE, {}, MOE4, suffix=", CoLA", tasks=["cola"], epochs=1.5, **CPU)],
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Partition, train, compact, measure; see `dyn.train.encoders`."""
    from dyn.train.encoders import train_encoders

    return train_encoders(cfg, run)


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.train.encoders import plan_encoders

    return plan_encoders(cfg)
