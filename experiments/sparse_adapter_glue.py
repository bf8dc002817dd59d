"""SparseAdapter on sentences: adapters pruned at initialisation, Large-Sparse, on GLUE (Findings of EMNLP 2022; docs/sparse_adapter.md).

The defaults are the recommended recipe for BERT-base, Houlsby adapters with bottleneck 64, 40 % pruned by SNIP: section numbers are those of the specification
in docs/sparse_adapter.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dyn.data.glue import EXAMPLES, TASKS, SentenceSource
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig, check_tasks
from dyn.train.sparse import SparseConfig, adapter_rows, check_adapter_run, with_controls


@dataclass(kw_only=True, slots=True)
class Config:
    """Sections 4.1 and 4.4: AdamW (0.9, 0.98), weight decay 0.1, linear decay after 10 % of warm-up, batch 32, 10 epochs (20 are usual on the small tasks)."""

    seed: int = 42
    source: str = "google-bert/bert-base-uncased"  # folder, hub id, or a packaged model's name
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # of GLUE, or docstrings; the score is their mean, WNLI left out
    epochs: float = 10.0
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 32  # sentences a device and micro-batch
    eval_batch_size: int = 64
    workers: int = 0
    rates: list[float] = field(default_factory=list)  # learning rates to choose from, by the score on data.tuning; none: sparse.lr or optim.lr as it is
    beside: list[SparseConfig] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    export: bool = True  # keep the adapters' folders
    sparse: SparseConfig = field(default_factory=SparseConfig)
    data: SentenceSource = field(default_factory=lambda: SentenceSource(max_length=512))
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(lr=1e-4, warmup_share=0.1))
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(val_first=False, val_every=0, checkpoint_every=1000, keep_checkpoints=1,
                                                                         log_every=50))

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        check_adapter_run(self)
        check_tasks(self, TASKS)


CPU: dict[str, Any] = dict(  # what one CPU core does in some minutes a row
    source="all-MiniLM-L6-v2", epochs=5.0, eval_batch_size=102, optim__lr=1e-3, trainer__precision="bf16-mixed", trainer__accelerator="cpu",
    trainer__checkpoint_every=0)
FULL, DENSE, SNIP = SparseConfig(kind="none", lr=2e-5), SparseConfig(keep=1.0), SparseConfig()
# Rates of the CPU rows: chosen by the sweep `rates` on MRPC; random and shuffled masks train at their mask's rate, so that the mask is all that differs.
FIRST = [replace(FULL, lr=2e-4), replace(DENSE, lr=1e-3), *with_controls(SparseConfig(keep=0.2, lr=3e-3))[1:], replace(SNIP, lr=1e-3),
         SparseConfig(factor=4, keep=None, lr=3e-3)]
REST = [net for net in with_controls(*FIRST[-2:]) if net.what() not in {first.what() for first in FIRST}]
KINDS = [SparseConfig(kind="pfeiffer"), SparseConfig(kind="lora", r=16, lr=2e-4), SparseConfig(kind="mam", r=16, prefix=True), SparseConfig(kind="parallel"),
         SparseConfig(kind="pfeiffer", fuse=True)]
# What the authors launched (section 4.2), as far as it is known: score and density on CoLA are not, and precision is ours. LoRA was dense.
AUTHORS: list[tuple[str, str, SparseConfig, dict[str, Any]]] = [
    ("mnli", "MNLI", SparseConfig(r=256, keep=0.5, rounds=10), dict(source="FacebookAI/roberta-base", optim__warmup_share=0.06)),
    ("stsb", "STS-B", SparseConfig(method="grasp", rounds=10, flags={"scale": 2.0, "init": "lora"}),
     dict(source="google-bert/bert-base-cased", epochs=20.0, batch_size=48)),
    ("cola", "CoLA", SparseConfig(scope="local", flags={"scale": 2.0}), dict(epochs=20.0, batch_size=48)),
    ("sst2", "SST-2", SparseConfig(r=1024, keep=1.0), dict(batch_size=48)),
    ("mrpc", "MRPC", SparseConfig(kind="lora", r=10, keep=1.0, lr=2e-4, flags={"where": ["query", "value", "ffn"], "dropout": 0.1, "init": "bert"}),
     dict(source="FacebookAI/roberta-base", epochs=20.0, batch_size=16)),
]

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "scores": adapter_rows(FULL, *(made for m in ("snip", "magnitude", "grasp", "synflow") for made in with_controls(SparseConfig(method=m))),
                           SparseConfig(method="erdos_renyi"), seeds=5, choose=True),  # Table 1
    "keep": adapter_rows(FULL, *(made for tenth in range(1, 10) for made in with_controls(SparseConfig(kind="pfeiffer", keep=tenth / 10))),
                         seeds=5, choose=True),
    "large_sparse": adapter_rows(FULL, *(made for k in (2, 3, 4) for made in with_controls(SparseConfig(factor=k, keep=None))),
                                 *(SparseConfig(r=64 * k, keep=1.0) for k in (2, 3, 4)), seeds=5, choose=True),  # Table 3
    "authors": [made for task, name, net, more in AUTHORS for made in adapter_rows(
        FULL, *(with_controls(net) if not net.dense() else [net]), seeds=1, suffix=f", {name}", tasks=[task], **more)],
    "kinds": adapter_rows(FULL, *(made for kind in KINDS for made in with_controls(kind)), seeds=5, choose=True),  # Table 4
    "cpu": [made for nets in (FIRST, REST) for task, name in (("mrpc", "MRPC"), ("cola", "CoLA"))
            for made in adapter_rows(*nets, seeds=5, suffix=f", {name}", tasks=[task], **CPU)],
    # What FIRST's rates were chosen by: on a fifth of the training examples that is never reported.
    "rates": [made for net in FIRST for made in adapter_rows(
        net, seeds=1, suffix=", MRPC, rates", tasks=["mrpc"], data__tuning=0.2, rates=[1e-4, 2e-4] if net.kind == "none" else [1e-3, 3e-3], **CPU)],
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Attach, prune, train, measure; see `dyn.train.adapt`."""
    from dyn.train import adapt, adapt_jobs

    return adapt.train_adapters(cfg, run, adapt_jobs.glue(cfg, run))


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.models.packaged import sentence_classifier, with_places
    from dyn.train.adapt import plan_adapters

    source, labels = cfg.source if cfg.source != "tiny" else "google-bert/bert-base-uncased", [TASKS[task].labels for task in cfg.tasks if task in TASKS]
    examples = [EXAMPLES[task] for task in cfg.tasks if task in EXAMPLES]
    used = sum(min(count, cfg.data.train_limit or count) for count in examples)
    return plan_adapters(cfg, lambda: with_places(sentence_classifier(source, max(1, *labels, 2)), cfg.data.max_length), used or None, "sentences")
