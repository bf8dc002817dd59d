"""What is trained: classification of images and of sentences, and regression on sentences.

B examples a batch, C classes, N examples of a validation set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from dyn.data.images import mixing
from dyn.data.loader import counts
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig
from dyn.train.supervised import Supervised

_NOT_INPUTS = ("labels", "index")

METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "matthews": lambda classes: BinaryMatthewsCorrCoef() if classes == 2 else MulticlassMatthewsCorrCoef(classes),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}


class Answers(NamedTuple):
    """What a net said to the N examples of a validation set, in their order: float64 or int64 [N] on the CPU."""

    index: Tensor
    predictions: Tensor
    labels: Tensor


def make_metrics(names: Sequence[str], num_labels: int) -> MetricCollection:
    """Metrics by name, for predictions (classes, or real numbers for num_labels 1) and labels. ValueError for a name that does not fit."""
    real = ("pearson", "spearman")
    for name in names:
        if name not in METRICS or (name in real) is not (num_labels == 1):
            fitting = [n for n in METRICS if (n in real) is (num_labels == 1)]
            raise ValueError(f"metric {name!r} does not fit {num_labels} labels; allowed: {', '.join(fitting)}")
    # Ranks bring their answers together before, so that metrics see each example once: nothing is left to synchronise.
    metrics = {name: METRICS[name](num_labels) for name in names}
    for metric in metrics.values():
        metric.sync_on_compute = False
    return MetricCollection(metrics, compute_groups=False)


class Classifier(Supervised):
    """Cross-entropy on images or sentences, or mean squared error for one label.

    Batches have `images`, or the named inputs of an encoder, and `labels` [B]; those that do not count (`dyn.data.loader.blank`) are left out. The net maps
    images, or the inputs by name, to logits [B, C] or to an output with `logits`; an `aux_loss` in the output (a balance loss, already weighted) is added.

    Logged: train/loss, train/task_loss and train/aux_loss where there is such a part, and as in `Supervised`. `answers` are `Answers`.

    Args:
        net: the network, or a function that builds it, called in `configure_model`.
        optim: optimiser and schedule, over `cfg.max_steps`.
        sets: names of the validation sets, in the order of the validation loaders.
        cfg: precision, logging.
        num_labels: C; 1: regression.
        metrics: names of METRICS, the leading one first.
        classify: smoothing, mixing, averaging, memory format.

    Raises:
        ValueError: metrics that do not fit, settings that exclude each other, an output that FSDP2 cannot look into.
    """

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: RecipeConfig, sets: Sequence[str], cfg: TrainerConfig, *, num_labels: int,
                 metrics: Sequence[str] = ("accuracy",), classify: ClassifyConfig | None = None) -> None:
        super().__init__(net, optim, sets, cfg)
        self.classify = ClassifyConfig() if classify is None else classify
        mixed = self.classify.mixup or self.classify.cutmix
        if num_labels == 1 and (mixed or self.classify.label_smoothing):
            raise ValueError("mixup, cutmix and label smoothing need classes; this is a regression (num_labels=1)")
        self.num_labels, self.metrics = num_labels, list(metrics)
        make_metrics(self.metrics, num_labels)  # refuses now what would not fit after the first training steps
        self._mix = mixing(num_labels, mixup=self.classify.mixup, cutmix=self.classify.cutmix, label_smoothing=self.classify.label_smoothing) if mixed else None
        self.average = nn.Module()  # holds the averaged tensors as buffers: moved, saved and loaded with everything else

    def configure_model(self) -> None:
        """As every task; then memory format, the average, compilation."""
        if self._configured:
            return
        if self.device_mesh is not None and self.classify.ema:
            raise ValueError("classify.ema needs whole weights on every process: it goes with trainer.strategy single and ddp, not fsdp2")
        super().configure_model()
        if self.classify.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if self.classify.ema:
            for name, tensor in self._averaged().items():
                self.average.register_buffer(_key(name), tensor.detach().clone())
        # Of no use to send around in every step: what every process has alike by itself (DDP reads this name).
        self._ddp_params_and_buffers_to_ignore = [f"average.{_key(name)}" for name, p in self.net.named_parameters() if self.classify.ema and p.requires_grad]
        self._ddp_params_and_buffers_to_ignore += [name for name, b in self.named_buffers() if b.dtype == torch.bool]
        if self.classify.compile:
            self.net.compile()

    # Training

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; Lightning divides by their number."""
        targets = batch["labels"]
        self.examples += self.amount(batch) * self.trainer.world_size
        if self._mix is not None:
            images, targets = self._mix(batch["images"].clone(), targets)  # it mixes in place
            batch = {**batch, "images": images}
        logits, aux = self._forward(batch)
        loss = task_loss = self._loss(logits, targets, 0.0 if self._mix is not None else self.classify.label_smoothing).mean()
        if aux is not None:
            loss = task_loss + aux
        self.record(**{"train/loss": loss, "train/task_loss": None if aux is None else task_loss, "train/aux_loss": aux})
        return loss

    @torch.no_grad()
    def stepped(self, sums: dict[str, Tensor]) -> set[str]:
        """Move the average, at first faster, so that a short training is not held at its beginning."""
        if self.classify.ema:
            step = self.trainer.global_step + 1
            decay = min(self.classify.ema, (1 + step) / (10 + step))
            for name, now in self._averaged().items():
                self.average.get_buffer(_key(name)).lerp_(now, 1 - decay)
        return set()

    def averages(self) -> dict[str, Tensor]:
        """The averaged tensors by their names in the net; empty without `classify.ema`. The rest of the net is as it is."""
        return {name: self.average.get_buffer(_key(name)) for name in self._averaged()} if self.classify.ema else {}

    def _averaged(self) -> dict[str, Tensor]:
        """What is averaged: trained parameters and batch statistics. Masks, temperatures and the like hold as they are, not as they were."""
        statistics = {f"{path}.{name}".lstrip("."): getattr(norm, name) for path, norm in self.net.named_modules()
                      if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats for name in ("running_mean", "running_var")}
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad} | statistics

    def _forward(self, batch: Mapping[str, Tensor], tensors: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C], and the auxiliary loss where there is one; of the net with `tensors` in place of its own of these names."""
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        args = (inputs.pop("images"),) if "images" in inputs else ()
        if args and self.classify.channels_last:
            args = (args[0].contiguous(memory_format=torch.channels_last),)
        out = functional_call(self.net, tensors, args, inputs) if tensors else self.net(*args, **inputs)
        if self.device_mesh is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            # FSDP2 hangs its hooks on the tensors it finds in the output; where it finds none, each rank would silently train on its own gradients.
            raise ValueError(f"{type(self.net).__name__} gives a {type(out).__name__}, in which FSDP2 sees no tensors; give a tensor or a "
                             "ModelOutput of transformers, or train with trainer.strategy single or ddp")
        return (out, None) if isinstance(out, Tensor) else (out.logits, getattr(out, "aux_loss", None))

    def _loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """By example, [B]."""
        if self.num_labels == 1:
            return (logits.float().squeeze(-1) - targets).square()
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction="none")

    # Validation

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Keeps what the net, or its average, says; without smoothing and auxiliary losses."""
        wanted = counts(batch["labels"])
        logits, _ = self._forward(batch, self.averages())
        logits, labels, index = logits[wanted], batch["labels"][wanted], batch["index"][wanted]
        predictions = logits.squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)
        self._rows[dataloader_idx].append(torch.stack([v.double() for v in (index, predictions, labels, self._loss(logits, labels, 0.0))], 1))
        return {}

    def on_validation_epoch_end(self) -> None:
        """Exact metrics over all examples, each once, whichever rank saw it."""
        losses, scores = {}, {}
        for place, name in enumerate(self.domains):
            table = self.table(place)
            index, predictions, labels = table[:, 0].long(), table[:, 1], table[:, 2]
            if self.num_labels > 1:
                predictions, labels = predictions.long(), labels.long()
            self.answers[name] = Answers(index, predictions, labels)
            losses[name] = table[:, 3].mean().item()
            scores[name] = {key: float(value) for key, value in make_metrics(self.metrics, self.num_labels)(predictions, labels).items()}
        self.report(losses, scores)

    def about(self) -> dict[str, Any]:
        """The task and its settings too."""
        return super().about() | {"num_labels": self.num_labels, "classify": dataclasses.asdict(self.classify)}


def _key(name: str) -> str:
    return name.replace(".", "|")  # a buffer's name may hold no dot
