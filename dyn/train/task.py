"""What every training here has in common: how a net is built, placed, clipped, averaged for the log, and told apart in checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dyn.nn.experts import Gate
from dyn.nn.surgery import count_parameters
from dyn.train.settings import TrainerConfig


class Task(LightningModule):
    """A net, its optimiser and its metrics. Trains the parameters with requires_grad.

    A subclass has `unit`, `training_step` (which calls `record`), `step_metrics`, `seen`, `about`, `configure_optimizers` and a validation that fills
    `val_losses` (loss by validation set) and says it in `val_line`.

    Logged every `cfg.log_every` optimiser steps: what `step_metrics` makes of the recorded sums, train/grad_norm, lr, and how much was seen.

    Args:
        net: the network, or a function that builds it, called in `configure_model` (every rank must build the same).
        optim: settings of the optimiser: a dataclass with `lr`, `warmup_steps` and `clip`.
        sets: names of the validation sets, in the order of the validation loaders.
        cfg: precision, gradient checkpointing, logging.

    Raises:
        ValueError: a warm-up that is not shorter than the training.
    """

    unit = "examples"  # what is counted a batch

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: Any, sets: Sequence[str], cfg: TrainerConfig) -> None:
        super().__init__()
        if optim.warmup_steps >= cfg.max_steps:
            raise ValueError(f"optim.warmup_steps={optim.warmup_steps} must be smaller than max_steps={cfg.max_steps}")
        self.net = net if isinstance(net, nn.Module) else None
        self._build = None if isinstance(net, nn.Module) else net
        self.optim, self.domains, self.cfg = optim, list(sets), cfg
        self.val_losses: dict[str, float] = {}
        self.active_parameters = self.trained_parameters = 0  # that a unit passes through, and those of them that train
        self._sums: dict[str, Tensor] = {}
        self._micro = 0
        self._configured = False

    # What a subclass says

    @abstractmethod
    def amount(self, batch: Mapping[str, Tensor]) -> int:
        """How many units a batch of this rank holds."""

    @abstractmethod
    def seen(self) -> dict[str, float]:
        """How much all ranks have trained on, for the metrics file and the checkpoint."""

    @abstractmethod
    def resume_seen(self, seen: Mapping[str, float]) -> None:
        """Put back what `seen` gave."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Plain data that tell this training from others, beside the optimiser and its length."""

    @abstractmethod
    def step_metrics(self, sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Metrics of an optimiser step from what `record` summed over `count` micro-batches of all ranks; "train/loss" among them."""

    @abstractmethod
    def val_line(self) -> str:
        """The newest validation in words."""

    # Set-up

    def configure_model(self) -> None:
        """Build the net, set gradient checkpointing and precision, shard under FSDP2; once."""
        if self._configured:
            return
        self._configured = True
        self.net = self._build() if self.net is None else self.net
        self.net.train()
        counts = count_parameters(self.net)
        self.active_parameters, self.trained_parameters = counts["active"], min(counts["active"], counts["trainable"])
        if self.cfg.gradient_checkpointing:
            # transformers has renamed it: the old name warns in newer releases
            enable = getattr(self.net, "activation_checkpointing_enable", None) or self.net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if self.cfg.precision == "bf16-true":  # parameters only: Lightning's plug-in would also round rotary frequencies and selection biases
            for parameter in self.net.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        if self.device_mesh is not None:
            self._shard()

    def _shard(self) -> None:
        """FSDP2 over the data-parallel ranks: each block that the net names as whole, then the rest."""
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if self.cfg.precision == "bf16-mixed" else MixedPrecisionPolicy()
        blocks = set(getattr(self.net, "_no_split_modules", None) or ())
        for module in list(self.net.modules()):
            if isinstance(module, Gate):  # in float32, as everywhere; first, so that its block leaves it out
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
                register_fsdp_forward_method(module, "choose")
        for module in list(self.net.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)

    # Steps

    def record(self, **values: Tensor | None) -> None:
        """Add a micro-batch's values to the sums of this optimiser step."""
        self._micro += 1
        for key, value in values.items():
            if value is not None:
                self._sums[key] = self._sums.get(key, 0) + value.detach().float()

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm over all parameters, and keep it for the log."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip or math.inf)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Step; then `stepped` and the log, before any callback may save."""
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1  # Lightning counts after this hook
        sums, micro, self._sums, self._micro = self._sums, self._micro, {}, 0
        summed = self.stepped(sums)
        if step % self.cfg.log_every and step != self.cfg.max_steps:
            return
        sums = {key: value if key in summed else self.reduced(value) for key, value in sums.items()}
        metrics = self.step_metrics(sums, micro * self.trainer.world_size) | {"train/grad_norm": self._norm}
        values = dict(zip(metrics, torch.stack([v.double() for v in metrics.values()]).tolist(), strict=True))  # the one host sync
        if not math.isfinite(values["train/loss"]):
            raise ValueError(f"train/loss={values['train/loss']} at step {step}: training diverged; lower optim.lr={self.optim.lr} or lengthen "
                             f"optim.warmup_steps={self.optim.warmup_steps}, and begin anew or from an older checkpoint")
        for logger in self.loggers:
            logger.log_metrics({**self.seen(), "lr": lr, **values}, step)
        self.log("train/loss", values["train/loss"], prog_bar=True, logger=False)

    def stepped(self, sums: dict[str, Tensor]) -> set[str]:
        """What follows every optimiser step; may change `sums`. Gives the names of those that it has already summed over ranks."""
        return set()

    def reduced(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the file must say to be resumed only by the same training, and to be exported without it."""
        construction = getattr(self.net, "construction", None)
        checkpoint["dyn"] = {**self.seen(), "about": self._about(), "construction": None if construction is None else dataclasses.asdict(construction)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError for another training's checkpoint, naming the settings that differ."""
        if "dyn" not in checkpoint:
            raise ValueError(f"this checkpoint was not written by a {type(self).__name__} of dyn: it has no entry 'dyn'")
        theirs, ours = dict(_flat(checkpoint["dyn"]["about"])), dict(_flat(self._about()))
        if wrong := [f"{k}={theirs.get(k)!r}, here {ours.get(k)!r}" for k in dict.fromkeys([*theirs, *ours]) if theirs.get(k) != ours.get(k)]:
            raise ValueError(f"this checkpoint belongs to another training: {'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
        self.resume_seen(checkpoint["dyn"])

    def _about(self) -> dict[str, Any]:
        """Plain data: the net's class and configuration, the optimiser, the length."""
        config = self.net.config.to_dict() if hasattr(getattr(self.net, "config", None), "to_dict") else {}
        for key in ("transformers_version", "architectures", "_name_or_path"):  # these change without meaning
            config.pop(key, None)
        about = {"net": type(self.net).__name__.removeprefix("FSDP"), "config": config, "optim": dataclasses.asdict(self.optim),
                 "max_steps": self.cfg.max_steps, "accumulate": self.cfg.accumulate, "domains": self.domains, **self.about()}
        return json.loads(json.dumps(about, default=str))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
