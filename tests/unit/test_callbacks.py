"""Callbacks apart from a training; with one in test_trainer.py and tests/resume."""

import json
import math
import random
import types

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from dyn.data.mixture import update_weights
from dyn.train import speed
from dyn.train.callbacks import BarProgress, ExpertLoad, JsonlLogger, PlainProgress, Remix, RngState, Throughput


def fake_trainer(**changes):
    given = dict(world_size=1, global_rank=0, global_step=0, max_steps=100, accumulate_grad_batches=1, loggers=[], is_global_zero=True,
                 checkpoint_callback=None, state=types.SimpleNamespace(fn=TrainerFn.FITTING),
                 strategy=types.SimpleNamespace(reduce=lambda tensor, reduce_op: tensor * 2))
    return types.SimpleNamespace(**given | changes)


def draw() -> list[float]:
    return [torch.rand(1).item(), np.random.rand(), random.random(), float(np.random.randn())]


@pytest.fixture(autouse=True)
def _keep_global_random_states():
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(kept[0])
    np.random.set_state(kept[1])
    random.setstate(kept[2])


def test_rng_between_batches_does_not_matter_and_travels_with_the_checkpoint(tmp_path):
    state, trainer = RngState(7), fake_trainer()
    state.on_train_batch_start(trainer)
    first = draw()
    state.on_train_batch_end()
    saved = state.state_dict()
    torch.save(saved, tmp_path / "state")
    draw()
    state.on_train_batch_start(trainer)
    second = draw()
    other = RngState(7)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    draw()
    other.on_train_batch_start(trainer)
    assert draw() == second != first
    again = RngState(7)
    again.on_train_batch_start(trainer)
    assert draw() == first


def test_rng_differs_by_rank_and_a_changed_world_is_said():
    draws = []
    for rank in range(2):
        RngState(7).on_train_batch_start(fake_trainer(global_rank=rank, world_size=2))
        draws.append(draw())
    assert draws[0] != draws[1]
    state = RngState(7)
    state.load_state_dict({"ranks": [{}, {}]})
    with pytest.warns(UserWarning, match="random states of 2 processes, now there are 3"):
        state.on_train_batch_start(fake_trainer(world_size=3, global_step=4))
    assert draw() not in draws


