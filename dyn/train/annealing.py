"""What a training changes by schedule or mends after each step: temperatures of attention over kernels (and what became of it), rounds of pruning, masks of
pruned weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dyn.nn.surgery import attention_entropy
from dyn.train.callbacks import Throughput


class Temperature(Callback):
    """Sets a temperature before every optimiser step, by a schedule of the step (from 0).

    Since the step alone decides, a resumed training goes on with the right one. Logged as train/temperature every `log_every` steps.

    Args:
        schedule: step -> temperature.
        apply: puts a temperature into the net.
        log_every: optimiser steps; 0: never.
    """

    def __init__(self, schedule: Callable[[int], float], apply: Callable[[float], None], log_every: int = 0) -> None:
        self.schedule, self.apply, self.log_every = schedule, apply, log_every
        self._step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where training begins or goes on, before a validation there: that of the step before, as if nothing had happened in between."""
        self._step = None
        self.apply(self.schedule(max(trainer.global_step - 1, 0)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first micro-batch of a step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.apply(self.schedule(self._step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, with the number that the step's other metrics bear."""
        done = self._step is not None and trainer.global_step == self._step + 1
        if self.log_every and done and trainer.global_step % self.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"train/temperature": self.schedule(self._step)}, trainer.global_step)


class AttentionEntropy(Callback):
    """Looks at the attention over kernels at every validation (`dyn.nn.surgery.attention_entropy`); the layers' mean is logged as attention/entropy.

    `layers`: the newest, by layer.

    Args:
        images: what the network is shown, [B, C, H, W].
        compiled: the network is, which hooks cannot look into.
    """

    def __init__(self, images: Tensor, compiled: bool = False) -> None:
        self.images, self.compiled = images, compiled
        self.layers: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See the class."""
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            self.layers = attention_entropy(pl_module.net, self.images.to(pl_module.device))
        for logger in trainer.loggers if self.layers else ():
            logger.log_metrics({"attention/entropy": statistics.fmean(self.layers.values())}, trainer.global_step)


class Rounds(Callback):
    """Prunes further before given optimiser steps. Masks are part of a checkpoint, so that a resumed training goes on with the right ones.

    Args:
        steps: before which, from 0; the first is round 1.
        apply: (round, optimiser) -> kept share, which is logged as train/keep.
    """

    def __init__(self, steps: Sequence[int], apply: Callable[[int, torch.optim.Optimizer], float]) -> None:
        self.rounds, self.apply = {step: number for number, step in enumerate(steps, 1)}, apply
        self._done: int | None = None
        self.seconds = 0.0  # that rounds took

    def state_dict(self) -> dict[str, float]:
        """The seconds."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting."""
        self.seconds = state["seconds"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the first micro-batch of a step."""
        step = trainer.global_step
        if step != self._done and step in self.rounds:
            began = time.monotonic()
            self._done, keep = step, self.apply(self.rounds[step], trainer.optimizers[0])
            self.seconds += (took := time.monotonic() - began)
            next(c for c in trainer.callbacks if isinstance(c, Throughput)).skip(took)
            for logger in trainer.loggers:
                logger.log_metrics({"train/keep": keep}, step)


class KeepMask(Callback):
    """Calls `apply` right after every step of the optimisers, so that no weight average, checkpoint or validation sees what they did to pruned weights.

    For optimisers that mix the elements of a tensor (Muon, Rprop); Adam and SGD leave exact zeros alone.

    Args:
        apply: puts the masks on again, in place: `lambda: dyn.nn.masking.apply_masks(net)`.
    """

    def __init__(self, apply: Callable[[], None]) -> None:
        self.apply = apply
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hang the hooks."""
        self.apply()
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self.apply()) for optimizer in trainer.optimizers]

    def on_train_end(self, *_: Any) -> None:
        """Take them away."""
        while self._hooks:
            self._hooks.pop().remove()

    on_exception = on_train_end
