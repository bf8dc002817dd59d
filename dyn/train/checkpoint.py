"""Checkpoints: written whole or not at all, checked before use, and taken so that a resumed training is the uninterrupted one.

A checkpoint is one file, folder/step-00000042.ckpt, of plain dicts and tensors (torch.load reads it with weights_only=True), under FSDP2 too, where rank 0
gathers it. It is taken right after an optimiser step, before a validation that follows; where one had to follow, a resumed training runs it first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dyn.train.callbacks import JsonlLogger, step_ended

PATTERN = "step-*.ckpt"


class Stopped(Exception):
    """Training ended on request, after a checkpoint; `dyn.train.trainer.fit` takes it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: a kill or a full disk leaves the older checkpoints as they were."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file; OSError that names the file, the space left and what is kept, when it cannot be written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb", buffering=1 << 20) as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync(path.parent)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where its zip writer could not finish
            with contextlib.suppress(OSError):
                part.unlink()
            older = newest_checkpoint(path.parent)
            raise OSError(f"could not write the checkpoint {path}: {error}; {shutil.disk_usage(path.parent).free / 1e9:.2f} GB are free there; "
                          f"{f'{older} is whole and can be resumed from' if older else 'there is no older checkpoint'}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on the CPU, as plain data and tensors only."""
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def find_checkpoint(run_folder: str | Path, name: str = "") -> Path | None:
    """The newest checkpoint of training `name` in a run folder, or None; ValueError when it is damaged (`verify_checkpoint`)."""
    newest = newest_checkpoint(Path(run_folder) / "checkpoints" / name)
    return None if newest is None else verify_checkpoint(newest)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a folder of checkpoints, unread; None without one."""
    return next(reversed(_checkpoints(folder)), None)


def verify_checkpoint(path: str | Path) -> Path:
    """`path`, after reading it whole against its check sums.

    Raises:
        ValueError: cut short, damaged or no checkpoint; names the file and the newest whole checkpoint beside it.
    """
    path = Path(path)
    problem = _problem(path)
    if problem is None:
        return path
    older = next((p for p in reversed(_checkpoints(path.parent)) if p != path and _problem(p) is None), None)
    advice = f"to resume from {older}, which is whole, remove the damaged file" if older else "there is no other whole checkpoint beside it"
    raise ValueError(f"the checkpoint {path} is unusable: {problem}; {advice}")


class Checkpoints(Checkpoint):
    """Saves every `every` optimiser steps and at the last one, keeps the newest `keep`, and sees to validations that a stop left out.

    Args:
        folder: where the files go.
        every: optimiser steps; 0: only at the end.
        keep: how many files stay.
        val_every: optimiser steps between validations, as the trainer has it; 0: none.
        val_first: validate before the first step.
        metrics: the metrics file that a resumed training cuts back to where it stood at the checkpoint.
    """

    def __init__(self, folder: Path, *, every: int, keep: int = 2, val_every: int = 0, val_first: bool = False,
                 metrics: JsonlLogger | None = None) -> None:
        self.folder, self.every, self.keep, self.val_every, self.val_first, self.metrics = folder, every, keep, val_every, val_first, metrics
        self.fresh = True  # no checkpoint is going to be loaded (FSDP2 loads it after `on_fit_start`)
        self.saved = 0  # step of the newest checkpoint
        self.validated = -1  # step of the newest validation
        self.seconds = 0.0  # spent on saving

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """ValueError when the disk has no room for `keep` checkpoints and the one being written, before any work is done. Clear what a killed process left."""
        if trainer.is_global_zero:
            if self.fresh and self.metrics:
                self.metrics.restart()
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.part"):
                part.unlink()
            size = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in pl_module.parameters())  # weights and two moments
            missing = max(0, self.keep + 1 - len(_checkpoints(self.folder))) * size
            if (free := shutil.disk_usage(self.folder).free) < missing:
                raise ValueError(f"{self.folder}: checkpoints need {missing / 1e9:.1f} GB (each {size / 1e9:.1f}), {free / 1e9:.1f} GB are free; "
                                 "make room or put the runs elsewhere")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate first, where that was asked for, or was due at the checkpoint's step and had not been done."""
        step = self.saved = trainer.global_step
        if self.validated != step and (self.val_first if step == 0 else self._val_due(step)) and trainer.enable_validation:
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False  # from its first batch, wherever an earlier validation stood in the checkpoint
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, when it is time."""
        step = trainer.global_step
        if step_ended(trainer, batch_idx) and ((self.every and step % self.every == 0) or step == trainer.max_steps):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that this step is validated."""
        self.validated = trainer.global_step

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved; every rank calls this."""
        if self.saved == trainer.global_step:
            return
        begin = time.monotonic()
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt", weights_only=False)
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            for old in _checkpoints(self.folder)[: -self.keep]:
                old.unlink()
        self.seconds += time.monotonic() - begin

    def state_dict(self) -> dict[str, int]:
        """The last validation, and how long the metrics file is."""
        return {"validated": self.validated, "metrics_bytes": self.metrics.position() if self.metrics else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cuts the metrics file back."""
        self.validated = state["validated"]
        if self.metrics:
            self.metrics.cut(state["metrics_bytes"])

    def _val_due(self, step: int) -> bool:
        return bool(self.val_every) and step % self.val_every == 0


class Stop(Callback):
    """Ends training when `run.stop` is set (SIGINT, SIGTERM): at the end of the optimiser step, on one process also in the middle of a validation.

    A checkpoint is written first; then `Stopped` is raised. All ranks agree on the step, which is the next one where there are several: they ask each other
    beside the training, whose device is not waited for.
    """

    def __init__(self, run: Any, checkpoints: Checkpoints) -> None:
        self.run, self.checkpoints = run, checkpoints
        self._asked: tuple[Any, Tensor] | None = None  # whether somebody was to stop at the last step, while it is being asked

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has put its own signal handlers over the run's: put the run's back."""
        if threading.current_thread() is threading.main_thread():
            self.run.listen()
        self._group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See the class."""
        if step_ended(trainer, batch_idx) and (self.run.stop.is_set() if self._group is None else self._anybody()):
            self._end(trainer)

    def _anybody(self) -> bool:
        asked, flag = self._asked, torch.tensor(int(self.run.stop.is_set()))
        self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        if asked is not None:
            asked[0].wait()
        return asked is not None and bool(asked[1])

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """See the class; several ranks may not have the same batches left, so there the next step's end counts."""
        if trainer.state.fn is TrainerFn.FITTING and trainer.world_size == 1 and self.run.stop.is_set():
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        self.checkpoints.save(trainer)
        raise Stopped(f"stopped on request at step {trainer.global_step}")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(PATTERN))


def _problem(path: Path) -> str | None:
    """Why a file is no whole checkpoint; None if it is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return None if bad is None else f"its part {bad} is damaged"
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:  # RuntimeError: damaged flags ask for a password or a method
        size = path.stat().st_size if path.is_file() else None
        return f"{error}" + (f" ({size} bytes: it was cut short, or is no checkpoint)" if size is not None else "")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
