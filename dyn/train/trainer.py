"""A Lightning trainer for one run folder: strategy from the number of processes, loggers, checkpoints; and the calls around it."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from dyn import env
from dyn.data.loader import blank
from dyn.train.callbacks import BarProgress, JsonlLogger, PlainProgress, RngState, Throughput
from dyn.train.checkpoint import AtomicCheckpointIO, Checkpoints, Stop, Stopped, find_checkpoint, newest_checkpoint, verify_checkpoint
from dyn.train.optim import OptimConfig
from dyn.train.settings import TrainerConfig
from dyn.train.task import Task
from dyn.train.tasks import CausalLM

__all__ = ["TrainerConfig", "check_world", "evaluate", "find_checkpoint", "fit", "make_trainer", "validate", "verify_checkpoint", "world"]

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its notices on devices and tips would break up the progress lines
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's, about its own use of torch
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # values are the same on every rank already
warnings.filterwarnings("ignore", message=".*SpearmanCorrcoef. will save all.*")  # of one validation set, and only at its end


def make_trainer(cfg: TrainerConfig, run: Any, callbacks: Sequence[Callback] = (), *, name: str = "") -> Trainer:
    """A trainer that writes into a run's folder: metrics.jsonl, checkpoints/[name/]step-*.ckpt.

    It holds RngState, Throughput (unless `callbacks` has one), a progress display, Stop and Checkpoints, the last two after `callbacks`.
    `run` has `folder`, `log(text)`, `stop`, `graceful()` and `listen()` (`dyn.runfolder.Run`).

    Args:
        cfg: settings.
        run: the run.
        callbacks: more callbacks.
        name: tells several trainings of one run apart ("stage" in metrics.jsonl).

    Raises:
        ValueError: wandb is asked for and not installed, or a GPU that is not there.
    """
    folder = Path(run.folder)
    metrics = JsonlLogger(folder / "metrics.jsonl", name)
    checkpoints = Checkpoints(folder / "checkpoints" / name, every=cfg.checkpoint_every, keep=cfg.keep_checkpoints, val_every=cfg.val_every,
                              val_first=cfg.val_first, metrics=metrics)
    bar = BarProgress(run.log) if sys.stderr.isatty() else PlainProgress(run.log, cfg.progress_seconds)
    speed = [] if any(isinstance(c, Throughput) for c in callbacks) else [Throughput(cfg.dtype, cfg.log_every, cfg.peak_flops)]
    return Trainer(
        **_machine(cfg), logger=[metrics, *_wandb(cfg, folder, name)], default_root_dir=folder, max_steps=cfg.max_steps, accumulate_grad_batches=cfg.accumulate,
        val_check_interval=(cfg.val_every or cfg.max_steps + 1) * cfg.accumulate, check_val_every_n_epoch=None, log_every_n_steps=cfg.log_every,
        enable_progress_bar=False, deterministic=cfg.deterministic,
        callbacks=[RngState(cfg.seed), *callbacks, *speed, bar, Stop(run, checkpoints), checkpoints])


def fit(trainer: Trainer, task: Task, train_loader: Any, val_loaders: Mapping[str, Iterable],
        ckpt: str | Path | Literal["newest"] | None = "newest") -> dict[str, float]:
    """Train to the end; returns the final validation loss of every domain (validation set). A `Classifier` has its metrics in `val_metrics`.

    SIGINT and SIGTERM meanwhile: a checkpoint is written and the run's Cancelled raised.

    Args:
        trainer: of `make_trainer`.
        task: what to train.
        train_loader: this rank's micro-batches, with `__len__`, `state_dict` and `load_state_dict` (`dyn.data.mixture.MixtureLoader`,
            `dyn.data.loader.ResumableLoader`).
        val_loaders: domain -> batches, the same on every rank; ranks share them out. Domains as in the task.
        ckpt: where to go on; "newest": in the trainer's own checkpoint folder, if that has one; None: from the beginning.

    Raises:
        ValueError: a loader that is too short or cannot be resumed, other domains than the task's, a damaged or foreign checkpoint.
    """
    needed = trainer.max_steps * trainer.accumulate_grad_batches
    if missing := [m for m in ("__len__", "state_dict", "load_state_dict") if not hasattr(train_loader, m)]:
        raise ValueError(f"{type(train_loader).__name__} cannot be resumed exactly: it has no {', '.join(missing)}")
    if len(train_loader) < needed:
        raise ValueError(f"the training data have {len(train_loader)} micro-batches; {trainer.max_steps} steps of "
                         f"{trainer.accumulate_grad_batches} need {needed}")
    if list(val_loaders) != task.domains:
        raise ValueError(f"validation domains {list(val_loaders)} differ from the task's {task.domains}")
    stop = next(c for c in trainer.callbacks if isinstance(c, Stop))
    if ckpt == "newest":
        ckpt = newest_checkpoint(stop.checkpoints.folder)
    if ckpt is not None:
        ckpt = str(verify_checkpoint(ckpt))
    stop.checkpoints.fresh = ckpt is None
    if (found := getattr(train_loader, "rank", trainer.global_rank)) != trainer.global_rank:
        raise ValueError(f"the training data are those of rank {found}, and this process has rank {trainer.global_rank}")
    shards = _share(val_loaders, trainer)
    with stop.run.graceful():
        try:
            trainer.fit(task, train_loader, shards, ckpt_path=ckpt, weights_only=True)
            if stop.checkpoints.validated != trainer.global_step:
                trainer.validate(task, shards, verbose=False)
        except Stopped as reason:
            stop.run.stop.set()  # on the ranks, too, that got no signal
            stop.run.log(str(reason))
    return dict(task.val_losses)


def evaluate(net: nn.Module, val_loaders: Mapping[str, Iterable], cfg: TrainerConfig, callbacks: Sequence[Callback] = ()) -> dict[str, float]:
    """Loss by domain (nats a token, exact over all targets) of a network as it is; nothing is logged or saved. `ExpertLoad()` as a callback gives its load."""
    return validate(CausalLM(net, OptimConfig(warmup_steps=0), list(val_loaders), cfg), val_loaders, cfg, callbacks)


def validate(task: Task, val_loaders: Mapping[str, Iterable], cfg: TrainerConfig, callbacks: Sequence[Callback] = ()) -> dict[str, float]:
    """One validation of a task's network as it is, its loss by set; nothing is logged or saved, and the network's mode stays."""
    trainer = Trainer(**_machine(cfg), logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=list(callbacks))
    training = None if task.net is None else task.net.training
    trainer.validate(task, _share(val_loaders, trainer), verbose=False)
    if training is not None:
        task.net.train(training)
    return dict(task.val_losses)


def world(cfg: TrainerConfig) -> tuple[int, int]:
    """(rank, number of processes) of this process, as torchrun, srun or Lightning's launcher set it; for loaders that are made before the trainer."""
    return env.rank(cfg.devices) if cfg.world_size > 1 else 0, cfg.world_size


