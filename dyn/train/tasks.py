"""What is trained: next-token prediction with a causal language model, dense or a mixture of experts.

B sequences, L tokens in `input_ids`; layers and E for expert loads [layers, E].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn.core.distill import distillation_loss
from dyn.core.routing import cv_squared
from dyn.train.optim import OptimConfig, cosine_clipped, make_optimizer
from dyn.train.task import Task

if TYPE_CHECKING:
    from dyn.train.settings import TrainerConfig

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")


class CausalLM(Task):
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

    unit = "tokens"

    def __init__(self, net: nn.Module | Callable[[], nn.Module], optim: OptimConfig, domains: Sequence[str], cfg: TrainerConfig,
                 distill_weight: float = 0.0) -> None:
        if not 0 <= distill_weight <= 1:
            raise ValueError(f"distill_weight={distill_weight} must lie in [0, 1]")
        super().__init__(net, optim, domains, cfg)
        self.distill_weight, self.tokens = distill_weight, 0

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and the clipped cosine, by optimiser step."""
        optimizer = make_optimizer(self.net, self.optim)
        cfg, total = self.optim, self.cfg.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_clipped(step, total, cfg.warmup_steps, cfg.floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Training

    def amount(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens, padding too."""
        return batch["input_ids"].numel()

    def seen(self) -> dict[str, float]:
        """Tokens."""
        return {"tokens": self.tokens}

    def resume_seen(self, seen: Mapping[str, float]) -> None:
        """Tokens."""
        self.tokens = seen["tokens"]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one micro-batch; Lightning divides by their number."""
        out = self.net(**_inputs(batch), use_cache=False)
        self.tokens += self.amount(batch) * self.trainer.world_size
        loss, lm_loss, kl = out.loss, getattr(out, "lm_loss", None), None
        if self.distill_weight:
            lm_loss = out.loss if lm_loss is None else lm_loss
            kl = _teacher_loss(out.logits, batch)
            loss = out.loss + self.distill_weight * (kl - lm_loss)  # balance losses keep their weight
        self.record(**{"train/loss": loss, "train/lm_loss": lm_loss, "train/distill_loss": kl, "train/balance_loss": getattr(out, "aux_loss", None),
                       "load": getattr(out, "expert_load", None), "dropped": getattr(out, "dropped_mass", None)})
        return loss

    def stepped(self, sums: dict[str, Tensor]) -> set[str]:
        """Move selection biases by the loads of all ranks."""
        if getattr(getattr(self.net, "config", None), "balance", None) != "bias":
            return set()
        sums["load"] = self.reduced(sums["load"])
        self.net.update_selection_bias(sums["load"])
        return {"load"}

    def step_metrics(self, sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Means; the spread of the experts' loads."""
        load, dropped = sums.pop("load", None), sums.pop("dropped", None)
        metrics = {key: value / count for key, value in sums.items()}
        if load is not None:
            ratio = load.amax(-1) / load.mean(-1).clamp(min=1e-12)
            cv2 = torch.stack([cv_squared(load_E) for load_E in load])
            metrics |= {"train/load_max": ratio.mean(), "train/load_max_layer": ratio.max(), "train/load_cv2": cv2.mean()}
        if dropped is not None:
            metrics["train/dropped_mass"] = dropped.mean() / count
        return metrics

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
        totals = self.reduced(self._val).tolist()
        if empty := [d for d, (_, count) in zip(self.domains, totals, strict=True) if not count]:
            raise ValueError(f"validation data without a single target: {', '.join(empty)}")
        self.val_losses = {d: total / count for d, (total, count) in zip(self.domains, totals, strict=True)}
        metrics = {f"val/{d}/loss": loss for d, loss in self.val_losses.items()} | {f"val/{d}/ppl": _exp(loss) for d, loss in self.val_losses.items()}
        metrics["val/loss"] = math.fsum(self.val_losses.values()) / len(self.domains)
        self.log_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in metrics.items()}, logger=False)
        for logger in self.loggers:
            logger.log_metrics({"tokens": self.tokens, **metrics}, self.trainer.global_step)

    def val_line(self) -> str:
        """The losses."""
        return "validation loss " + ", ".join(f"{d} {loss:.4f}" for d, loss in self.val_losses.items())

    def about(self) -> dict[str, Any]:
        """The distillation; absent from checkpoints of plain trainings."""
        return {"distill_weight": self.distill_weight} if self.distill_weight else {}


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in INPUTS if key in batch}


def _teacher_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """KL from the teacher's rows of a batch, over the places whose next token is a target."""
    if "teacher_ids" not in batch:
        raise ValueError("distill_weight is above 0, but the training batches carry no teacher_ids: wrap their loader in dyn.data.teacher.TaughtLoader")
    return distillation_loss(logits, batch["teacher_ids"], batch["teacher_logp"], F.pad(batch["labels"][:, 1:] != -100, (0, 1)))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf

