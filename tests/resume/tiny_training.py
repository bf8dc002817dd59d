"""A tiny training for the tests beside this file: a mixture of experts with attention dropout, gate noise, accumulation, and domain weights that change.

`start`, as in the other scripts here, trains, or resumes the run that is in the folder; words are fields of the config or the trainer's.
"""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from dyn import env
from dyn.data.mixture import MixtureLoader, validation_batches
from dyn.data.tokens import Tokens
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.runfolder import Run, create
from dyn.train.callbacks import ExpertLoad, Remix
from dyn.train.optim import OptimConfig
from dyn.train.tasks import CausalLM
from dyn.train.trainer import TrainerConfig, fit, make_trainer, world


def trainer_config(**changes) -> TrainerConfig:
    given = dict(max_steps=14, accumulate=2, precision="32-true", accelerator="cpu", log_every=1, val_every=5, checkpoint_every=3, peak_flops=1e9, seed=3)
    return TrainerConfig(**given | changes)


@dataclass
class Config:
    balance: str = "importance_load"
    plain: bool = False  # without dropout, noise and balance loss
    batch_size: int = 2
    validation_batches: int = 2
    signal_in_validation: str = ""  # SIGTERM@5: this process gets that signal in the middle of the validation of step 5
    trainer: TrainerConfig = field(default_factory=trainer_config)


def tiny_moe(cfg: Config) -> LlamaMoeForCausalLM:
    torch.manual_seed(0)
    return LlamaMoeForCausalLM(LlamaMoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, num_experts=4, num_experts_per_tok=2, score_scale=2.0,
        attention_dropout=0.0 if cfg.plain else 0.2, gate_noise=not cfg.plain, balance="none" if cfg.plain else cfg.balance))


def tiny_tokens(seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_documents([torch.randint(0, 32, (50,), generator=generator).tolist() for _ in range(40)], vocab_size=32)


def tiny_loader(cfg: Config) -> MixtureLoader:
    rank, size = world(cfg.trainer)
    return MixtureLoader({"a": tiny_tokens(1), "b": tiny_tokens(2)}, {"a": 0.7, "b": 0.3}, block_size=8, batch_size=cfg.batch_size,
                         num_batches=cfg.trainer.max_steps * cfg.trainer.accumulate, seed=5, rank=rank, world_size=size)


def tiny_validation(batches: int = 2) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {d: validation_batches(tiny_tokens(10 + i), 8, 2, max_tokens=16 * batches, domain=i) for i, d in enumerate("ab")}


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SignalInValidation(Callback):
    def __init__(self, name: str, step: str) -> None:
        self.signal, self.step = signal.Signals[name], int(step)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.global_step == self.step and dataloader_idx == 1 and batch_idx == 0:
            os.kill(os.getpid(), self.signal)


def train(run: Run, cfg: Config) -> tuple[CausalLM, dict[str, float]]:
    loader = tiny_loader(cfg)
    net = tiny_moe(cfg) if cfg.trainer.strategy != "fsdp2" else lambda: tiny_moe(cfg)
    task = CausalLM(net, OptimConfig(lr=1e-2, warmup_steps=2), ["a", "b"], cfg.trainer)
    callbacks = [ExpertLoad(run.folder / "expert_load.json"), Remix(loader, {"a": 3.0, "b": 3.6})]
    if cfg.signal_in_validation:
        callbacks.append(SignalInValidation(*cfg.signal_in_validation.split("@")))
    return task, fit(make_trainer(cfg.trainer, run, callbacks), task, loader, tiny_validation(cfg.validation_batches))


def start(runs: Path, words: list[str], cfg: Any = None, train: Callable[[Run, Any], tuple[Any, dict[str, float]]] = train) -> None:
    cfg = Config() if cfg is None else cfg
    for word in words:
        key, value = word.split("=")
        owner = cfg if hasattr(cfg, key) else cfg.trainer
        setattr(owner, key, value == "true" if isinstance(getattr(owner, key), bool) else type(getattr(owner, key))(value))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        run = Run.open(next(runs.glob("tiny/*"), None) or create(runs, "tiny", cfg, profile="test"))
    else:
        run = Run.join(*env.follow())
    with run.listening():
        task, losses = train(run, cfg)
    state = task.trainer.strategy.lightning_module_state_dict()
    if task.trainer.is_global_zero:
        (run.folder / "final.txt").write_text(f"{weights_hash(state)} {losses}\n")

