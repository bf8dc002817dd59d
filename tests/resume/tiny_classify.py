"""Tiny classifications for the tests beside this file, as tiny_training.py: of images, with everything that could go astray, of sentences, and of
sentences by a partially dynamic mixture of experts."""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tiny_training import start as start_training
from tiny_training import trainer_config
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import ModelOutput

from dyn.data.images import ArrayImages
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_pictures
from dyn.models.encoder import make_moe
from dyn.nn.partial import make_partial
from dyn.runfolder import Run
from dyn.train.annealing import KeepMask, Temperature
from dyn.train.classify import Classifier
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig
from dyn.train.trainer import fit, make_trainer, world


@dataclass
class Config:
    kind: str = "images"
    batch_size: int = 4
    workers: int = 0
    plain: bool = False  # without dropout and mixing
    trainer: TrainerConfig = field(default_factory=trainer_config)


class Attentive(nn.Module):
    """A CNN with batch statistics, dropout, a pruned convolution and a gate that has a temperature."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.second = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 2)
        self.gate, self.dropout, self.classifier = nn.Linear(6, 6), nn.Dropout(dropout), nn.Linear(6, 3)
        self.temperature = math.nan
        self.register_buffer("mask", torch.rand(self.second.weight.shape) < 0.5)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = self.second(x).relu().mean((2, 3))
        return self.classifier(self.dropout(x * (self.gate(x) / self.temperature).softmax(-1)))

    def keep(self) -> None:
        self.second.weight.data.mul_(self.mask)

    def warm(self, temperature: float) -> None:
        self.temperature = temperature


class Sentences:
    """Random ids of random lengths with real-valued labels."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(2, 12, count)
        self.ids = torch.from_numpy(rng.integers(1, 30, (count, 12)) * (np.arange(12) < self.lengths[:, None]))
        self.labels = self.ids.float().mean(1) / 5

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: np.ndarray, draw: object) -> dict[str, Tensor]:
        ids = self.ids[index][:, : self.lengths[index].max()]
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": self.labels[index]}


@dataclass
class Said(ModelOutput):
    logits: Tensor | None = None
    aux_loss: Tensor | None = None


class Reader(nn.Module):
    """A transformer layer with dropout, and a balance loss."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(30, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.classifier = nn.Linear(8, 1)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Said:
        x = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return Said(logits=self.classifier(x[:, 0]), aux_loss=0.01 * x.square().mean())


def encoder(dropout: float, plain: bool) -> nn.Module:
    """A BERT with partially dynamic experts: noisy gates, masks, static values, scale factors, a balance loss."""
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                                   max_position_embeddings=16, num_labels=1, hidden_dropout_prob=dropout))
    make_moe(net, 4, 2, noise=0.1, gate_noise=not plain, balance_weight=0.1)
    return make_partial(net, None, None, keep=0.5, method="random")


def train(run: Run, cfg: Config) -> tuple[Classifier, dict[str, float]]:
    rank, size = world(cfg.trainer)
    optim, dropout = RecipeConfig(lr=1e-2, head_lr=2e-2, warmup_steps=2), 0.0 if cfg.plain else 0.2
    if cfg.kind == "images":
        data, held = (ArrayImages(*tiny_pictures(count, seed=seed), [0.5] * 3, [0.25] * 3, pad=2, flip=True) for count, seed in ((26, 1), (10, 2)))
        net = Attentive(dropout)
        classify = ClassifyConfig(ema=0.9, **({} if cfg.plain else dict(mixup=0.3, label_smoothing=0.1)))
        task = Classifier(net, optim, ["held"], cfg.trainer, num_labels=3, metrics=("accuracy", "f1"), classify=classify)
        callbacks = [KeepMask(net.keep), Temperature(lambda step: max(1.0, 30.0 - 3 * step), net.warm, log_every=1)]
    else:
        data, held = Sentences(26, 1), Sentences(10, 2)
        net = functools.partial(encoder, dropout, cfg.plain) if cfg.kind == "moe" else functools.partial(Reader, dropout)
        task = Classifier(net, optim, ["held"], cfg.trainer, num_labels=1, metrics=("pearson", "spearman"))
        callbacks = []
    loader = ResumableLoader(data, batch_size=cfg.batch_size, num_batches=cfg.trainer.max_steps * cfg.trainer.accumulate, seed=5, rank=rank, world_size=size,
                             lengths=getattr(data, "lengths", None), workers=cfg.workers, drop_last=cfg.kind == "images")
    losses = fit(make_trainer(cfg.trainer, run, callbacks), task, loader, {"held": EvaluationLoader(held, 3)})
    return task, losses | task.val_metrics


def start(runs: Path, words: list[str]) -> None:
    start_training(runs, words, Config(), train)
