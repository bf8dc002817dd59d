"""Settings of a training, apart from Lightning, so that reading and checking a configuration stays quick."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How long, how often, on what. A step is an optimiser step."""

    max_steps: int = 13_623  # section 4.4: 200 B tokens
    accumulate: int = 1  # micro-batches a step
    precision: Literal["bf16-mixed", "bf16-true", "32-true"] = "bf16-mixed"  # bf16-true: weights and optimiser moments in bfloat16 too
    gradient_checkpointing: bool = False
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1  # a node
    num_nodes: int = 1
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"  # auto: DDP on one node, FSDP2 over several
    log_every: int = 5  # steps, as are the next two
    val_every: int = 340  # 0: only at the end
    checkpoint_every: int = 340  # 0: only at the end
    keep_checkpoints: int = 2
    val_first: bool = True  # validate before the first step
    progress_seconds: float = 15.0  # between lines, where there is no terminal
    seed: int = 1227
    deterministic: bool = False  # torch's deterministic algorithms, for bitwise resume on GPUs; slower
    peak_flops: float | None = None  # of one device, for MFU; None: data sheet, or measured
    wandb: bool = False
    wandb_project: str = "dyn"

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulate", "devices", "num_nodes", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least 1")
        for name in ("val_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least 0")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"trainer.peak_flops={self.peak_flops} must be above 0, or null")
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError(f"trainer.strategy=single fits one process, not devices={self.devices} x num_nodes={self.num_nodes}; allowed: auto, ddp, fsdp2")

    @property
    def world_size(self) -> int:
        """Processes, one a device."""
        return self.devices * self.num_nodes

    @property
    def kind(self) -> str:
        """The strategy that is meant: single, ddp or fsdp2. One process has nothing to shard."""
        if self.world_size == 1 and self.strategy != "ddp":
            return "single"
        return self.strategy if self.strategy != "auto" else "ddp" if self.num_nodes == 1 else "fsdp2"

    @property
    def dtype(self) -> torch.dtype:
        """That matrix products run in."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """Learning from the dense parent's next-token distribution beside the text: loss = (1 - weight) cross-entropy + weight KL (`dyn.core.distill`)."""

    weight: float = 0.0  # 0: plain training, without a cache
    top_k: int = 32  # of the parent's distribution that are kept a token; the rest counts as one bucket
    cache: str | None = None  # of the parent's logits, any fsspec address; None: below the user's cache folder
    batch_size: int = 8  # sequences that the parent reads at a time

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"distill.weight={self.weight} must lie in [0, 1]")
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True, slots=True)
class AnswerConfig:
    """How spans are read from a network that points at their ends."""

    max_answer: int = 30  # tokens of an answer
    n_best: int = 20  # spans that are kept a window, and then a question
    null_threshold: float = 0.0  # where questions may have no answer: what a span's score must lie above the null score, less this

    def __post_init__(self) -> None:
        for name in ("max_answer", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"answer.{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """How a sequence-to-sequence network is trained beside its optimiser, and how it writes at validation; the defaults are XSum's (section 4.2)."""

    label_smoothing: float = 0.1
    num_beams: int = 6
    max_length: int = 60  # tokens, those that the network begins with included
    min_length: int = 10
    no_repeat_ngram: int = 3  # no run of so many tokens comes twice; 0: it may
    length_penalty: float = 1.0  # a beam's log-probability is divided by its length to this power

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"generate.label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.num_beams < 1 or self.no_repeat_ngram < 0 or not 0 <= self.min_length < self.max_length:
            raise ValueError(f"generate.num_beams={self.num_beams} must be at least 1, no_repeat_ngram={self.no_repeat_ngram} at least 0, and "
                             f"min_length={self.min_length} between 0 and max_length={self.max_length}")


@dataclass(kw_only=True, slots=True)
class ClassifyConfig:
    """How a classification is trained, beside its optimiser."""

    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha; images only, as is the next
    cutmix: float = 0.0  # alpha
    ema: float = 0.0  # decay of a running average of the weights, which validation then looks at; 0: none
    channels_last: bool = False  # images and convolutions
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"classify.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"classify.{name}={getattr(self, name)} must be at least 0")


def check_trainings(cfg: Any, **least: int) -> None:
    """ValueError for settings of an experiment on labelled examples that cannot be, before anything is loaded.

    `cfg` has seed, epochs, minutes, batch_size, eval_batch_size, workers and trainer; `least`: the smallest values of more of its fields (which may be null).
    """
    for name, value in ({"batch_size": 1, "eval_batch_size": 1, "workers": 0, "seed": 0} | least).items():
        if (found := getattr(cfg, name)) is not None and found < value:
            raise ValueError(f"{name}={found} must be at least {value}")
    if cfg.epochs <= 0 or (cfg.minutes is not None and cfg.minutes <= 0):
        raise ValueError(f"epochs={cfg.epochs} and minutes={cfg.minutes} must be above 0")
    for name, instead in {"max_steps": "epochs", "seed": "seed"}.items():
        if getattr(cfg.trainer, name) != getattr(TrainerConfig(), name):
            raise ValueError(f"trainer.{name}={getattr(cfg.trainer, name)} would be ignored by this experiment; set {instead}")
    if cfg.minutes is not None and cfg.trainer.world_size > 1:
        raise ValueError(f"minutes={cfg.minutes} is for one device; give epochs for {cfg.trainer.world_size}")
    if getattr(cfg.data, "tuning", 0) and not hasattr(cfg, "rates"):
        raise ValueError(f"data.tuning={cfg.data.tuning} holds examples out for choosing learning rates, which this experiment does not; set 0")
    if (mix := getattr(cfg, "classify", None)) and (mix.mixup or mix.cutmix) and not hasattr(cfg.data, "size"):
        raise ValueError(f"classify.mixup={mix.mixup} and classify.cutmix={mix.cutmix} mix images, and these examples are none; set 0")
    if cfg.trainer.kind == "fsdp2":
        raise ValueError("these networks fit a device: set trainer.strategy=ddp")


def check_tasks(cfg: Any, known: Iterable[str]) -> None:
    """ValueError for an experiment's `tasks` that are none of `known` or docstrings, or come twice, and for a `data.task` beside them."""
    allowed = (*known, "docstrings")
    if wrong := [task for task in cfg.tasks if task not in allowed]:
        raise ValueError(f"tasks={wrong[0]} is unknown; allowed: {', '.join(allowed)}")
    if not cfg.tasks or len(set(cfg.tasks)) < len(cfg.tasks) or cfg.data.task != type(cfg.data)().task:
        raise ValueError(f"tasks={cfg.tasks}: at least one, each once; data.task={cfg.data.task} would be ignored")


def check_beside(cfg: Any) -> None:
    """ValueError for methods in an experiment's `beside` that come twice, or are its `model`'s own."""
    if len({*cfg.beside, cfg.model.method}) <= len(cfg.beside):
        raise ValueError(f"beside={cfg.beside} must be methods other than model.method={cfg.model.method}, each once")


def seeded_rows(part: str, networks: Iterable[Any], seeds: Iterable[int], suffix: str = "", leave_out: Iterable[str] = (), **more: Any) -> list[dict[str, Any]]:
    """Sweep rows for every seed and network (a dataclass, the config's field `part`), each named by its `what()`; networks of one name are one.

    leave_out: fields that rows take from the profile. more: other keys, a__b for a.b.
    """
    named, more = {network.what(): network for network in networks}, {key.replace("__", "."): value for key, value in more.items()}
    return [{"row": what + suffix, "seed": seed, "beside": [], "minutes": None, "export": False}
            | {f"{part}.{f.name}": getattr(network, f.name) for f in fields(network) if f.name not in leave_out} | more
            for seed in seeds for what, network in named.items()]
