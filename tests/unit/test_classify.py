"""Trainings of tiny classifiers in this process: what is learnt, measured, logged, refused. Kills and resumes are in tests/resume."""

import contextlib
import json
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn import metrics as reference
from torch import nn

from dyn.data.glue import SentenceSource, open_sentences
from dyn.data.images import ArrayImages
from dyn.data.loader import EvaluationLoader, ResumableLoader
from dyn.data.tiny import tiny_glue, tiny_pictures, tiny_tokenizer
from dyn.train.annealing import KeepMask, Temperature
from dyn.train.callbacks import Throughput
from dyn.train.checkpoint import newest_checkpoint
from dyn.train.classify import METRICS, Classifier, make_metrics
from dyn.train.optim import RecipeConfig, recipe_optimizer, schedule
from dyn.train.settings import ClassifyConfig
from dyn.train.trainer import TrainerConfig, fit, make_trainer, validate


class FakeRun:
    def __init__(self, folder) -> None:
        self.folder, self.stop, self.lines = folder, threading.Event(), []
        self.listen, self.graceful, self.log = lambda: None, contextlib.nullcontext, self.lines.append


def pictures(count=48, seed=0) -> ArrayImages:
    return ArrayImages(*tiny_pictures(count, seed=seed), [0.5] * 3, [0.25] * 3, pad=1, flip=False)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 3))


class Reader(nn.Module):
    """An encoder in little: mean of embeddings, with a balance loss where asked for."""

    def __init__(self, labels: int, aux: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classifier, self.aux = nn.Embedding(20, 8), nn.Linear(8, labels), aux

    def get_classifier(self):
        return self.classifier

    def forward(self, input_ids, attention_mask):
        weight = attention_mask[..., None].float()
        logits = self.classifier((self.embed(input_ids) * weight).sum(1) / weight.sum(1))
        out = types.SimpleNamespace(logits=logits)
        if self.aux is not None:
            out.aux_loss = self.aux * self.classifier.weight.square().sum()
        return out


class Words:
    """Sentences of three to six ids; the label is (regression) their mean or whether that is large."""

    def __init__(self, count: int = 40, real: bool = False) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(3, 7, count)
        self.ids = rng.integers(1, 20, (count, 6)) * (np.arange(6) < self.lengths[:, None])
        mean = self.ids.sum(1) / self.lengths
        self.labels = torch.tensor(mean / 4, dtype=torch.float32) if real else torch.from_numpy((mean > 10).astype(np.int64))

    def __len__(self):
        return len(self.labels)

    def batch(self, index, draw):
        width = self.lengths[index].max()
        ids = torch.from_numpy(self.ids[index, :width])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": self.labels[torch.from_numpy(index)]}


def config(**changes) -> TrainerConfig:
    given = dict(max_steps=6, precision="32-true", accelerator="cpu", log_every=1, val_every=3, checkpoint_every=0, progress_seconds=0.0)
    return TrainerConfig(**given | changes)


def train(folder, net, cfg, data, held, callbacks=(), optim=None, batch_size=8, **more):
    run = FakeRun(folder)
    held = held if isinstance(held, dict) else {"validation": held}
    loader = ResumableLoader(data, batch_size=batch_size, num_batches=cfg.max_steps * cfg.accumulate, seed=1, lengths=getattr(data, "lengths", None))
    task = Classifier(net, optim or RecipeConfig(lr=1e-2), list(held), cfg, **more)
    losses = fit(make_trainer(cfg, run, callbacks), task, loader, {name: EvaluationLoader(part, 7) for name, part in held.items()})
    return task, losses, run


def rows(folder, key):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in row]


