"""Trainings of a classifier by name within one run: ended, taken up again, measured. Kills are in tests/resume."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from dyn.data.images import ArrayImages
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_pictures
from dyn.runfolder import Cancelled, Run, create
from dyn.train.fit import train_classifier
from dyn.train.optim import RecipeConfig, schedule
from dyn.train.settings import ClassifyConfig, TrainerConfig


def new_run(folder) -> Run:
    return Run.open(create(folder, "tiny", TrainerConfig(), profile="test"))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def train(run, name="", callbacks=(), ema=0.9):
    data, held = (ArrayImages(*tiny_pictures(count, seed=count), [0.5] * 3, [0.25] * 3, pad=1, flip=True) for count in (40, 10))
    cfg = TrainerConfig(max_steps=6, precision="32-true", accelerator="cpu", log_every=1, val_every=4, checkpoint_every=2)
    return train_classifier(cnn(), ResumableLoader(data, batch_size=8, num_batches=6, seed=1), {"held": EvaluationLoader(held, 4)}, run=run, name=name,
                            optim=RecipeConfig(lr=1e-2), trainer=cfg, num_labels=3, classify=ClassifyConfig(ema=ema), callbacks=callbacks)


class StopAt(Callback):
    def __init__(self, run, step) -> None:
        self.run, self.step = run, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.run.stop.set()


def test_two_trainings_of_a_run(tmp_path):
    run = new_run(tmp_path)
    first, second = train(run, "one"), train(run, "two")
    assert all(torch.equal(a, b) for a, b in zip(first.net.state_dict().values(), second.net.state_dict().values(), strict=True))
    assert first.metrics == second.metrics and set(first.metrics) == {"val/loss", "val/accuracy"}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"one", "two"} and (run.folder / "checkpoints" / "two" / "step-00000006.ckpt").is_file()
    assert len(first.answers["held"].labels) == 10
    parameters = sum(p.numel() for p in cnn().parameters())
    assert first.cost["total_parameters"] == first.cost["stored_parameters"] == first.cost["trainable_parameters"] == parameters
    assert first.cost["steps_per_second"] > 0 and first.cost["peak_memory_bytes"] > 1e7 and 0 < first.cost["seconds_training"] < 60


def test_a_finished_training_is_taken_up_and_the_average_is_in_the_net(tmp_path):
    run = new_run(tmp_path)
    first = train(run)
    again = train(run)
    assert again.metrics == first.metrics and "steps_per_second" not in again.cost
    assert again.cost["seconds_training"] == pytest.approx(first.cost["seconds_training"], abs=2)
    assert all(torch.equal(a, b) for a, b in zip(first.net.state_dict().values(), again.net.state_dict().values(), strict=True))
    plain = train(new_run(tmp_path / "plain"), ema=0.0)
    assert not torch.equal(plain.net[0].weight, first.net[0].weight)
    saved = torch.load(run.folder / "checkpoints" / "step-00000006.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["average.0|weight"], first.net[0].weight) and torch.equal(saved["net.0.weight"], plain.net[0].weight)


def test_a_stopped_training_goes_on_bitwise(tmp_path):
    whole, run = train(new_run(tmp_path / "whole")), new_run(tmp_path)
    with pytest.raises(Cancelled):
        train(run, callbacks=[StopAt(run, 3)])
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000002.ckpt", "step-00000003.ckpt"]
    run.stop.clear()
    resumed = train(run)
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.state_dict().values(), whole.net.state_dict().values(), strict=True))


def test_warm_up_as_a_share():
    rate = schedule(RecipeConfig(warmup_share=0.1, schedule="constant"), 40)
    assert [rate(step) for step in (0, 2, 4, 39)] == [0, 0.5, 1, 1]
    assert schedule(RecipeConfig(warmup_share=0.1, warmup_steps=8), 40)(4) == 0.5  # the longer of both
    with pytest.raises(ValueError, match=r"optim.warmup_share=1 must lie in \[0, 0.99\]"):
        RecipeConfig(warmup_share=1)
