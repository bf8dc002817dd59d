"""What happens around the steps: random states, the metrics file, speed, expert load, changing domain weights, progress.

A step is an optimiser step; metrics of step s are those after s steps. L layers, E experts.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from tqdm import tqdm

from dyn.data.mixture import update_weights
from dyn.train.speed import mfu, peak_flops


def step_ended(trainer: Trainer, batch_idx: int) -> bool:
    """Whether micro-batch `batch_idx` (from 0) ended an optimiser step; an epoch holds whole steps (`dyn.train.trainer.fit` sees to it)."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class RngState(Callback):
    """Training's own random stream (torch, CUDA, numpy, python; one a rank), seeded at the first batch and carried by the checkpoint.

    The state is taken at the end of every training batch and put back at the start of the next, so that nothing in between (validation, sampling, a resume) can
    move it: a network with dropout or gate noise trains the same with and without them.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._state: dict[str, Any] | None = None
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Put the state back, or seed."""
        if self._loaded is not None:
            if len(self._loaded) == trainer.world_size:
                self._state = self._loaded[trainer.global_rank]
            else:
                rank_zero_warn(f"the checkpoint holds random states of {len(self._loaded)} processes, now there are {trainer.world_size}: seeding anew")
            self._loaded = None
        if self._state is None:
            self._seed(trainer)
        else:
            _set_rng(self._state)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """A stream that only the step decides, for networks that draw in evaluation too (random gates)."""
        self._seed(trainer)

    def _seed(self, trainer: Trainer) -> None:
        seed = (self.seed + 1_000_003 * trainer.global_rank + 7919 * trainer.global_step) % 2**32
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def on_train_batch_end(self, *_: Any) -> None:
        """Take the state."""
        self._state = _get_rng()

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks; every rank calls this."""
        states = [self._state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self._state)
        return {"ranks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Used at the next training batch, not earlier."""
        self._loaded = state["ranks"]


def _get_rng() -> dict[str, Any]:
    name, keys, place, has_gauss, gauss = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class JsonlLogger(Logger):
    """metrics.jsonl: one JSON object a call, appended, with "step" and, for a training with a name, "stage". Numbers that are not finite become strings.

    Rank 0 writes. A resumed training cuts the file back to where its checkpoint saw it (`cut`), one without a checkpoint to its own first line (`restart`).
    """

    def __init__(self, path: str | Path, stage: str = "") -> None:
        super().__init__()
        self.path, self.stage = Path(path), stage

    @property
    def name(self) -> str:
        """For Lightning."""
        return self.stage or "metrics"

    @property
    def version(self) -> str:
        """For Lightning."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        if rank_zero_only.rank == 0:
            numbers = {key: int(value) if isinstance(value, int) else float(value) for key, value in metrics.items()}
            line = {"step": step, **({"stage": self.stage} if self.stage else {}), **{k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write((json.dumps(line) + "\n").encode())

    def position(self) -> int:
        """Bytes written and on the disk."""
        if not self.path.is_file():
            return 0
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, position: int) -> None:
        """Drop what was written after `position` bytes."""
        if rank_zero_only.rank == 0 and self.path.is_file() and self.path.stat().st_size > position:
            os.truncate(self.path, position)

    def restart(self) -> None:
        """Drop this training's lines, from its first one on, and a last line that a kill cut short."""
        if rank_zero_only.rank != 0 or not self.path.is_file():
            return
        position = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line).get("stage", "") == self.stage:
                    break
                position += len(line)
        self.cut(position)