def test_images_are_learnt_and_measured(tmp_path):
    held = pictures(20, seed=1)
    task, losses, run = train(tmp_path, cnn(), config(max_steps=40, val_every=20), pictures(), held, num_labels=3, metrics=("accuracy", "f1"))
    found, scores = rows(tmp_path, "train/loss"), rows(tmp_path, "val/accuracy")
    assert [row["examples"] for row in found] == [8 * s for s in range(1, 41)] and found[-1]["train/loss"] < found[0]["train/loss"] - 0.3
    assert "train/aux_loss" not in found[0] and "train/grad_norm" in found[0] and found[-1]["lr"] < found[0]["lr"]
    assert [row["step"] for row in scores] == [0, 20, 40] and scores[-1]["val/accuracy"] > 0.7
    whole = held.batch(np.arange(20), None)
    with torch.no_grad():
        logits = task.net.eval()(whole["images"])
    labels, predictions = whole["labels"], logits.argmax(1)
    assert task.val_metrics["val/loss"] == losses["validation"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert task.val_metrics["val/accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert task.val_metrics["val/f1"] == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
    answers = task.answers["validation"]
    assert answers.index.tolist() == list(range(20)) and torch.equal(answers.predictions, predictions) and torch.equal(answers.labels, labels)
    assert any(line.startswith("step 40: validation loss ") and "accuracy" in line for line in run.lines)
    assert any("examples/s" in line for line in run.lines)
    summary = next(c for c in task.trainer.callbacks if isinstance(c, Throughput)).summary()
    assert set(summary) == {"examples_per_second", "steps_per_second", "active_parameters"} and "speed/mfu" not in rows(tmp_path, "speed/step_seconds")[0]


def test_sentences_with_a_balance_loss_and_several_sets(tmp_path):
    task, losses, _ = train(tmp_path, Reader(2, aux=0.1), config(), Words(), {"matched": Words(15), "mismatched": Words(9)}, num_labels=2,
                            metrics=("matthews", "accuracy"))
    for row in rows(tmp_path, "train/loss"):
        assert row["train/loss"] == pytest.approx(row["train/task_loss"] + row["train/aux_loss"], rel=1e-5) and row["train/aux_loss"] > 0
    assert set(task.val_metrics) == {"val/loss", *(f"val/{s}/{m}" for s in losses for m in ("loss", "matthews", "accuracy"))}
    assert task.val_metrics["val/loss"] == pytest.approx(sum(losses.values()) / 2)
    again = validate(task, {name: EvaluationLoader(part, 4) for name, part in {"matched": Words(15), "mismatched": Words(9)}.items()}, config())
    assert again == pytest.approx(losses)


def test_regression(tmp_path):
    task, losses, _ = train(tmp_path, Reader(1), config(max_steps=30), Words(real=True), Words(20, real=True), num_labels=1, metrics=("pearson", "spearman"),
                            optim=RecipeConfig(lr=5e-2))
    whole = Words(20, real=True).batch(np.arange(20), None)
    labels = whole.pop("labels")
    with torch.no_grad():
        predictions = task.net(**whole).logits.squeeze(1)
    assert losses["validation"] == pytest.approx(F.mse_loss(predictions, labels).item(), rel=1e-5)
    assert task.val_metrics["val/pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-5)
    assert task.val_metrics["val/spearman"] == pytest.approx(spearmanr(predictions, labels).statistic, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_against_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(0, classes, 200))
    found = make_metrics(["accuracy", "f1", "matthews"], classes)(torch.from_numpy(predictions), torch.from_numpy(labels))
    average = "binary" if classes == 2 else "macro"
    expected = {"accuracy": reference.accuracy_score(labels, predictions), "f1": reference.f1_score(labels, predictions, average=average),
                "matthews": reference.matthews_corrcoef(labels, predictions)}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, abs=1e-6)


def test_metrics_that_do_not_fit():
    with pytest.raises(ValueError, match=r"metric 'pearson' does not fit 2 labels; allowed: accuracy, f1, matthews"):
        make_metrics(["pearson"], 2)
    with pytest.raises(ValueError, match=r"metric 'accuracy' does not fit 1 labels; allowed: pearson, spearman"):
        make_metrics(["accuracy"], 1)
    assert list(METRICS) == ["accuracy", "f1", "matthews", "pearson", "spearman"]


def test_smoothing_and_mixing(tmp_path):
    smooth, _, _ = train(tmp_path / "smooth", cnn(), config(max_steps=2), pictures(), pictures(9), num_labels=3, classify=ClassifyConfig(label_smoothing=0.2))
    batch = pictures().batch(np.arange(8), None)
    logits = cnn()(batch["images"])
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    assert smooth._loss(logits, batch["labels"], 0.2).mean().item() == pytest.approx(expected.item(), rel=1e-6)
    mixed = ClassifyConfig(mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    task, _, _ = train(tmp_path / "mixed", cnn(), config(max_steps=4), pictures(), pictures(9), num_labels=3, classify=mixed)
    assert len(rows(tmp_path / "mixed", "train/loss")) == 4 and len(task.answers["validation"].labels) == 9
    with pytest.raises(ValueError, match="this is a regression"):
        Classifier(cnn(), RecipeConfig(), ["v"], config(), num_labels=1, metrics=["pearson"], classify=mixed)


def test_the_average_is_what_is_validated(tmp_path):
    states = []

    class Watch(Throughput):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})

    start = {k: v.clone() for k, v in cnn().state_dict().items()}
    task, _, _ = train(tmp_path, cnn(), config(max_steps=5), pictures(), pictures(9), num_labels=3, classify=ClassifyConfig(ema=0.5),
                       callbacks=[Watch(torch.float32)])
    expected = start
    for step, state in enumerate(states, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {k: v * decay + state[k] * (1 - decay) for k, v in expected.items() if v.is_floating_point()}
    ignored = set(task._ddp_params_and_buffers_to_ignore)  # running statistics and their averages are sent around, weights' averages are not
    assert ignored == {f"average.{k.replace('.', '|')}" for k, _ in task.net.named_parameters()} and ignored <= dict(task.named_buffers()).keys()
    assert task.averages().keys() == expected.keys()
    for key, value in task.averages().items():
        torch.testing.assert_close(value, expected[key])
    averaged = cnn()
    averaged.load_state_dict(task.averages(), strict=False)
    with torch.no_grad():
        logits = averaged.eval()(pictures(9).batch(np.arange(9), None)["images"])
    assert task.val_losses["validation"] == pytest.approx(F.cross_entropy(logits, pictures(9).labels).item(), rel=1e-5)
    saved = torch.load(newest_checkpoint(tmp_path / "checkpoints"), weights_only=True)
    assert torch.equal(saved["state_dict"]["average.0|weight"], task.averages()["0.weight"])
    assert torch.equal(saved["state_dict"]["net.0.weight"], states[-1]["0.weight"])  # the net itself trains on


def test_bf16_channels_last_accumulation_and_sgd(tmp_path):
    cfg = config(precision="bf16-mixed", accumulate=2)
    task, _, _ = train(tmp_path, cnn(), cfg, pictures(), pictures(9), num_labels=3, classify=ClassifyConfig(channels_last=True),
                       optim=RecipeConfig(optimizer="sgd", lr=0.1, nesterov=True, schedule="cosine", warmup_steps=2))
    assert task.examples == 6 * 2 * 8 and task.net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(task.trainer.optimizers[0], torch.optim.SGD) and rows(tmp_path, "train/loss")[0]["lr"] == 0.0


def test_an_encoder_of_transformers_on_glue(tmp_path, monkeypatch):
    """From a folder in the hub's layout to a trained BERT, frozen but for its last layer and its pooler."""
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.setenv("DYN_CACHE", str(tmp_path / "cache"))
    data = open_sentences(SentenceSource(path=tiny_glue(tmp_path / "glue"), task="cola", tuning=0.25), tiny_tokenizer(), log=lambda _: None)
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                                   max_position_embeddings=128, num_labels=data.num_labels))
    net.bert.embeddings.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    task, losses, _ = train(tmp_path, net, config(max_steps=4), data.train, {**data.validation, "tuning": data.tuning}, num_labels=data.num_labels,
                            metrics=data.metrics, optim=RecipeConfig(lr=1e-3, head_lr=1e-2))
    assert set(losses) == {"validation", "tuning"} and "val/tuning/matthews" in task.val_metrics
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert "classifier.weight" in changed and not any("embeddings" in k for k in changed)


