"""What trainings on labelled examples share: the recipe's optimiser, counting, exact scores over a whole validation set, and how they are logged."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dyn.train.optim import RecipeConfig, recipe_optimizer, schedule
from dyn.train.settings import TrainerConfig
from dyn.train.task import Task


class Supervised(Task):
    """A training on examples with labels (`labels`, whose first axis is the batch), by a recipe.

    A subclass has `training_step`, `validation_step` and an `on_validation_epoch_end` that calls `report`.

    Logged every `cfg.log_every` optimiser steps, as means over micro-batches and ranks: what `training_step` records, train/grad_norm, lr, examples (seen so
    far, by all ranks). At validation: val/loss and val/<metric>; for several sets val/<set>/loss and val/<set>/<metric>, and val/loss as their mean.
    `val_metrics` has them all, `answers` what was said to every example.

    Args:
        net: the network, or a function that builds it, called in `configure_model`.
        optim: optimiser and schedule, over `cfg.max_steps`.
        sets: names of the validation sets, in the order of the validation loaders.
        cfg: precision, logging.
    """

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: RecipeConfig, sets: Sequence[str], cfg: TrainerConfig) -> None:
        super().__init__(net, optim, sets, cfg)
        self.examples = 0
        self.val_metrics: dict[str, float] = {}
        self.answers: dict[str, Any] = {}

    def configure_optimizers(self) -> dict[str, Any]:
        """The recipe, by optimiser step."""
        optimizer = recipe_optimizer(self.net, self.optim)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(self.optim, self.cfg.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def amount(self, batch: Mapping[str, Tensor]) -> int:
        """Examples."""
        return len(batch["labels"])

    def seen(self) -> dict[str, float]:
        """Examples."""
        return {"examples": self.examples}

    def resume_seen(self, seen: Mapping[str, float]) -> None:
        """Examples."""
        self.examples = seen["examples"]

    def step_metrics(self, sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Means."""
        return {key: value / count for key, value in sums.items()}

    def averages(self) -> dict[str, Tensor]:
        """Averaged tensors by their names in the net, where the training keeps such."""
        return {}

    def on_validation_epoch_start(self) -> None:
        """Rows by set, of this rank: what `validation_step` appends."""
        self._rows: list[list[Tensor]] = [[] for _ in self.domains]

    def table(self, place: int) -> Tensor:
        """The rows of a set that all ranks have appended, in the order of their first column, on the CPU. ValueError where there are none."""
        table = gathered(torch.cat(self._rows[place]).cpu())
        if not len(table):
            raise ValueError(f"validation data without a single label: {self.domains[place]}")
        return table[table[:, 0].argsort(stable=True)]

    def report(self, losses: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> None:
        """Take in and log the loss and the scores of every set."""
        several = len(self.domains) > 1
        self.val_losses, self.val_metrics = dict(losses), {}
        for name in self.domains:
            prefix = f"val/{name}/" if several else "val/"
            self.val_metrics |= {f"{prefix}loss": losses[name], **{f"{prefix}{key}": value for key, value in scores[name].items()}}
        self.val_metrics["val/loss"] = math.fsum(losses.values()) / len(self.domains)
        self.log_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in self.val_metrics.items()}, logger=False)
        for logger in self.loggers:
            logger.log_metrics({**self.seen(), **self.val_metrics}, self.trainer.global_step)

    def val_line(self) -> str:
        """All metrics."""
        return "validation " + ", ".join(f"{key.removeprefix('val/')} {value:.4f}" for key, value in self.val_metrics.items())

    def about(self) -> dict[str, Any]:
        """The names and shapes of the net's tensors: classes tell little."""
        shapes = ";".join(f"{name} {tuple(value.shape)}" for name, value in self.net.state_dict().items())
        return {"tensors": zlib.crc32(shapes.encode())}


def gathered(rows: Any) -> Any:
    """The rows of all ranks: of a tensor or of a list."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return torch.cat(parts) if isinstance(rows, Tensor) else [row for part in parts for row in part]
