"""PAD-Net on images: static, dynamic and partially dynamic convolutional networks (ACL 2023; docs/padnet.md).

The defaults are the recipe of the official code for ResNet-50 on ImageNet, 30 % dynamic: section numbers are those of the specification in docs/padnet.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from dyn.data.images import ImageSource
from dyn.train.optim import RecipeConfig
from dyn.train.padnet import PartitionConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig, check_beside, check_trainings, seeded_rows

Method = Literal["static", "dyconv", "condconv", "odconv", "pad"]
LABELS = {"static": "static", "dyconv": "DY-Conv", "condconv": "CondConv", "odconv": "ODConv", "pad": "PAD"}


@dataclass(kw_only=True, slots=True)
class ModelConfig(PartitionConfig):
    """What is trained. `make_dynamic` explains the fields that they share, `PartitionConfig` and `make_partial` those of mode partition (section 4): 30 % stay
    dynamic, found by SNIP in 3 rounds, and what turns static is drawn afresh."""

    backbone: str = "resnet50"  # of timm, or resnet10; auto: resnet10 on a CPU, resnet50 on a GPU
    stem: Literal["auto", "imagenet", "stride1", "stride2"] = "imagenet"  # auto: for small images stride2 on a CPU, stride1 on a GPU
    method: Method = "pad"
    num_kernels: int = 4
    reduction: int = 16  # section 1.2; the original DY-Conv has 4
    pretrained: bool = False  # begin with timm's weights
    dropout: float = 0.0
    temperature: float = 30.0  # of DY-Conv's and ODConv's attention at the first step, falling to 1 in a straight line (section 1.3)
    temperature_share: float = 1 / 6  # of all steps until it is 1; 15 of 90 epochs
    partition_temperature: float = 31.0

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        self.check_partition(num_kernels=1, reduction=1, temperature=1)
        if self.partition_temperature <= 0:
            raise ValueError(f"partition_temperature={self.partition_temperature} must be above 0")
        for name in ("temperature_share", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.pretrained and self.stem != "imagenet":
            raise ValueError(f"pretrained=true keeps the stem that the weights are for: stem={self.stem} must be imagenet")

    def what(self) -> str:
        """The network in words, as rows are called: a row and its controls are found by these."""
        if self.method == "static":
            return "static"
        usual = ModelConfig().temperature_share
        anneal = [] if self.method == "condconv" or self.temperature_share == usual else [f"temperature_share {self.temperature_share:.4g}"]
        if self.method != "pad":
            return ", ".join([LABELS[self.method], f"K = {self.num_kernels}", *anneal])
        return ", ".join([f"PAD {self.keep:.4g}, K = {self.num_kernels}", *self.words(*anneal)])

    def fully_dynamic(self) -> list[ModelConfig]:
        """What a partially dynamic network is compared with: the usual one, and that of about its storage."""
        sizes = (4, round(1 + (self.num_kernels - 1) * self.keep))
        return [dataclasses.replace(self, method="dyconv", num_kernels=k) for k in sizes if k > 1]


@dataclass(kw_only=True, slots=True)
class Config:
    """Section 5.1: SGD with momentum, weight decay on everything, 256 images a step, 90 epochs, label smoothing 0.1."""

    seed: int = 0
    epochs: float = 90.0
    images: int | None = None  # to train each network on, repeats counted, in place of epochs
    minutes: float | None = None  # for all trainings of the run: fewer steps where these do not fit, decided once from measured steps
    batch_size: int = 32  # images a device and micro-batch; 256 over 8 devices
    eval_batch_size: int = 128
    workers: int = 8  # processes that read images
    beside: list[Method] = field(default_factory=list)  # networks that are trained in the same run, on the same batches
    timing_batch: int = 32
    timing_rounds: int = 7
    compact_images: int | None = None  # validation images on which the compact form is compared with the trained one; None: all
    export: bool = True  # keep the trained network as safetensors (partially dynamic ones in compact form)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImageSource = field(default_factory=ImageSource)  # auto_augment, erase: timm's augmentation (not in the official recipe)
    optim: RecipeConfig = field(default_factory=lambda: RecipeConfig(optimizer="sgd", lr=0.1, weight_decay=1e-4, decay_all=True, schedule="step",
                                                                     milestones=(1 / 3, 2 / 3, 8 / 9), clip=0.0))
    classify: ClassifyConfig = field(default_factory=lambda: ClassifyConfig(label_smoothing=0.1, channels_last=True, compile=True))  # ema: an option
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(devices=8, val_first=False, val_every=5005, checkpoint_every=5005, log_every=50))

    def images_per_step(self) -> int:
        """Over all devices and micro-batches."""
        return self.batch_size * self.trainer.accumulate * self.trainer.world_size

    def steps(self, images: int) -> int:
        """Optimiser steps in the epochs (what fills no batch at an epoch's end is left out), or in `self.images`."""
        if self.images is not None:
            return self.images // self.images_per_step()
        return math.floor(self.epochs * (images // (self.batch_size * self.trainer.world_size)) / self.trainer.accumulate)

    def check(self) -> None:
        """ValueError for settings that cannot be, before anything is loaded."""
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: batch norm needs at least 2 images to have a variance")
        if (self.classify.mixup or self.classify.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size}: classify.mixup and classify.cutmix mix pairs of images, so it must be even")
        if self.trainer.precision == "bf16-true" or self.trainer.gradient_checkpointing:
            raise ValueError(f"trainer.precision={self.trainer.precision}, trainer.gradient_checkpointing={self.trainer.gradient_checkpointing}: convolutional "
                             "networks take bf16-mixed or 32-true, and no checkpointing")
        check_trainings(self, timing_batch=1, timing_rounds=1, compact_images=1)
        check_beside(self)


def rows(*changes: dict[str, Any], suffix: str = "", **more: Any) -> list[dict[str, Any]]:
    """Sweep rows for three seeds, a network for each of `changes` to the paper's; `more` as in `seeded_rows`."""
    return seeded_rows("model", (ModelConfig(**change) for change in changes), range(3), suffix, ("backbone", "stem", "dropout", "pretrained"), **more)


STATIC, DY4, DY3, DY2 = dict(method="static"), *(dict(method="dyconv", num_kernels=k) for k in (4, 3, 2))
SAME_STORAGE = [dict(num_kernels=k, keep=keep) for k, keep in ((2, 0.9), (4, 0.3), (8, 0.9 / 7), (16, 0.06))]  # 1 + (K - 1) keep = 1.9 times the static weights
CPU = dict(  # what one CPU core does in less than 8 minutes a row: a part of CIFAR-10, few epochs
    model__backbone="resnet10", model__stem="stride2", model__batches=5, data__path="uoft-cs/cifar10", data__train_limit=10_000, data__validation_limit=2_000,
    epochs=3.5, batch_size=64, workers=0, optim__lr=0.05, trainer__precision="bf16-mixed", trainer__val_every=156, trainer__checkpoint_every=0,
    compact_images=500, timing_rounds=5)

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "methods": rows(STATIC, dict(method="condconv", num_kernels=8), DY4, DY2, dict(method="odconv"), dict(method="odconv", num_kernels=1), {}),
    "keep": rows(STATIC, *(dict(keep=share / 10) for share in range(1, 11)), DY4, DY3, DY2),
    "partition": rows(*(dict(criterion=c, rounds=r, shuffle=s) for c, r in (("random", 3), ("magnitude", 3), ("snip", 1), ("snip", 3), ("snip", 10))
                        for s in (False, True)), dict(static="mean"), STATIC, DY4, DY2),
    "scales": rows({}, dict(scales="s"), dict(scales="d"), dict(scales="none"), STATIC, DY4, DY2),
    "pruning": rows(dict(scales="none"), dict(scales="prune"), {}, STATIC, DY4, DY2),
    "kernels": rows(*SAME_STORAGE, STATIC, DY4, DY2),
    "cpu": rows(STATIC, DY4, {}, DY2, suffix=", part of CIFAR-10", **CPU),
    "temperature": rows(*(change | dict(temperature_share=share) for share in (1 / 6, 1.0) for change in (DY4, {}, DY2)), STATIC,
                        suffix=", part of CIFAR-10", **CPU),
}


def main(cfg: Config, run: Any) -> dict[str, Any]:
    """Partition, train, compact, measure; see `dyn.train.convnet`."""
    from dyn.train.convnet import train_convnets

    return train_convnets(cfg, run)


def plan(cfg: Config) -> dict[str, Any]:
    """What the run would be, from shapes alone."""
    from dyn.train.plan_convnet import plan_convnets

    return plan_convnets(cfg)
