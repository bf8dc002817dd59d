"""A tiny masked training for the test beside this file, as tiny_training.py: a pruned Houlsby adapter on a tiny BERT, with dropout and a head."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_classify import Sentences
from tiny_training import start as start_training
from tiny_training import trainer_config
from transformers import BertConfig, BertForSequenceClassification

from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.nn.adapter import attach
from dyn.nn.masking import apply_masks, dense_weights, mask_hash, masks, prune
from dyn.runfolder import Run
from dyn.train.annealing import KeepMask
from dyn.train.classify import Classifier
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig
from dyn.train.trainer import fit, make_trainer, world


@dataclass
class Config:
    form: str = "mask"
    batch_size: int = 4
    clip: float = 0.0
    dropout: float = 0.1
    ema: float = 0.0
    mixing: bool = False  # an optimiser that mixes elements
    trainer: TrainerConfig = field(default_factory=trainer_config)


class Mixing(torch.optim.SGD):
    """Adds the mean of every tensor to its elements."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(1e-3)
        return loss


class Task(Classifier):
    mixing = False

    def configure_optimizers(self):
        return Mixing(self.net.parameters(), lr=0.1) if self.mixing else super().configure_optimizers()


def build(cfg: Config, scoring: list) -> BertForSequenceClassification:
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1, max_position_embeddings=16,
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout))
    attach(net, "houlsby", r=8, seed=1)
    return prune(net, scoring, lambda m, b: F.mse_loss(m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 0], b["labels"]), keep=0.4,
                 form=cfg.form)


def train(run: Run, cfg: Config):
    rank, size = world(cfg.trainer)
    data, held = Sentences(26, 1), Sentences(10, 2)
    scoring = list(EvaluationLoader(data, 13))
    found = []

    def build_here() -> BertForSequenceClassification:
        net = build(cfg, scoring)
        found.append(mask_hash(masks(net)))
        return net

    task = Task(build_here, RecipeConfig(lr=1e-2, warmup_steps=2, clip=cfg.clip), ["held"], cfg.trainer, num_labels=1, metrics=("pearson",),
                classify=ClassifyConfig(ema=cfg.ema))
    task.mixing = cfg.mixing
    loader = ResumableLoader(data, batch_size=cfg.batch_size, num_batches=cfg.trainer.max_steps * cfg.trainer.accumulate, seed=5, rank=rank, world_size=size,
                             lengths=data.lengths)
    callbacks = [KeepMask(lambda: apply_masks(task.net))] if cfg.mixing else []
    losses = fit(make_trainer(cfg.trainer, run, callbacks), task, loader, {"held": EvaluationLoader(held, 3)})
    there = masks(task.net)
    weights = dense_weights(task.net)  # together: sharded ones are gathered
    stored = {key: p.full_tensor() if hasattr(p := task.net.get_parameter(key), "full_tensor") else p for key in there}
    dead = max(float((stored[key] if cfg.form == "mask" else weights[key])[~mask].abs().max()) for key, mask in there.items())
    report = {"masks": found, "after": mask_hash(there), "dead": dead, "kept": sum(int(m.sum()) for m in there.values()),
              "alive": sum(int(w.count_nonzero()) for w in weights.values()), "sum": sum(w.double().abs().sum().item() for w in weights.values())}
    (run.folder / f"masks-{rank}.json").write_text(json.dumps(report))
    return task, losses | task.val_metrics


def start(runs: Path, words: list[str]) -> None:
    start_training(runs, words, Config(), train)
