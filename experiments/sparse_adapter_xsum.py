"""SparseAdapter on summaries: adapters pruned at initialisation in an encoder-decoder, XSum (EMNLP Findings 2022; docs/sparse_adapter.md).

The defaults are the paper's, as far as they are known: BART-large, a bottleneck of 512, 40 % pruned by SNIP, 512 tokens of a document and 128 of a summary. The
rest is the authors' recorded launch (section 4.2 of the specification in docs/sparse_adapter.md): 100,000 steps of 64 pairs at 5e-5, six beams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dyn.data.summaries import SummarySource
from dyn.train.optim import RecipeConfig
from dyn.train.settings import GenerateConfig, TrainerConfig
from dyn.train.sparse import SparseConfig, adapter_rows, check_adapter_run, with_controls

PAIRS = {"EdinburghNLP/xsum": 204_045}


@dataclass(kw_only=True, slots=True)
class Config:
    """Sections 4.1 and 4.2."""

    seed: int = 42
    source: str = "facebook/bart-large"  # an encoder-decoder: folder or hub id
    epochs: float = 31.37  # 100,000 steps
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 16  # pairs a device and micro-batch
    eval_batch_size: int = 32
    workers: int = 0
    export: bool = True  # keep what is trained: the adapter in its small file, or the whole network
    rates: list[float] = field(default_factory=list)  # learning rates of which the best on data.tuning is reported; none: optim.lr
    sparse: SparseConfig = field(default_factory=lambda: SparseConfig(r=512))
    beside: list[SparseConfig] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    data: SummarySource = field(default_factory=lambda: SummarySource(validation_limit=1600))
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(lr=5e-5, weight_decay=0.01, clip=0.1))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(accumulate=4, val_first=False, val_every=3000, checkpoint_every=3000,
                                                                         keep_checkpoints=1, log_every=50))

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        check_adapter_run(self)


# What the authors launched: MAM, the prefix left as it is, half of the rest pruned in five rounds, one an epoch
AUTHORS = SparseConfig(kind="mam", r=512, keep=0.5, rounds=5, by_epoch=True, flags={"length": 30, "scale": 4.0, "init": "lora"})
SNIP, FULL = SparseConfig(r=512), SparseConfig(kind="none", lr=3e-5)  # usual where a whole network is trained
TEST: dict[str, Any] = dict(data__splits=["test"], data__validation_limit=None)  # what published numbers are of: 11,334 pairs
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "table2": adapter_rows(FULL, *with_controls(SNIP), seeds=1, suffix=", test", choose=True, **TEST),
    "authors": adapter_rows(FULL, *with_controls(AUTHORS), seeds=1),
    "scores": adapter_rows(FULL, *(SparseConfig(r=512, method=m, shuffle=s) for m in ("magnitude", "snip", "grasp", "synflow") for s in (False, True)),
                           *(SparseConfig(r=512, method=m) for m in ("random", "erdos_renyi")), SparseConfig(r=512, keep=1.0), SNIP.twin(), seeds=1,
                           choose=True),
    "keep": adapter_rows(FULL, *(made for tenth in range(1, 10) for made in with_controls(SparseConfig(r=512, keep=tenth / 10))), seeds=1, choose=True),
    "large_sparse": adapter_rows(FULL, *(made for k in (2, 3, 4) for made in with_controls(SparseConfig(r=128, factor=k, keep=None))), seeds=1, choose=True),
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Attach, prune, train, write, measure; see `dyn.train.adapt`."""
    from dyn.train import adapt, adapt_jobs

    return adapt.train_adapters(cfg, run, {"": adapt_jobs.summaries(cfg, run)})


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.models.packaged import summariser, with_places
    from dyn.train.adapt import plan_adapters

    return plan_adapters(cfg, lambda: with_places(summariser(cfg.source, 260), cfg.data.max_document, "data.max_document"), PAIRS.get(cfg.data.path), "pairs")
