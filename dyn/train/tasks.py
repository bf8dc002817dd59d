"""What is trained: next-token prediction with a causal language model, dense or a mixture of experts.

B sequences, L tokens in `input_ids`; layers and E for expert loads [layers, E].
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dyn.core.distill import distillation_loss
from dyn.core.routing import cv_squared
from dyn.nn.surgery import count_parameters
from dyn.train.optim import OptimConfig, cosine_clipped, make_optimizer

if TYPE_CHECKING:
    from dyn.train.settings import TrainerConfig

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")


class CausalLM(LightningModule):
    """Next-token prediction. Trains the parameters with requires_grad: freeze others with `dyn.nn.surgery.freeze` before.

    The net maps (input_ids, labels [B, L], -100 = ignored, shifted inside) to an output with `loss`; a mixture of experts adds `lm_loss`, `aux_loss`,
    `expert_load` [layers, E], `dropped_mass` [layers] and, for balance="bias", has `update_selection_bias`, called after every optimiser step
    with the loads of all its micro-batches and ranks.

    With `distill_weight` w > 0 training batches carry a teacher's likeliest next tokens, teacher_ids and teacher_logp [B, L, K]
    (`dyn.data.teacher.TaughtLoader`), and the loss is (1 - w) cross-entropy + w KL(teacher || net), plus what the net adds to its cross-entropy
    (balance losses). Validation is cross-entropy.

    Logged every `cfg.log_every` optimiser steps, as means over micro-batches and ranks: train/loss, train/lm_loss (cross-entropy), train/distill_loss (KL),
    train/balance_loss (weighted), train/grad_norm, train/load_max (largest load / mean load of a layer, averaged over layers;
    train/load_max_layer is the worst layer's), train/load_cv2, train/dropped_mass, lr, tokens (seen so far, by all ranks). At validation:
    val/<domain>/loss, val/<domain>/ppl, val/loss (their mean), also in `val_losses`.

    Args:
        net: the network, or a function that builds it, called in `configure_model` (every rank must build the same).
        optim: optimiser and schedule, over `cfg.max_steps`.
        domains: names of the validation sets, in the order of the validation loaders.
        cfg: precision, gradient checkpointing, logging.
        distill_weight: w, in [0, 1].

    Raises:
        ValueError: a warm-up that is not shorter than the training, a weight outside [0, 1].
    """

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: OptimConfig, domains: Sequence[str], cfg: TrainerConfig,
                 distill_weight: float = 0.0) -> None:
        super().__init__()
        if optim.warmup_steps >= cfg.max_steps:
            raise ValueError(f"optim.warmup_steps={optim.warmup_steps} must be smaller than max_steps={cfg.max_steps}")
        if not 0 <= distill_weight <= 1:
            raise ValueError(f"distill_weight={distill_weight} must lie in [0, 1]")
        self.net = net if isinstance(net, nn.Module) else None
        self._build = None if isinstance(net, nn.Module) else net
        self.optim, self.domains, self.cfg, self.distill_weight = optim, list(domains), cfg, distill_weight
        self.tokens = 0
        self.val_losses: dict[str, float] = {}
        self.active_parameters = 0
        self._sums: dict[str, Tensor] = {}
        self._micro = 0
        self._configured = False

    # Set-up

    def configure_model(self) -> None:
        """Build the net, set gradient checkpointing and precision, shard under FSDP2; once."""
        if self._configured:
            return
        self._configured = True
        self.net = self._build() if self.net is None else self.net
        self.net.train()
        self.active_parameters = count_parameters(self.net)["active"]
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
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and the clipped cosine, by optimiser step."""
        optimizer = make_optimizer(self.net, self.optim)
        cfg, total = self.optim, self.cfg.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_clipped(step, total, cfg.warmup_steps, cfg.floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Training

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; Lightning divides by their number."""
        out = self.net(**_inputs(batch), use_cache=False)
        self.tokens += batch["input_ids"].numel() * self.trainer.world_size
        self._micro += 1
        loss, lm_loss, kl = out.loss, getattr(out, "lm_loss", None), None
        if self.distill_weight:
            lm_loss = out.loss if lm_loss is None else lm_loss
            kl = _teacher_loss(out.logits, batch)
            loss = out.loss + self.distill_weight * (kl - lm_loss)  # balance losses keep their weight
        sums = {"train/loss": loss, "train/lm_loss": lm_loss, "train/distill_loss": kl, "train/balance_loss": getattr(out, "aux_loss", None),
                "load": getattr(out, "expert_load", None), "dropped": getattr(out, "dropped_mass", None)}
        for key, value in sums.items():
            if value is not None:
                self._sums[key] = self._sums.get(key, 0) + value.detach().float()
        return loss

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm over all parameters, and keep it for the log."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.optim.clip or math.inf)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Step; then move selection biases and log, before any callback may save."""
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1  # Lightning counts after this hook
        sums, micro, self._sums, self._micro = self._sums, self._micro, {}, 0
        logs = step % self.cfg.log_every == 0 or step == self.cfg.max_steps
        if biased := getattr(getattr(self.net, "config", None), "balance", None) == "bias":
            sums["load"] = self._reduce(sums["load"])
            self.net.update_selection_bias(sums["load"])
        if not logs:
            return
        sums = {key: value if biased and key == "load" else self._reduce(value) for key, value in sums.items()}
        load, dropped, count = sums.pop("load", None), sums.pop("dropped", None), micro * self.trainer.world_size
        metrics = {key: value / count for key, value in sums.items()} | {"train/grad_norm": self._norm}
        if load is not None:
            ratio = load.amax(-1) / load.mean(-1).clamp(min=1e-12)
            cv2 = torch.stack([cv_squared(load_E) for load_E in load])
            metrics |= {"train/load_max": ratio.mean(), "train/load_max_layer": ratio.max(), "train/load_cv2": cv2.mean()}
        if dropped is not None:
            metrics["train/dropped_mass"] = dropped.mean() / count
        values = dict(zip(metrics, torch.stack([v.double() for v in metrics.values()]).tolist(), strict=True))  # the one host sync
        if not math.isfinite(values["train/loss"]):
            raise ValueError(f"train/loss={values['train/loss']} at step {step}: training diverged; lower optim.lr={self.optim.lr} or lengthen "
                             f"optim.warmup_steps={self.optim.warmup_steps}, and begin anew or from an older checkpoint")
        for logger in self.loggers:
            logger.log_metrics({"tokens": self.tokens, "lr": lr, **values}, step)
        self.log("train/loss", values["train/loss"], prog_bar=True, logger=False)

    def _reduce(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Sums of cross-entropy and of targets, a row a domain."""
        self._val = torch.zeros(len(self.domains), 2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor | None]:
        """Adds the batch; gives its expert load [layers, E]. A batch without targets counts nothing."""
        out = self.net(**_inputs(batch), use_cache=False)
        loss = out.loss if getattr(out, "lm_loss", None) is None else out.lm_loss
        count = (batch["labels"][:, 1:] != -100).sum()
        self._val[dataloader_idx] += torch.stack([torch.where(count > 0, loss.double() * count, 0.0), count.double()])
        load = getattr(out, "expert_load", None)
        return {"expert_load": None if load is None else load * (count > 0)}

    def on_validation_epoch_end(self) -> None:
        """Exact token-weighted means over batches and ranks."""
        totals = self._reduce(self._val).tolist()
        if empty := [d for d, (_, count) in zip(self.domains, totals, strict=True) if not count]:
            raise ValueError(f"validation data without a single target: {', '.join(empty)}")
        self.val_losses = {d: total / count for d, (total, count) in zip(self.domains, totals, strict=True)}
        metrics = {f"val/{d}/loss": loss for d, loss in self.val_losses.items()} | {f"val/{d}/ppl": _exp(loss) for d, loss in self.val_losses.items()}
        metrics["val/loss"] = math.fsum(self.val_losses.values()) / len(self.domains)
        self.log_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in metrics.items()}, logger=False)
        for logger in self.loggers:
            logger.log_metrics({"tokens": self.tokens, **metrics}, self.trainer.global_step)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the file must say to be resumed only by the same training, and to be exported without it."""
        construction = getattr(self.net, "construction", None)
        checkpoint["dyn"] = {"tokens": self.tokens, "about": self._about(), "construction": None if construction is None else dataclasses.asdict(construction)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError for another training's checkpoint, naming the settings that differ."""
        if "dyn" not in checkpoint:
            raise ValueError("this checkpoint was not written by a CausalLM of dyn: it has no entry 'dyn'")
        theirs, ours = dict(_flat(checkpoint["dyn"]["about"])), dict(_flat(self._about()))
        if wrong := [f"{k}={theirs.get(k)!r}, here {ours.get(k)!r}" for k in dict.fromkeys([*theirs, *ours]) if theirs.get(k) != ours.get(k)]:
            raise ValueError(f"this checkpoint belongs to another training: {'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
        self.tokens = checkpoint["dyn"]["tokens"]

    def _about(self) -> dict[str, Any]:
        """Plain data: the net's class and configuration, the optimiser, the length."""
        config = self.net.config.to_dict() if hasattr(self.net, "config") else {}
        for key in ("transformers_version", "architectures", "_name_or_path"):  # these change without meaning
            config.pop(key, None)
        distill = {"distill_weight": self.distill_weight} if self.distill_weight else {}  # absent from checkpoints of plain trainings
        return _plain({"net": type(self.net).__name__.removeprefix("FSDP"), "config": config,
                       "optim": dataclasses.asdict(self.optim), "max_steps": self.cfg.max_steps, "accumulate": self.cfg.accumulate, "domains": self.domains,
                       **distill})


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in INPUTS if key in batch}


def _teacher_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """KL from the teacher's rows of a batch, over the places whose next token is a target."""
    if "teacher_ids" not in batch:
        raise ValueError("distill_weight is above 0, but the training batches carry no teacher_ids: wrap their loader in dyn.data.teacher.TaughtLoader")
    return distillation_loss(logits, batch["teacher_ids"], batch["teacher_logp"], F.pad(batch["labels"][:, 1:] != -100, (0, 1)))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
