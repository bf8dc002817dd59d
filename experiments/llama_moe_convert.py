"""Dense -> mixture of experts without training: what every construction keeps of the dense model at a given share of active neurons (docs/llama_moe.md).

The defaults are the field's setting: LLaMA-2-7B, calibrated on C4, perplexity on WikiText-2 and C4 in windows of 2,048 tokens (CMoE, ExpertWeaver).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from typing import Any, ClassVar, Literal

from dyn.data.sources import JoinedText, TextSource

SHARED_BY_DEFAULT = {"sharing_inter": 1}  # constructions whose shared experts `from_dense` counts beside N; the calibrated ones keep k/N active in all


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """What the row is. `from_dense` explains the fields that it shares."""

    source: str = "meta-llama/Llama-2-7b-hf"  # folder, hub id, or a packaged model's name
    kind: Literal["moe", "prune", "oracle", "dense"] = "moe"  # prune: the control without routing; oracle: the best neurons of each token, a ceiling
    construction: str = "calibrated"
    num_experts: int = 32  # prune and oracle: num_experts_per_tok / num_experts is what they keep
    num_experts_per_tok: int = 16
    num_shared_experts: int | None = None  # of the plain constructions; they come on top of num_experts_per_tok
    score_scale: str | float | None = None
    budgets: bool = False  # num_experts_per_tok in the mean, by layer from measured divergences; prune by the same measurement of its own layers
    align_passes: int = 0  # over the calibration text, distilling the dense model's predictions into what was converted in closed form; prune alike
    align_rate: float = 1e-4  # of Adam

    def active(self) -> Fraction:
        """Share of the feed-forward's neurons that a token passes through."""
        if self.kind == "dense":
            return Fraction(1)
        shared = SHARED_BY_DEFAULT.get(self.construction, 0) if self.num_shared_experts is None else self.num_shared_experts
        shared = shared if self.kind == "moe" else 0
        return Fraction(self.num_experts_per_tok + shared, self.num_experts + shared)

    def what(self) -> str:
        """The row's network in words."""
        name = {"moe": self.construction, "prune": "prune", "oracle": "neuron oracle", "dense": "dense"}[self.kind]
        return name if self.kind == "dense" else f"{name}, {self.active()}" + self.more()

    def more(self) -> str:
        """What a row and its control have in common beside their size."""
        return (", budgets" if self.budgets else "") + (", distilled" if self.align_passes else "")

    def check(self) -> None:
        """ValueError for sizes that cannot be."""
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and num_experts={self.num_experts}")
        if self.num_shared_experts is not None and self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} must be at least 0")
        if self.budgets and (self.kind in ("oracle", "dense") or self.num_shared_experts is not None):
            raise ValueError(f"budgets=true needs kind=moe or prune and num_shared_experts=null, got {self.kind} and {self.num_shared_experts}")
        if self.align_passes < 0 or not 0 < self.align_rate < math.inf or (self.align_passes and self.kind in ("oracle", "dense")):
            raise ValueError(f"align_passes={self.align_passes} must be at least 0, and 0 for kind={self.kind} unless that is moe or prune; "
                             f"align_rate={self.align_rate} must be above 0")
        if self.kind != "moe" and (self.num_shared_experts is not None or self.score_scale is not None):
            raise ValueError(f"kind={self.kind} has no experts: num_shared_experts and score_scale must be null")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text: its training split calibrates, its held-out split is measured on where `texts` is empty. As in llama_moe_cpt."""

    text: TextSource = field(default_factory=lambda: TextSource(path="allenai/c4", domains=["en"], streaming=True, max_tokens=1_000_000,
                                                                max_validation_tokens=8192))
    bos: bool | str = True
    weights: str | dict[str, float] = "uniform"
    stand_for: dict[str, str] = field(default_factory=dict)
    block_size: int = 2048  # of what is measured on
    batch_size: int = 4
    validation_tokens: int = 262_144  # a domain; whole blocks
    cache: str | None = None
    filters: ClassVar[tuple[str, ...]] = ()  # what `load_corpus` asks beside these
    mask_documents: ClassVar[bool] = False


WIKITEXT = dict(name="wikitext2", path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test", joint="\n\n")
C4 = dict(name="c4", path="allenai/c4", config="en", split="validation", joint=" ", documents=1100, max_tokens=256 * 2048, streaming=True)


@dataclass(kw_only=True, slots=True)
class Config:
    """One conversion. `texts`, where there are any, are measured on in place of held-out domains: published perplexities and their conventions."""

    seed: int = 0  # of the calibration text that is drawn and of the construction
    calibration_tokens: int = 60_000
    calibration_length: int = 2048  # tokens a sequence
    leave_out: str | None = None  # a domain that calibration never sees
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32; medium: TF32 on GPU, oneDNN on CPU (bfloat16 where it has AMX)
    export: bool = True  # keep what was converted (moe, prune) as a folder for transformers
    diagnose: bool = True  # ceilings, gates and layers, with plots; costs about 2 passes a layer over diagnose_tokens
    diagnose_tokens: int = 8192  # of the held-out text, a block of every domain at least
    timing_rounds: int = 7
    control: str | None = None  # the row that a mixture is compared with; None: "prune, FRACTION"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    texts: list[JoinedText] = field(default_factory=lambda: [JoinedText(**WIKITEXT), JoinedText(**C4)])

    def control_row(self) -> str:
        """The same active neurons without routing."""
        return self.control or f"prune, {self.model.active()}" + self.model.more()

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        for name, least in {"calibration_length": 2, "diagnose_tokens": 2, "timing_rounds": 1, "seed": 0, "data.block_size": 2, "data.batch_size": 1,
                            "data.validation_tokens": 1}.items():
            if attrgetter(name)(self) < least:
                raise ValueError(f"{name}={attrgetter(name)(self)} must be at least {least}")
        if self.calibration_tokens < self.calibration_length:
            raise ValueError(f"calibration_tokens={self.calibration_tokens} are less than one sequence, calibration_length={self.calibration_length}")
        if self.model.align_passes and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype}: model.align_passes={self.model.align_passes} needs float32 weights")
        if len({text.name for text in self.texts}) < len(self.texts):
            raise ValueError(f"texts need names of their own, got {', '.join(text.name for text in self.texts)}")


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A sweep row: the network that `changes` say, whatever the profile has; `model__kind=...` means the key model.kind."""
    model = ModelConfig()
    fields = ("kind", "construction", "num_experts", "num_experts_per_tok", "num_shared_experts", "score_scale", "budgets", "align_passes", "align_rate")
    base = {f"model.{key}": getattr(model, key) for key in fields}
    base |= {"leave_out": None, "control": None, "export": False}
    return {"row": name} | base | {key.replace("__", "."): value for key, value in changes.items()}


