"""A distilled training that is stopped and gone on with, and one whose cache was interrupted too, is bit by bit the one that was left alone."""

import contextlib
import json
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dyn.data.mixture import MixtureLoader, validation_batches
from dyn.data.teacher import TaughtLoader, TeacherCache, describe
from dyn.data.tiny import tiny_tokens
from dyn.models.llama_moe import LlamaMoeConfig, LlamaMoeForCausalLM
from dyn.models.llama_moe_dense import fresh
from dyn.models.packaged import dense_config
from dyn.train.distill import cache_teacher
from dyn.train.optim import OptimConfig
from dyn.train.tasks import CausalLM
from dyn.train.trainer import TrainerConfig, fit, make_trainer

STEPS = 8
CORPUS = tiny_tokens(["code", "docs"], vocab_size=64)
TRAIN = {d: splits["train"] for d, splits in CORPUS.items()}


class FakeRun:
    def __init__(self, folder):
        self.folder, self.stop = folder, threading.Event()
        self.log = self.listen = lambda *_: None
        self.graceful = contextlib.nullcontext


class StopAt(Callback):
    def __init__(self, run, step):
        self.run, self.step = run, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.run.stop.set()


class Killed(Exception):
    pass


def teacher():
    torch.manual_seed(0)
    return fresh(dense_config("tiny"))


def student():
    torch.manual_seed(1)
    return LlamaMoeForCausalLM(LlamaMoeConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, num_experts=4, num_experts_per_tok=2, score_scale=2.0, attention_dropout=0.2, gate_noise=True))


def taught(folder, cfg, killed_at=None):
    loader = MixtureLoader(TRAIN, {"code": 0.7, "docs": 0.3}, block_size=16, batch_size=2, num_batches=STEPS * cfg.accumulate, seed=5, mask_documents=True)
    about = describe(TRAIN, parent="p", tokenizer="t", vocab_size=259, top_k=8, block_size=16, mask_documents=True)
    cache = TeacherCache(str(folder / "teacher"), about, shard_bytes=7 * 16 * 8 * 4)
    append = cache.append

    def dying(blocks, *arrays):
        append(blocks, *arrays)
        if len(cache) >= killed_at:
            raise Killed

    cache.append = append if killed_at is None else dying
    cache_teacher(cache, loader, teacher, batch_size=4, dtype=None, log=lambda _: None)
    return TaughtLoader(loader, cache)


def train(folder, stop=0, weight=0.5):
    folder.mkdir(exist_ok=True)
    cfg = TrainerConfig(max_steps=STEPS, accumulate=2, precision="32-true", accelerator="cpu", log_every=1, val_every=3, checkpoint_every=0, peak_flops=1e9)
    run = FakeRun(folder)
    loader = taught(folder, cfg)
    torch.manual_seed(stop)  # nothing may depend on what happened before
    task = CausalLM(student(), OptimConfig(lr=1e-2, warmup_steps=2), list(CORPUS), cfg, weight)
    held = {d: validation_batches(s["validation"], 16, 2, max_tokens=64, domain=i) for i, (d, s) in enumerate(CORPUS.items())}
    losses = fit(make_trainer(cfg, run, [StopAt(run, stop)] if stop else []), task, loader, held)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {k: v.clone() for k, v in task.net.state_dict().items()}, losses, [r for r in rows if not any(k.startswith("speed/") for k in r)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("distilled") / "whole")


def same(a, b):
    assert a[2] == b[2] and a[1] == b[1]
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_the_training_is_distilled(whole):
    rows = [r for r in whole[2] if "train/loss" in r]
    assert len(rows) == STEPS and rows[-1]["train/distill_loss"] < rows[0]["train/distill_loss"]
    for r in rows:
        assert r["train/loss"] == pytest.approx(0.5 * r["train/lm_loss"] + 0.5 * r["train/distill_loss"] + r["train/balance_loss"], rel=1e-5)
    assert all("train/distill_loss" not in r for r in whole[2] if "val/loss" in r)


@pytest.mark.parametrize("stop", [1, 5])
def test_stopped_and_gone_on_with(whole, tmp_path, stop):
    train(tmp_path / "run", stop=stop)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 1
    same(train(tmp_path / "run"), whole)


def test_an_interrupted_cache_trains_the_same(whole, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(Killed):
        taught(tmp_path / "run", TrainerConfig(accumulate=2), killed_at=14)
    same(train(tmp_path / "run"), whole)


def test_another_weight_is_refused(tmp_path):
    train(tmp_path / "run", stop=2)
    with pytest.raises(ValueError, match=r"belongs to another training: distill_weight=0\.5, here 0\.25"):
        train(tmp_path / "run", weight=0.25)
