"""SparseAdapter on sentences: adapters pruned at initialisation, Large-Sparse, on GLUE (Findings of EMNLP 2022; docs/sparse_adapter.md).

The defaults are the recommended recipe for BERT-base, Houlsby adapters with bottleneck 64, 40 % pruned by SNIP: section numbers are those of the specification
in docs/sparse_adapter.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dyn.data.glue import TASKS, SentenceSource
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig
from dyn.train.sparse import SparseConfig


@dataclass(kw_only=True, slots=True)
class Config:
    """Section 4.4: AdamW (0.9, 0.98), weight decay 0.1, linear decay after 10 % of warm-up, batch 32, 10 epochs."""

    seed: int = 42
    source: str = "google-bert/bert-base-uncased"  # folder, hub id, or a packaged model's name
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # of GLUE, or docstrings; the score is their mean, WNLI left out
    epochs: float = 10.0
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 32  # sentences a device and micro-batch
    eval_batch_size: int = 64
    workers: int = 0
    full_lr: float = 2e-5  # of full fine-tuning (sparse.kind=none), in place of optim.lr
    rates: list[float] = field(default_factory=list)  # learning rates to choose from, by the score on data.tuning; none: optim.lr or full_lr as it is
    beside: list[SparseConfig] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    export: bool = True  # keep the adapters' folders
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: SentenceSource = field(default_factory=SentenceSource)
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(lr=1e-4, warmup_share=0.1))
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(val_first=False, val_every=0, checkpoint_every=1000, keep_checkpoints=1,
                                                                         log_every=50))

    def sentences_per_step(self) -> int:
        """Over all devices and micro-batches."""
        return self.batch_size * self.trainer.accumulate * self.trainer.world_size

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        for name, least in {"batch_size": 1, "eval_batch_size": 1, "workers": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if wrong := [task for task in self.tasks if task not in (*TASKS, "docstrings")]:
            raise ValueError(f"tasks={wrong[0]} is unknown; allowed: {', '.join((*TASKS, 'docstrings'))}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or self.data.task != SentenceSource().task:
            raise ValueError(f"tasks={self.tasks}: at least one, each once; data.task={self.data.task} would be ignored")
        if self.epochs <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError(f"epochs={self.epochs} and minutes={self.minutes} must be above 0")
        if bool(self.rates) is not (self.data.tuning > 0) or not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates={self.rates} with data.tuning={self.data.tuning}: rates above 0 are chosen on a share of the training data; give both or "
                             "neither")
        for name, instead in {"max_steps": "epochs", "seed": "seed"}.items():
            if getattr(self.trainer, name) != getattr(TrainerConfig(), name):
                raise ValueError(f"trainer.{name}={getattr(self.trainer, name)} would be ignored by this experiment; set {instead}")
        if self.minutes is not None and self.trainer.world_size > 1:
            raise ValueError(f"minutes={self.minutes} is for one device; give epochs for {self.trainer.world_size}")
        if self.trainer.strategy == "fsdp2" or (self.trainer.strategy == "auto" and self.trainer.num_nodes > 1):
            raise ValueError("these networks fit a device: set trainer.strategy=ddp")
        names = [sparse.what() for sparse in (*self.beside, self.sparse)]
        if len(set(names)) < len(names):
            raise ValueError(f"beside and sparse must be different networks; got {'; '.join(names)}")


def rows(*changes: dict[str, Any], suffix: str = "", seeds: int = 5, **more: Any) -> list[dict[str, Any]]:
    """Sweep rows over seeds from 42, a network for each of `changes` to the paper's, named after it; `more`: other keys, a__b for a.b."""
    more = {key.replace("__", "."): value for key, value in more.items()}
    nets = [SparseConfig(**change) for change in changes]
    return [{"row": net.what() + suffix, "seed": 42 + seed, "beside": [], "minutes": None, "export": False}
            | {f"sparse.{f.name}": getattr(net, f.name) for f in fields(SparseConfig)} | more for seed in range(seeds) for net in nets]


FULL, DENSE = dict(kind="none"), dict(keep=1.0)


def large(factor: int, **changes: Any) -> dict[str, Any]:
    """Large-Sparse."""
    return dict(factor=factor, keep=None, **changes)


def with_twins(**change: Any) -> list[dict[str, Any]]:
    """A pruned adapter with its controls: the mask shuffled, random masks, the dense adapter of its budget."""
    net = SparseConfig(**change)
    twin = net.twin()
    return [change, change | dict(shuffle=True), change | dict(method="random"), dict(kind=twin.kind, r=twin.r, keep=1.0, flags=twin.flags)]


CPU = dict(source="all-MiniLM-L6-v2", epochs=5.0, eval_batch_size=102, trainer__precision="bf16-mixed", trainer__accelerator="cpu", optim__lr=1e-3,
           full_lr=1e-4, trainer__checkpoint_every=0)
FIRST = [FULL, DENSE, *with_twins(keep=0.2), dict(), large(4)]
KINDS = [("pfeiffer", {}), ("lora", dict(r=16)), ("mam", dict(r=16, prefix=True)), ("parallel", {})]

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "scores": rows(  # Table 1
        FULL, DENSE, *(net for m in ("snip", "magnitude", "grasp", "synflow") for net in with_twins(method=m)), dict(method="erdos_renyi")),
    "keep": rows(FULL, dict(kind="pfeiffer", keep=1.0), *(net for share in (0.8, 0.6, 0.4, 0.2, 0.1) for net in with_twins(kind="pfeiffer", keep=share))),
    "large_sparse": rows(FULL, DENSE, *(net for k in (2, 3, 4) for net in with_twins(**large(k))),
                         *(dict(r=64 * k, keep=1.0) for k in (2, 3, 4))),  # Table 3
    "kinds": rows(FULL, *(net for kind, more in KINDS for net in (dict(kind=kind, keep=1.0, **more), *with_twins(kind=kind, **more)))),  # Table 4
    "cpu": [*rows(*FIRST, suffix=", MRPC", tasks=["mrpc"], **CPU), *rows(*FIRST, suffix=", CoLA", tasks=["cola"], **CPU)],
}
SWEEPS = {name: list({(row["row"], row["seed"]): row for row in found}.values()) for name, found in SWEEPS.items()}  # controls that rows share, once


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Attach, prune, train, save, measure; see `dyn.train.adapters`."""
    from dyn.train.adapters import train_adapters

    return train_adapters(cfg, run)


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.train.adapters import plan_adapters

    return plan_adapters(cfg)
