"""One training on labelled examples, whatever they are: resumed where it stopped, ended on request with a checkpoint, measured at its end.

A run may hold several trainings; each has a name, under which its checkpoints and its lines in metrics.jsonl stand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from dyn import env
from dyn.core.saliency import one_process
from dyn.nn.masked import apply_masks
from dyn.nn.surgery import count_parameters
from dyn.train.callbacks import Throughput
from dyn.train.classify import Classifier
from dyn.train.optim import RecipeConfig
from dyn.train.settings import ClassifyConfig, TrainerConfig
from dyn.train.supervised import Supervised
from dyn.train.trainer import fit, make_trainer


class Trained(NamedTuple):
    """What a training left.

    net: as it ended; with `classify.ema` the averaged weights are in it. metrics: of the last validation, "val/loss", "val/accuracy" and so on
    (`Supervised`). answers: by validation set, as the task gives them. cost: total_, active_, gate_, dynamic_, static_, stored_ and trainable_parameters;
    steps_per_second and examples_per_second (or what the task counts) over all processes since this one started, unless it only took a finished training up;
    seconds_training over all starts; peak_memory_bytes of the process so far, and peak_device_memory_bytes of this training.
    """

    net: nn.Module
    metrics: dict[str, float]
    answers: dict[str, Any]
    cost: dict[str, float]


@contextmanager
def warnings_in(run: Any) -> Iterator[None]:
    """What pruning and mode partition warn of goes into the run's log."""
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("dyn.nn")
    handler.emit = lambda record: run.log(f"warning: {record.getMessage()}")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def scoring(run: Any) -> Iterator[None]:
    """The same for what is done within `env.once`: this process scores by itself while the others wait."""
    with warnings_in(run), one_process():
        yield


def train_classifier(net: nn.Module | Callable[[], nn.Module], train: Any, validation: Mapping[str, Iterable], *, run: Any, name: str = "",
                     optim: RecipeConfig, trainer: TrainerConfig, num_labels: int, metrics: Sequence[str] = ("accuracy",),
                     classify: ClassifyConfig | None = None, callbacks: Sequence[Callback] = ()) -> Trained:
    """`train_task` for a `Classifier`, with its arguments and errors."""
    task = Classifier(net, optim, list(validation), trainer, num_labels=num_labels, metrics=metrics, classify=classify)
    return train_task(task, train, validation, run=run, name=name, callbacks=callbacks)


def train_task(task: Supervised, train: Any, validation: Mapping[str, Iterable], *, run: Any, name: str = "",
               callbacks: Sequence[Callback] = ()) -> Trained:
    """Train to the end, from the newest checkpoint of this name in the run's folder where there is one (bitwise as if nothing had happened).

    Args:
        task: what is trained; its settings say how long. What a checkpoint restores must have its shape already: masks of partial layers, say.
        train: this rank's micro-batches (`dyn.data.loader.ResumableLoader`), at least trainer.max_steps x trainer.accumulate.
        validation: set -> batches with `index` (`dyn.data.loader.EvaluationLoader`).
        run: the run, as `make_trainer` wants it.
        name: of this training within the run.
        callbacks: more of them (`dyn.train.annealing`).

    Raises:
        Cancelled: SIGINT or SIGTERM came, and a checkpoint is written (`dyn.runfolder`).
        ValueError: as in the task and `dyn.train.trainer.fit`.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock()
    made = make_trainer(task.cfg, run, [clock, *callbacks], name=name)
    run.log(f"training{f' {name}' if name else ''}: {task.cfg.max_steps:,} steps")
    fit(made, task, train, validation)
    for key, average in task.averages().items():
        _tensor(task.net, key).data.copy_(average)
    apply_masks(task.net)  # an average remembers what was pruned while it was taken
    speed = next(c for c in made.callbacks if isinstance(c, Throughput)).summary()
    cost = {f"{key}_parameters": count for key, count in count_parameters(task.net).items()}
    cost |= {key: speed[key] for key in ("steps_per_second", f"{task.unit}_per_second") if key in speed}
    return Trained(task.net, dict(task.val_metrics), dict(task.answers), cost | {"seconds_training": clock.seconds} | env.peak_memory())


def _tensor(net: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, last = name.rpartition(".")
    return getattr(net.get_submodule(path), last)


class _Clock(Callback):
    """Seconds from the first step's beginning to the end, validations included; what an earlier process spent up to its checkpoint counts."""

    def __init__(self) -> None:
        self._before, self._began, self._ended = 0.0, None, None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._began is None else (self._ended or time.monotonic()) - self._began)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._ended = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        """So far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self._before = state["seconds"]