def plain(name: str, active: str, routed: int, chosen: int, shared: int | None = None) -> dict[str, Any]:
    """A construction without calibration of weights, every chosen expert with weight 1: c = k. (The paper's c = N/k is a start for training.)"""
    return row(f"{name}, {active}", model__construction=name, model__num_experts=routed, model__num_experts_per_tok=chosen, model__num_shared_experts=shared,
               model__score_scale="k")


def fitted(name: str, active: str, suffix: str = "", **changes: Any) -> dict[str, Any]:
    """One that chooses its own shared part: k of 32 active in all; or the control and the ceiling of that size."""
    kind = {"model__kind": name} if name in ("prune", "oracle") else {"model__construction": name}
    label = {"oracle": "neuron oracle"}.get(name, name)
    return row(f"{label}, {active}{suffix}", model__num_experts_per_tok=int(32 * Fraction(active)), **kind, **changes)


HUB = {"meta-llama/Llama-2-7b-hf": "LLaMA-2-7B", "meta-llama/Meta-Llama-3-8B": "Llama-3-8B", "Qwen/Qwen2.5-7B": "Qwen2.5-7B",
       "HuggingFaceTB/SmolLM2-135M": "SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M": "SmolLM2-360M", "HuggingFaceTB/SmolLM2-1.7B": "SmolLM2-1.7B"}
FIELD: dict[str, Any] = dict(  # the field's setting in any profile; Qwen and SmolLM2 have no BOS of their own before documents, so none has one
    data__text__path="allenai/c4", data__text__domains=["en"], data__text__streaming=True, data__text__max_tokens=1_000_000,
    data__text__max_validation_tokens=8192, data__bos=False, data__weights="uniform", data__block_size=2048, data__batch_size=4,
    calibration_length=2048, calibration_tokens=60_000, dtype="bfloat16", texts=[WIKITEXT, C4])

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "step0": [made for active, k, (routed, chosen, shared) in (("3/4", 6, (6, 4, 2)), ("1/2", 4, (6, 2, 2)), ("1/4", 2, (7, 1, 1))) for made in (
        *(plain(name, active, 8, k) for name in ("random", "kmeans", "gradient")), plain("sharing_inter", active, routed, chosen, shared),
        *(fitted(name, active) for name in ("cmoe", "expert_weaver", "calibrated", "prune", "oracle")))],
    "seeds": [fitted(name, active, seed=seed) for active in ("1/2", "3/4", "1/4") for name in ("calibrated", "prune") for seed in (0, 1, 2)],
    "budgets": [fitted(name, active, ", budgets", model__budgets=True, seed=seed) for active in ("3/4", "1/2") for name in ("calibrated", "prune")
                for seed in (0, 1, 2)],
    "distilled": [fitted(name, active, ", budgets, distilled", model__budgets=True, model__align_passes=2, dtype="float32", seed=seed)
                  for active in ("3/4", "1/2") for name in ("calibrated", "prune") for seed in (0, 1, 2)],
    "unseen": [fitted(name, "1/2", ", docs unseen", leave_out="docs", control="prune, 1/2, docs unseen") for name in ("calibrated", "prune")],
    "finer": [row(f"calibrated, 1/2, {n} groups at most", model__construction="calibrated", model__num_experts=n, model__num_experts_per_tok=n // 2,
                  control="prune, 1/2") for n in (64, 96)] + [fitted("prune", "1/2")],
    "hub": [fitted(name, "1/2", f", {label}", model__source=source, control=f"prune, 1/2, {label}", **FIELD)
            for source, label in HUB.items() for name in ("calibrated", "prune")],
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Convert and measure; see `dyn.train.convert`."""
    from dyn.train.convert import convert

    return convert(cfg, run)


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.train.plan import plan_conversion

    return plan_conversion(cfg)