class Throughput(Callback):
    """Units a second (tokens, examples: `Task.unit`), over all devices; logged as speed/... every `log_every` steps.

    For tokens also model FLOPs utilisation (`dyn.train.speed.mfu`): an example's cost is not told by its net's parameters alone.
    The first step of a process, validations and checkpoints do not count. `summary()` has the means.

    Args:
        dtype: that the matrix products run in.
        log_every: optimiser steps.
        peak: FLOP/s of one device; None: `dyn.train.speed.peak_flops`.
    """

    def __init__(self, dtype: torch.dtype, log_every: int = 1, peak: float | None = None) -> None:
        self.dtype, self.log_every = dtype, log_every
        self.peak, self.note = peak, "rate given as trainer.peak_flops" if peak else "not measured"
        self.active, self.trained, self.unit = 0, 0, "tokens"
        self.rate = self.mfu = math.nan  # newest
        self._units = self._steps = self._all_units = self._all_steps = 0
        self._seconds = self._all_seconds = self._paused = 0.0
        self._mark: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count parameters, also for a training that is resumed behind its last step."""
        self.active, self.trained, self.unit = pl_module.active_parameters, pl_module.trained_parameters, pl_module.unit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the peak."""
        if self.peak is None and self.unit == "tokens":
            self.peak, self.note = peak_flops(pl_module.device, self.dtype)
        self._mark = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self.skip(time.monotonic() - self._paused)

    def skip(self, seconds: float) -> None:
        """Leave so many seconds out, that went into something else than training."""
        if self._mark is not None:
            self._mark += seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count; log."""
        if self._mark is not None:
            self._units += pl_module.amount(batch) * trainer.world_size
        if not step_ended(trainer, batch_idx):
            return
        saving = getattr(trainer.checkpoint_callback, "seconds", 0.0)
        now, mark, units = time.monotonic() - saving, self._mark, self._units
        if mark is None:
            self._mark = now
            return
        self._steps += 1
        if trainer.global_step % self.log_every:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            now = time.monotonic() - saving
        self._seconds, self._mark = now - mark, now
        self.rate, shown = units / self._seconds, {}
        self._all_units, self._all_steps, self._all_seconds = self._all_units + units, self._all_steps + self._steps, self._all_seconds + self._seconds
        metrics = {f"speed/{self.unit}_per_second": self.rate, "speed/step_seconds": self._seconds / self._steps}
        if self.unit == "tokens":
            self.mfu = mfu(self.active, self.rate, self.peak * trainer.world_size, self.trained)
            metrics["speed/mfu"] = shown["mfu"] = self.mfu
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        pl_module.log_dict({f"{self.unit}/s": self.rate, **shown}, prog_bar=True, logger=False)
        self._units = self._steps = 0

    def summary(self) -> dict[str, Any]:
        """Means of this process: [unit]_per_second, steps_per_second (these once there were steps), active_parameters; for tokens also mfu, peak_flops (a
        device), peak_flops_from."""
        tokens = self.unit == "tokens"
        about = {**({"peak_flops": self.peak, "peak_flops_from": self.note} if tokens else {}), "active_parameters": self.active}
        if not self._all_steps:
            return about
        rate = self._all_units / self._all_seconds
        return {f"{self.unit}_per_second": rate, "steps_per_second": self._all_steps / self._all_seconds,
                **({"mfu": self.mfu * rate / self.rate} if tokens else {}), **about}


class ExpertLoad(Callback):
    """Tokens that chose each expert, [L, E] a domain, over the newest validation and all ranks (LLaMA-MoE, section 5.6).

    `loads`: domain -> float64 on the CPU; empty for a network without experts. Also written to `path` as JSON, {"step", "load": nested lists}, for heat maps.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.loads: dict[str, torch.Tensor] = {}

    def on_validation_start(self, *_: Any) -> None:
        """Begin anew."""
        self._sums: dict[int, torch.Tensor] = {}

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch's load."""
        if (load := outputs.get("expert_load")) is not None:
            self._sums[dataloader_idx] = self._sums.get(dataloader_idx, 0) + load.double()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks; write."""
        sums = {i: trainer.strategy.reduce(load, reduce_op="sum") for i, load in sorted(self._sums.items())}
        self.loads = {pl_module.domains[i]: load.cpu() for i, load in sums.items()}
        if self.path is not None and self.loads and trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_text(json.dumps({"step": trainer.global_step, "load": {d: load.tolist() for d, load in self.loads.items()}}) + "\n")
            part.replace(self.path)


class Remix(Callback):
    """New domain weights after validations, from each domain's loss and reference loss (LLaMA-MoE, section 4.3; `update_weights` has the rules).

    The weights themselves live in the loader and its checkpointed state; logged as weights/<domain>.

    Args:
        loader: the training mixture, with `weights` and `set_weights`; its domains are those of the task.
        references: loss by domain of the model to measure against.
        rule: "a" or "b", as in `update_weights`.
        anchor: multiply onto these (the initial weights, say) in place of the current ones.
        every: only after validations at multiples of so many steps; 0: after each.
    """

    def __init__(self, loader: Any, references: Mapping[str, float], *, rule: Literal["a", "b"] = "a",
                 anchor: Mapping[str, float] | None = None, every: int = 0) -> None:
        self.loader, self.references, self.rule, self.every = loader, dict(references), rule, every
        self.anchor = None if anchor is None else dict(anchor)
        update_weights(loader.weights, self.references, self.references, rule=rule, anchor=anchor)  # refuses what does not fit before anything is trained

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the initial weights."""
        if trainer.global_step == 0:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update, unless this validation came before the first step or after the last."""
        step = trainer.global_step
        if trainer.state.fn is TrainerFn.FITTING and 0 < step < trainer.max_steps and not (self.every and step % self.every):
            self.loader.set_weights(update_weights(self.loader.weights, pl_module.val_losses, self.references, rule=self.rule, anchor=self.anchor))
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"tokens": pl_module.tokens, **{f"weights/{d}": w for d, w in self.loader.weights.items()}}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What the updates are measured against."""
        return {"references": self.references, "anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A resumed training goes on with the same references."""
        self.references, self.anchor = state["references"], state["anchor"]


class PlainProgress(Callback):
    """Progress without a terminal: a line through `write` every `seconds`, and one for each validation."""

    def __init__(self, write: Callable[[str], None], seconds: float = 15.0) -> None:
        self.write, self.seconds = write, seconds
        self._last = -math.inf

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A line, when it is time."""
        if trainer.is_global_zero and step_ended(trainer, batch_idx) and time.monotonic() - self._last >= self.seconds and trainer.progress_bar_metrics:
            self._last = time.monotonic()
            behind = trainer.global_step % trainer.log_every_n_steps  # steps since the values were taken
            self.write(f"step {trainer.global_step}/{trainer.max_steps}: {_shown(trainer)}{f' (of step {trainer.global_step - behind})' if behind else ''}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What it found."""
        if trainer.is_global_zero:
            self.write(f"step {trainer.global_step}: {pl_module.val_line()}")


class BarProgress(PlainProgress):
    """Progress on a terminal: one bar of optimiser steps with loss and speed; the validations' lines stand above it."""

    bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar where training begins."""
        if trainer.is_global_zero:
            self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move on."""
        if self.bar is not None and step_ended(trainer, batch_idx):
            if trainer.global_step % trainer.log_every_n_steps == 0:  # each value that is read waits for the GPU
                self.bar.set_postfix_str(_shown(trainer), refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_start(self, *_: Any) -> None:
        """Say why the bar stands."""
        if self.bar is not None:
            self.bar.set_description("validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The losses, above the bar."""
        with tqdm.external_write_mode():
            super().on_validation_end(trainer, pl_module)
        if self.bar is not None:
            self.bar.set_description("training")

    def on_train_end(self, *_: Any) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    on_exception = on_train_end


def _shown(trainer: Trainer) -> str:
    values = {name.removeprefix("train/"): float(value) for name, value in trainer.progress_bar_metrics.items()}
    return ", ".join(f"{name} {value:{',.0f' if value >= 1000 else '.4g'}}" for name, value in values.items())