def test_jsonl_appends_and_is_cut_back(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = JsonlLogger(path)
    assert log.position() == 0
    log.cut(0)
    log.log_metrics({"a": torch.tensor(0.1), "n": 3}, 1)
    position = log.position()
    log.log_metrics({"a": math.nan, "b": math.inf}, 2)
    assert position and [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "a": torch.tensor(0.1).item(), "n": 3},
                                                                                        {"step": 2, "a": "nan", "b": "inf"}]
    JsonlLogger(path).cut(position)
    log.log_metrics({"a": 2.0}, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [{"step": 2, "a": 2.0}]


def test_jsonl_restart_drops_only_its_own_stage_and_what_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    moe, control = JsonlLogger(path, "moe"), JsonlLogger(path, "control")
    moe.log_metrics({"a": 1.0}, 1)
    control.log_metrics({"a": 2.0}, 1)
    with path.open("a") as file:
        file.write('{"step": 2, "sta')
    control.restart()
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == ["moe"]
    control.log_metrics({"a": 3.0}, 1)
    moe.restart()
    assert path.read_text() == ""
    JsonlLogger(tmp_path / "none.jsonl").restart()


def test_throughput_counts_steps_and_pauses(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("dyn.train.callbacks.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    lines = []
    trainer = fake_trainer(accumulate_grad_batches=2, world_size=3, loggers=[types.SimpleNamespace(log_metrics=lambda m, s: lines.append((s, m)))],
                           checkpoint_callback=types.SimpleNamespace(seconds=0.0))
    module = types.SimpleNamespace(active_parameters=1000, trained_parameters=1000, device=torch.device("cpu"), log_dict=lambda *_, **__: None, unit="tokens",
                                   amount=lambda batch: batch["input_ids"].numel())
    meter, batch = Throughput(torch.float32, log_every=2, peak=1e6), {"input_ids": torch.zeros(2, 5)}
    meter.on_fit_start(trainer, module)
    meter.on_train_start(trainer, module)
    assert meter.summary() == {"peak_flops": 1e6, "peak_flops_from": "rate given as trainer.peak_flops", "active_parameters": 1000}
    for micro in range(10):  # five steps of 2 seconds; the first only starts the clock
        clock.now += 1.0
        if micro % 2:
            trainer.global_step += 1
        meter.on_train_batch_end(trainer, module, None, batch, micro)
        if micro == 5:
            meter.on_validation_start(trainer, module)
            clock.now += 50.0
            meter.on_validation_end(trainer, module)
            trainer.checkpoint_callback.seconds, clock.now = 7.0, clock.now + 7.0
    rate = 2 * 5 * 2 * 3 / 2.0
    assert [step for step, _ in lines] == [2, 4]
    for _, metrics in lines:
        assert metrics == pytest.approx({"speed/tokens_per_second": rate, "speed/mfu": 6 * 1000 * rate / 3e6, "speed/step_seconds": 2.0})
    summary = meter.summary()
    assert summary == pytest.approx({"tokens_per_second": rate, "steps_per_second": 0.5, "mfu": lines[0][1]["speed/mfu"]}
                                    | {"peak_flops": 1e6, "peak_flops_from": "rate given as trainer.peak_flops", "active_parameters": 1000})


def test_peaks_say_where_they_come_from(monkeypatch):
    rate = speed.measure_matmul_rate(torch.float32, size=64, seconds=0.01, trials=2)
    assert 1e6 < rate < 1e15
    monkeypatch.setattr(speed, "measure_matmul_rate", lambda dtype, *_, **__: 5.0)
    source = f"measured rate of bfloat16 matrix products on this CPU, {torch.get_num_threads()} threads"
    assert speed.peak_flops(torch.device("cpu"), torch.bfloat16) == (5.0, source)
    gpu = torch.device("cuda")
    sheets = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "H200 NVL": 835e12, "A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12, "L40S": 362e12,
              "NVIDIA A40": 150e12, "NVIDIA GH200 480GB": 989e12}
    for name, expected in sheets.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        rate, source = speed.peak_flops(gpu, torch.bfloat16)
        assert rate == expected and name in source and "data sheet" in source
    for name in ("Unheard-of 1", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA GeForce RTX 3090 Ti"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert speed.peak_flops(gpu, torch.bfloat16) == (5.0, f"measured rate of bfloat16 matrix products on {name}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert speed.peak_flops(gpu, torch.float32)[0] == 5.0  # the table is of bfloat16


def test_expert_load_by_domain_over_batches_and_ranks(tmp_path):
    load, trainer, module = ExpertLoad(tmp_path / "new" / "load.json"), fake_trainer(global_step=9), types.SimpleNamespace(domains=["a", "b"])
    for _ in range(2):  # the second validation begins anew
        load.on_validation_start()
        for domain, counts in ((0, [[1.0, 2.0]]), (0, [[3.0, 0.0]]), (1, [[5.0, 5.0]])):
            load.on_validation_batch_end(trainer, module, {"expert_load": torch.tensor(counts)}, None, 0, domain)
        load.on_validation_end(trainer, module)
    assert {d: t.tolist() for d, t in load.loads.items()} == {"a": [[8.0, 4.0]], "b": [[10.0, 10.0]]}  # doubled by the two ranks
    assert json.loads(load.path.read_text()) == {"step": 9, "load": {"a": [[8.0, 4.0]], "b": [[10.0, 10.0]]}}
    quiet = ExpertLoad(tmp_path / "dense.json")
    quiet.on_validation_start()
    quiet.on_validation_batch_end(trainer, module, {"expert_load": None}, None, 0)
    quiet.on_validation_end(trainer, module)
    assert quiet.loads == {} and not quiet.path.exists()


class FakeLoader:
    def __init__(self) -> None:
        self.weights = {"a": 0.5, "b": 0.5}

    def set_weights(self, weights) -> None:
        self.weights = dict(weights)


def test_remix_follows_the_rule_where_it_should():
    losses, references = {"a": 3.0, "b": 2.0}, {"a": 2.5, "b": 2.5}
    module, lines = types.SimpleNamespace(val_losses=losses, tokens=64), []
    logger = types.SimpleNamespace(log_metrics=lambda metrics, step: lines.append((step, metrics)))
    loader = FakeLoader()
    remix = Remix(loader, references, rule="b", every=2)
    trainer = fake_trainer(loggers=[logger], max_steps=8)
    remix.on_train_start(trainer, module)
    expected = {"a": 0.5, "b": 0.5}
    for step in range(9):
        trainer.global_step = step
        remix.on_validation_end(trainer, module)
        if step in (2, 4, 6):
            expected = update_weights(expected, losses, references, rule="b")
        assert loader.weights == expected
    assert [step for step, _ in lines] == [0, 2, 4, 6] and lines[-1][1] == {"tokens": 64, "weights/a": expected["a"], "weights/b": expected["b"]}
    trainer.global_step, trainer.state.fn = 2, TrainerFn.VALIDATING
    remix.on_validation_end(trainer, module)
    assert loader.weights == expected


def test_remix_anchor_references_and_refusals():
    losses, references, anchor = {"a": 3.0, "b": 2.0}, {"a": 2.5, "b": 2.5}, {"a": 0.5, "b": 0.5}
    module, trainer, loader = types.SimpleNamespace(val_losses=losses, tokens=0), fake_trainer(global_step=1), FakeLoader()
    remix = Remix(loader, references, anchor=anchor)
    for _ in range(3):
        remix.on_validation_end(trainer, module)
        assert loader.weights == update_weights(anchor, losses, references)  # does not compound
    later = Remix(FakeLoader(), {"a": 9.0, "b": 9.0})
    later.load_state_dict(remix.state_dict())
    assert later.references == references and later.anchor == anchor
    with pytest.raises(ValueError, match="missing or not finite for b"):
        Remix(FakeLoader(), {"a": 1.0})
    with pytest.raises(ValueError, match="rule='c' is unknown"):
        Remix(FakeLoader(), references, rule="c")


def test_plain_progress_is_sparse(monkeypatch):
    clock, lines = types.SimpleNamespace(now=0.0), []
    monkeypatch.setattr("dyn.train.callbacks.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    bar = PlainProgress(lines.append, seconds=10.0)
    trainer = fake_trainer(progress_bar_metrics={"train/loss": 2.5, "tokens/s": 12345.0, "mfu": 0.25}, max_steps=50, log_every_n_steps=1)
    for step in range(1, 30):
        clock.now, trainer.global_step = float(step), step
        bar.on_train_batch_end(trainer, None, None, None, 0)
    assert [line.split(":")[0] for line in lines] == ["step 1/50", "step 11/50", "step 21/50"]
    assert lines[0] == "step 1/50: loss 2.5, tokens/s 12,345, mfu 0.25"
    clock.now, trainer.global_step, trainer.log_every_n_steps = 40.0, 34, 10
    bar.on_train_batch_end(trainer, None, None, None, 0)
    assert lines[-1] == "step 34/50: loss 2.5, tokens/s 12,345, mfu 0.25 (of step 30)"
    bar.on_validation_end(trainer, types.SimpleNamespace(val_line=lambda: "validation loss code 1.5000"))
    assert lines[-1] == "step 34: validation loss code 1.5000"


def test_the_bar_counts_steps_from_where_training_begins(capsys):
    lines = []
    bar, module = BarProgress(lines.append), types.SimpleNamespace(val_line=lambda: "validation loss code 1.5000")
    trainer = fake_trainer(progress_bar_metrics={"train/loss": 2.5, "tokens/s": 12345.0, "mfu": 0.25}, max_steps=5, global_step=3, accumulate_grad_batches=2,
                           log_every_n_steps=5)
    bar.on_train_start(trainer, module)
    for micro in range(4):
        trainer.global_step += micro % 2
        bar.on_train_batch_end(trainer, module, None, None, micro)
        assert ("loss 2.5" in (bar.bar.postfix or "")) is (trainer.global_step == 5)  # not at every step: reading it waits for the GPU
    bar.on_validation_start(trainer, module)
    bar.on_validation_end(trainer, module)
    bar.on_train_end(trainer, module)
    bar.on_validation_end(trainer, module)  # the one after training
    shown = capsys.readouterr().err
    assert "3/5" in shown and "5/5" in shown and "loss 2.5, tokens/s 12,345, mfu 0.25" in shown and "validating" in shown
    assert lines == ["step 5: validation loss code 1.5000"] * 2