def test_a_compiled_net_keeps_its_names(tmp_path, monkeypatch):
    compiled, compile_ = [], nn.Module.compile

    def eager(module):  # inductor would take a minute
        compiled.append(module)
        compile_(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    plain, losses, _ = train(tmp_path / "plain", cnn(), config(), pictures(), pictures(9), num_labels=3, classify=ClassifyConfig(ema=0.5))
    task, same, _ = train(tmp_path / "compiled", cnn(), config(), pictures(), pictures(9), num_labels=3, classify=ClassifyConfig(ema=0.5, compile=True))
    assert compiled == [task.net] and task.state_dict().keys() == plain.state_dict().keys() and same == pytest.approx(losses, rel=1e-5)


def test_an_output_that_fsdp_cannot_look_into_is_refused(monkeypatch):
    """It would not reduce gradients, and say nothing."""
    task, batch = Classifier(Reader(2), RecipeConfig(), ["v"], config(), num_labels=2), Words().batch(np.arange(4), None)
    assert task._forward(batch)[0].shape == (4, 2)
    monkeypatch.setattr(Classifier, "device_mesh", object())
    with pytest.raises(ValueError, match="Reader gives a SimpleNamespace, in which FSDP2 sees no tensors"):
        task._forward(batch)


def test_foreign_checkpoints_are_refused(tmp_path):
    train(tmp_path, Reader(2), config(max_steps=2), Words(), Words(9), num_labels=2)
    with pytest.raises(ValueError, match=r"belongs to another training: optim.lr=0.01, here 0.02"):
        train(tmp_path, Reader(2), config(max_steps=2), Words(), Words(9), num_labels=2, optim=RecipeConfig(lr=2e-2))
    with pytest.raises(ValueError, match=r"classify.label_smoothing=0.0, here 0.1"):
        train(tmp_path, Reader(2), config(max_steps=2), Words(), Words(9), num_labels=2, classify=ClassifyConfig(label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"another training: .*tensors="):
        train(tmp_path, Reader(3), config(max_steps=2), Words(), Words(9), num_labels=3)


def test_the_schedules():
    linear = schedule(RecipeConfig(warmup_steps=10, floor=0.1), 110)
    assert [linear(s) for s in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    cosine = schedule(RecipeConfig(schedule="cosine"), 100)
    assert [cosine(s) for s in (0, 25, 50, 100)] == pytest.approx([1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0], abs=1e-12)
    steps = schedule(RecipeConfig(schedule="step", milestones=(0.3, 0.6)), 100)
    assert [steps(s) for s in (0, 29, 30, 59, 60, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert schedule(RecipeConfig(schedule="constant"), 10)(9) == 1.0


def test_groups_of_the_recipe():
    net = Reader(2)
    groups = recipe_optimizer(net, RecipeConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.1)).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(1e-3, 0.1, 1), (1e-2, 0.1, 1), (1e-2, 0.0, 1)]
    [group] = recipe_optimizer(net, RecipeConfig(decay_all=True)).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 3
    net.get_classifier = lambda: nn.Identity()
    with pytest.raises(ValueError, match="Reader has no head of its own that is trained"):
        recipe_optimizer(net, RecipeConfig(head_lr=1.0))
    with pytest.raises(ValueError, match="everything is frozen"):
        recipe_optimizer(net.requires_grad_(False), RecipeConfig())


@pytest.mark.parametrize(("settings", "message"), [
    (dict(lr=-1.0), "optim.lr=-1.0"), (dict(head_lr=-1.0), "optim.head_lr"), (dict(milestones=(0.6, 0.3)), "ascending order"),
    (dict(nesterov=True, momentum=0.0), "needs optim.momentum"), (dict(betas=(0.9, 1.0)), "optim.betas"),
])
def test_recipes_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**settings)


def test_settings_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"classify.ema=1.0 must lie in \[0, 1\)"):
        ClassifyConfig(ema=1.0)
    with pytest.raises(ValueError, match=r"classify.mixup=-1\.0"):
        ClassifyConfig(mixup=-1.0)
    with pytest.raises(ValueError, match="warmup_steps=6 must be smaller than max_steps=6"):
        Classifier(Reader(2), RecipeConfig(warmup_steps=6), ["v"], config(), num_labels=2)


def test_temperature_goes_by_the_step(tmp_path):
    now, seen = [], []

    class Look(Throughput):
        def on_train_batch_end(self, *_):
            seen.append(now[-1])

    train(tmp_path, Reader(2), config(accumulate=2), Words(), Words(9), num_labels=2,
          callbacks=[Temperature(lambda step: 30.0 - step, now.append, log_every=2), Look(torch.float32)])
    assert seen == [30.0, 30.0, 29.0, 29.0, 28.0, 28.0, 27.0, 27.0, 26.0, 26.0, 25.0, 25.0]
    assert [(row["step"], row["train/temperature"]) for row in rows(tmp_path, "train/temperature")] == [(2, 29.0), (4, 27.0), (6, 25.0)]


def test_masks_are_kept_for_optimisers_that_mix(tmp_path):
    """Rotations of a whole matrix, as Muon's: the step itself would wake pruned weights."""

    class Mixing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1e-3)
            return loss

    class Mixed(Classifier):
        def configure_optimizers(self):
            return Mixing(self.net.parameters(), lr=0.1)

    net = Reader(2)
    mask = torch.rand_like(net.classifier.weight) < 0.5
    cfg = config()

    def apply():
        net.classifier.weight.data.mul_(mask)

    task = Mixed(net, RecipeConfig(), ["validation"], cfg, num_labels=2, classify=ClassifyConfig(ema=0.5))
    loader = ResumableLoader(Words(), batch_size=8, num_batches=6, seed=1)
    fit(make_trainer(cfg, FakeRun(tmp_path), [KeepMask(apply)]), task, loader, {"validation": EvaluationLoader(Words(9), 4)})
    assert not net.classifier.weight[~mask].any() and net.classifier.weight[mask].all()
    saved = torch.load(newest_checkpoint(tmp_path / "checkpoints"), weights_only=True)["state_dict"]
    assert not saved["net.classifier.weight"][~mask].any()
    held = KeepMask(apply)
    held.on_train_end()  # nothing hangs