def on_gpu(cfg: TrainerConfig) -> bool:
    """Does a training with these settings run on a GPU here?"""
    return torch.cuda.is_available() and cfg.accelerator != "cpu"


def on_threads(cfg: TrainerConfig) -> str:
    """What a report says of the machine: " on 2 CPU threads", nothing on a GPU."""
    threads = torch.get_num_threads()
    return "" if on_gpu(cfg) else f" on {threads} CPU thread{'s' * (threads > 1)}"


def row_suffix(run: Any, what: str) -> str:
    """What a row's name adds to its network, and its controls' names then too."""
    return run.row.removeprefix(what) if run.row.startswith(what) else ""


def own_device(cfg: TrainerConfig) -> torch.device:
    """Where a training with these settings computes here, for work outside of it: on GPUs this process's own, which a Trainer chooses only when it starts."""
    return torch.device("cuda", env.local_rank()) if on_gpu(cfg) else torch.device("cpu")


def check_world(cfg: TrainerConfig) -> None:
    """ValueError when another number of processes was started than the settings say."""
    launched = env.world_size()
    launches = launched == 1 and "RANK" not in os.environ and (cfg.num_nodes == 1 or "NODE_RANK" in os.environ)  # the others of its machine
    if launched != cfg.world_size and not launches:
        raise ValueError(f"{launched} process{'es were' if launched > 1 else ' was'} started, trainer.devices x trainer.num_nodes = {cfg.world_size}: set them "
                         "to what is started, and start on several machines by torchrun or srun")


def _machine(cfg: TrainerConfig) -> dict[str, Any]:
    """Devices, strategy, precision, and what is never wanted."""
    cuda = torch.cuda.is_available()
    if cfg.accelerator == "gpu" and not cuda:
        raise ValueError("trainer.accelerator=gpu: torch finds no GPU here; allowed: auto, cpu")
    strategy: Any = "auto"
    if cfg.kind == "ddp":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    elif cfg.kind == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=cfg.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():  # one process in a job launches the others itself; our signal handlers see to the end
        plugins.append(SLURMEnvironment(auto_requeue=False) if env.by_srun() else LightningEnvironment())
    return dict(accelerator="gpu" if cuda and cfg.accelerator != "cpu" else "cpu", devices=cfg.devices, num_nodes=cfg.num_nodes, strategy=strategy,
                precision="bf16-mixed" if cfg.precision == "bf16-mixed" and cfg.kind != "fsdp2" else "32-true", plugins=plugins, num_sanity_val_steps=0,
                use_distributed_sampler=False, enable_model_summary=False, inference_mode=False)


def _wandb(cfg: TrainerConfig, folder: Path, name: str) -> list[Logger]:
    if not cfg.wandb:
        return []
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError("trainer.wandb=true needs the package wandb: install the extra with `pip install dyn[wandb]`") from None
    from lightning.pytorch.loggers import WandbLogger

    label = f"{folder.name}{f'-{name}' if name else ''}"
    return [WandbLogger(project=cfg.wandb_project, name=label, id=label, resume="allow", save_dir=str(folder))]


class _Batches:
    """A list of batches as a loader; Lightning would take nested lists apart."""

    def __init__(self, batches: Iterable) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        return iter(self.batches)


def _share(val_loaders: Mapping[str, Iterable], trainer: Trainer) -> list[Iterable]:
    """This rank's batches of every domain: as many on each rank, filled up with batches without targets, since sharded networks compute together."""
    world, rank = trainer.world_size, trainer.global_rank
    if world == 1:
        return [_Batches(loader) if isinstance(loader, Sequence) else loader for loader in val_loaders.values()]
    shares = []
    for loader in val_loaders.values():
        if hasattr(loader, "shard"):
            shares.append(loader.shard(rank, world))
            continue
        batches = list(loader)
        mine = batches[rank::world]
        if len(mine) < math.ceil(len(batches) / world):
            mine.append(blank(batches[0]))
        shares.append(_Batches(mine))
    return shares
