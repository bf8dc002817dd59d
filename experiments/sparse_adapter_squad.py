"""SparseAdapter on extractive questions: adapters pruned at initialisation on SQuAD v1.1 and v2 (EMNLP Findings 2022; docs/sparse_adapter.md).

The defaults are the paper's, as far as they are known: BERT-base, a bottleneck of 256, 40 % pruned by SNIP, windows of 384 tokens, AdamW with betas 0.9 and
0.98, weight decay 0.1, warm-up over 10 % of the steps. Section numbers are those of the specification in docs/sparse_adapter.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dyn.data.squad import QuestionSource
from dyn.train.optim import RecipeConfig
from dyn.train.settings import AnswerConfig, TrainerConfig
from dyn.train.sparse import SparseConfig, adapter_rows, check_adapter_run, with_controls

WINDOWS = {"rajpurkar/squad": 88_500, "rajpurkar/squad_v2": 132_000}  # about, of 384 tokens with a stride of 128, for plans; a run counts its own


@dataclass(kw_only=True, slots=True)
class Config:
    """Section 4.1; what the paper chose of its grids (learning rate, epochs 5 to 20, batch 8 to 64) was not recovered: section 4.4's choice stands here."""

    seed: int = 42
    source: str = "google-bert/bert-base-uncased"  # an encoder: folder, hub id, or a packaged model's name
    epochs: float = 10.0
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 32  # windows a device and micro-batch
    eval_batch_size: int = 128
    workers: int = 0
    export: bool = True  # keep what is trained: the adapter in its small file, or the whole network
    rates: list[float] = field(default_factory=list)  # learning rates of which the best on data.tuning is reported; none: optim.lr
    sparse: SparseConfig = field(default_factory=lambda: SparseConfig(r=256))
    beside: list[SparseConfig] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    data: QuestionSource = field(default_factory=QuestionSource)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(lr=1e-4, warmup_share=0.1))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(val_first=False, val_every=3000, checkpoint_every=3000, keep_checkpoints=1,
                                                                         log_every=50))

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        check_adapter_run(self)


V2: dict[str, Any] = dict(data__path="rajpurkar/squad_v2")
CPU: dict[str, Any] = dict(  # what one CPU core does in some minutes a row: a small encoder on this machine's own text
    source="all-MiniLM-L6-v2", data__path="local", data__max_length=256, data__stride=64, data__validation_limit=300, epochs=4.0, batch_size=16,
    eval_batch_size=64, optim__lr=5e-4, trainer__accelerator="cpu", trainer__val_every=0, trainer__checkpoint_every=0)
SNIP, DENSE, FULL = SparseConfig(r=256), SparseConfig(r=256, keep=1.0), SparseConfig(kind="none", lr=3e-5)  # usual where a whole encoder is trained
KINDS = [SparseConfig(kind=kind, r=r) for kind, r in (("houlsby", 256), ("pfeiffer", 256), ("lora", 10), ("mam", 64))]  # LoRA as the authors launched it

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "table2": adapter_rows(FULL, *with_controls(SNIP), choose=True),
    "table2_v2": adapter_rows(FULL, *with_controls(SNIP), suffix=", v2", choose=True, **V2),
    "scores": adapter_rows(FULL, DENSE, *(SparseConfig(r=256, method=m, shuffle=s) for m in ("magnitude", "snip", "grasp", "synflow") for s in (False, True)),
                           *(SparseConfig(r=256, method=m) for m in ("random", "erdos_renyi")), SNIP.twin(), choose=True),
    "keep": adapter_rows(FULL, DENSE, *(made for tenth in range(1, 10) for made in with_controls(SparseConfig(r=256, keep=tenth / 10))), choose=True),
    "large_sparse": adapter_rows(FULL, *(made for k in (2, 3, 4) for made in with_controls(SparseConfig(r=256, factor=k, keep=None))), choose=True),
    "adapters": adapter_rows(FULL, *(made for row in KINDS for made in with_controls(row)), choose=True),
    "cpu": adapter_rows(replace(FULL, lr=1e-4), *with_controls(SparseConfig(r=64), SparseConfig(r=64, factor=4, keep=None)), suffix=", gaps", **CPU),
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Attach, prune, train, measure; see `dyn.train.adapt`."""
    from dyn.train import adapt, adapt_jobs

    return adapt.train_adapters(cfg, run, {"": adapt_jobs.questions(cfg, run)})


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.models.packaged import question_answerer, with_places
    from dyn.train.adapt import plan_adapters

    return plan_adapters(cfg, lambda: with_places(question_answerer(cfg.source, 260), cfg.data.max_length), WINDOWS.get(cfg.data.path), "windows (about)")
